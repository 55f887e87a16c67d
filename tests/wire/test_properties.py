"""The fuzzers' properties, in every test run: on the corpus that is kept, and on drawn bytes."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.nbd import wire
from tests.wire import framing, properties

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", ["handshake", "requests"])
def test_every_input_of_the_corpus_keeps_the_properties(name: str) -> None:
    files = sorted((CORPUS / name).iterdir())
    assert len(files) >= 10
    for path in files:
        try:
            getattr(properties, name)(path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{path.name}: {error!r}") from error


HEAD = st.binary(min_size=framing.HEAD, max_size=framing.HEAD)
OPTIONS = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 3, 5, 6, 7, 8, 9, 10, 11]) | st.integers(0, 255),
        st.integers(0, 3) | st.integers(0, 255),
        st.sampled_from(
            [b"", b"vm", b"vm@n", b"busy", b"vm|base:allocation", b"vm@n|x-fleecenbd:|base:"]
        )
        | st.binary(max_size=60),
    ),
    max_size=12,
).map(
    lambda records: b"".join(
        bytes((number, shape, len(data))) + data for number, shape, data in records
    )
)
REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 9),
        st.sampled_from([0, 0, 1, 2, 4, 8, 16, 32, 33, 1 << 15]) | st.integers(0, 0xFFFF),
        st.integers(0, 255),
        st.binary(max_size=40),
    ),
    max_size=12,
).map(
    lambda records: b"".join(
        bytes((command,)) + flags.to_bytes(2, "big") + bytes((offset, len(data))) + data
        for command, flags, offset, data in records
    )
)


@settings(deadline=None, max_examples=300)
@given(HEAD, OPTIONS | st.binary(max_size=300))
@example(b"\1\0\0", wire.client_flags() + wire.option(7, wire.info_data("vm", 3)) + b"left")
def test_any_bytes_of_a_handshake_keep_the_properties(head: bytes, rest: bytes) -> None:
    properties.handshake(head + rest)


@settings(deadline=None, max_examples=300)
@given(HEAD, REQUESTS | st.binary(max_size=300))
@example(b"\1\0\0", wire.request(wire.READ, 1, 0, 512) + wire.request(wire.DISC))
def test_any_bytes_of_requests_keep_the_properties(head: bytes, rest: bytes) -> None:
    properties.requests(head + rest)


PLANTED = {
    "a payload that is not consumed": b"\1\0\0"
    + wire.request(wire.WRITE, 1, 0, 4, payload=b"data"),
    "a request past the end": b"\1\0\0" + wire.request(wire.READ, 1, 1 << 20, 1),
    "a flag that nobody knows": b"\1\0\0" + wire.request(wire.READ, 1, 0, 1, flags=1 << 14),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_the_properties_notice_what_is_planted(
    planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties.requests(PLANTED[planted])
    if planted == "a payload that is not consumed":
        monkeypatch.setattr(
            properties.RequestDecoder, "_has_payload", lambda self, flags, command: False
        )
    else:
        monkeypatch.setattr(properties.RequestRules, "check", lambda self, request: None)
    with pytest.raises(AssertionError):
        properties.requests(PLANTED[planted])


def test_the_properties_notice_an_answer_that_depends_on_the_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = b"\1\0\0" + wire.client_flags() + wire.option(3) + wire.option(8)
    properties.handshake(stream)
    receive_data = properties.Handshake.receive_data

    def forgetful(self: properties.Handshake, data: bytes) -> bytes:
        return receive_data(self, data) if len(data) > 20 else b""

    monkeypatch.setattr(properties.Handshake, "receive_data", forgetful)
    with pytest.raises(AssertionError):
        properties.handshake(stream)
