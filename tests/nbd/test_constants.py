"""Numbers of the specification, spelled out a second time."""

from fleecenbd.nbd import constants as c


def test_magics_are_those_of_the_specification() -> None:
    assert c.NBD_MAGIC.to_bytes(8, "big") == b"NBDMAGIC"
    assert c.NBD_OPTS_MAGIC.to_bytes(8, "big") == b"IHAVEOPT"
    assert c.NBD_REP_MAGIC == 0x3E889045565A9
    assert c.NBD_REQUEST_MAGIC == 0x25609513
    assert c.NBD_SIMPLE_REPLY_MAGIC == 0x67446698
    assert c.NBD_STRUCTURED_REPLY_MAGIC == 0x668E33EF
    assert c.NBD_EXTENDED_REQUEST_MAGIC == 0x21E41C71
    assert c.NBD_EXTENDED_REPLY_MAGIC == 0x6E8A278C


def numbers(prefix: str) -> dict[str, int]:
    return {
        name[len(prefix) :]: value for name, value in vars(c).items() if name.startswith(prefix)
    }


def test_options_and_their_replies_are_those_of_the_specification() -> None:
    assert numbers("NBD_OPT_") == {
        "EXPORT_NAME": 1,
        "ABORT": 2,
        "LIST": 3,
        "PEEK_EXPORT": 4,
        "STARTTLS": 5,
        "INFO": 6,
        "GO": 7,
        "STRUCTURED_REPLY": 8,
        "LIST_META_CONTEXT": 9,
        "SET_META_CONTEXT": 10,
        "EXTENDED_HEADERS": 11,
    }
    assert numbers("NBD_REP_ERR_") == {
        "UNSUP": 0x80000001,
        "POLICY": 0x80000002,
        "INVALID": 0x80000003,
        "PLATFORM": 0x80000004,
        "TLS_REQD": 0x80000005,
        "UNKNOWN": 0x80000006,
        "SHUTDOWN": 0x80000007,
        "BLOCK_SIZE_REQD": 0x80000008,
        "TOO_BIG": 0x80000009,
        "EXT_HEADER_REQD": 0x8000000A,
    }
    assert (c.NBD_REP_ACK, c.NBD_REP_SERVER, c.NBD_REP_INFO, c.NBD_REP_META_CONTEXT) == (1, 2, 3, 4)
    assert numbers("NBD_INFO_") == {"EXPORT": 0, "NAME": 1, "DESCRIPTION": 2, "BLOCK_SIZE": 3}


def test_commands_and_flags_are_those_of_the_specification() -> None:
    commands = {k: v for k, v in numbers("NBD_CMD_").items() if not k.startswith("FLAG_")}
    assert list(commands.values()) == list(range(9))
    assert list(commands) == [
        *("READ", "WRITE", "DISC", "FLUSH", "TRIM", "CACHE"),
        *("WRITE_ZEROES", "BLOCK_STATUS", "RESIZE"),
    ]
    bits = {"FUA": 1, "NO_HOLE": 2, "DF": 4, "REQ_ONE": 8, "FAST_ZERO": 16, "PAYLOAD_LEN": 32}
    assert numbers("NBD_CMD_FLAG_") == bits
    assert c.FLEECENBD_CMD_FLAG_READ_ONCE == 0x8000
    assert [numbers("NBD_FLAG_")[name] for name in ("FIXED_NEWSTYLE", "NO_ZEROES")] == [1, 2]
    transmission = {
        "HAS_FLAGS": 0,
        "READ_ONLY": 1,
        "SEND_FLUSH": 2,
        "SEND_FUA": 3,
        "ROTATIONAL": 4,
        "SEND_TRIM": 5,
        "SEND_WRITE_ZEROES": 6,
        "SEND_DF": 7,
        "CAN_MULTI_CONN": 8,
        "SEND_RESIZE": 9,
        "SEND_CACHE": 10,
        "SEND_FAST_ZERO": 11,
        "BLOCK_STATUS_PAYLOAD": 12,
    }
    for name, bit in transmission.items():
        assert numbers("NBD_FLAG_")[name] == 1 << bit, name


def test_reply_types_and_states_are_those_of_the_specification() -> None:
    assert numbers("NBD_REPLY_TYPE_") == {
        "NONE": 0,
        "OFFSET_DATA": 1,
        "OFFSET_HOLE": 2,
        "BLOCK_STATUS": 5,
        "BLOCK_STATUS_EXT": 6,
        "ERROR": 0x8001,
        "ERROR_OFFSET": 0x8002,
    }
    assert c.NBD_REPLY_FLAG_DONE == 1
    assert numbers("NBD_STATE_") == {"HOLE": 1, "ZERO": 2}


def test_limits_keep_what_clients_need() -> None:
    assert c.NBD_STRING_MAX == 4096
    assert c.PAYLOAD_ADVERTISED == 32 << 20 <= c.PAYLOAD_MAX
    assert c.ERROR_TEXT_MAX + 4 + 2 + 8 <= 1000, "QEMU drops the connection over a longer chunk"
    assert c.EXTENTS_MAX <= 1 << 20
    assert c.EXTENT_LENGTH_MAX < 1 << 32
