"""Disks, names, sizes, modes and groups, as they are typed."""

import grp
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecenbd.cli import values
from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.values import (
    DiskSpec,
    check_name,
    parse_disk,
    parse_disks,
    parse_group,
    parse_mode,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("vm.raw", DiskSpec("vm", "vm.raw")),
        ("/images/vm.raw", DiskSpec("vm", "/images/vm.raw")),
        ("/dev/vg/vm1", DiskSpec("vm1", "/dev/vg/vm1")),
        ("vda=/dev/vg/vm1", DiskSpec("vda", "/dev/vg/vm1")),
        ("vda=data.raw", DiskSpec("vda", "data.raw")),
        ("a.b_c-1=x", DiskSpec("a.b_c-1", "x")),
        ("data.2026.raw", DiskSpec("data.2026", "data.2026.raw")),
        ("/a=b/vm.raw", DiskSpec("vm", "/a=b/vm.raw")),
        ("vda=a=b", DiskSpec("vda", "a=b")),
        ("raw:vm.img", DiskSpec("vm", "vm.img", raw=True)),
        ("vda=raw:vm.img", DiskSpec("vda", "vm.img", raw=True)),
        ("qcow2:/i/vm.qcow2", DiskSpec("vm", "/i/vm.qcow2", kind="qcow2")),
        ("vda=qcow2:a=b", DiskSpec("vda", "a=b", kind="qcow2")),
        ("nbd://h/vm1", DiskSpec("vm1", "nbd://h/vm1", kind="nbd")),
        ("vda=nbds://h:1/a%20b", DiskSpec("vda", "nbds://h:1/a%20b", kind="nbd")),
        (
            "nbd+unix:///vm%2E1?socket=/s",
            DiskSpec("vm.1", "nbd+unix:///vm%2E1?socket=/s", kind="nbd"),
        ),
    ],
)
def test_a_disk_is_a_name_and_an_image(text: str, disk: DiskSpec) -> None:
    assert parse_disk(text) == disk


@pytest.mark.parametrize("text", ["./a=b", "my disk.raw", "vm@x.raw", "./raw:vm.img", "ä.raw"])
def test_an_image_whose_stem_is_no_name_asks_for_one(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_disk(text)
    message = str(caught.value)
    assert message.startswith(f"{text}: ")
    assert message.endswith(f"write NAME={text}")
    assert "1 to 100 letters, digits, '.', '_' and '-'" in message
    assert parse_disk(f"vda={text}") == DiskSpec("vda", text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a@b=vm.raw", "a@b=vm.raw: 'a@b' before the '=' cannot be a disk's name"),
        ("a@b=vm.raw", "where a@b=vm.raw is the file, write NAME=a@b=vm.raw"),
        ("=vm.raw", "=vm.raw: '' before the '=' cannot be a disk's name"),
        ("a/b=vm.raw", "'a/b' is no NAME, for it has a '/'"),
        ("a/b=vm.raw", "write NAME=a/b=vm.raw, where a/b=vm.raw is the file"),
        ("raw:x=vm.raw", "raw: goes before the path, after NAME=: write x=raw:vm.raw"),
        ("raw:x=vm.raw", "or NAME=raw:x=vm.raw where x=vm.raw is the file"),
        ("a=nbd://h:99999/vm", "a=nbd://h:99999/vm: Port out of range"),
        ("a=nbd://h:port/vm", "a=nbd://h:port/vm: Port could not be cast"),
        ("a=nbd://[h/vm", "a=nbd://[h/vm: Invalid IPv6 URL"),
        ("nbd://h", "nbd://h: its export's name, '', cannot be a disk's"),
        ("nbd+unix:///a%20b?socket=/s", "write NAME=nbd+unix:///a%20b?socket=/s"),
        ("qcow2:", "'qcow2:' names no image"),
        ("http://x/y.raw", "http://x/y.raw: disks cannot be served from http://"),
        ("vda=https://x/y.raw", "vda=https://x/y.raw: disks cannot be served from https://"),
    ],
)
def test_what_is_wrong_with_a_disk_is_told_in_the_words_that_were_typed(
    text: str, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_disk(text)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "raw:", "vda=", "vda=raw:"])
def test_a_disk_without_an_image_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no image"):
        parse_disk(text)


@pytest.mark.parametrize("text", ["..=x", ".=x", "a" * 101 + "=x"])
def test_a_given_name_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot be a disk's name"):
        parse_disk(text)


def test_several_disks_keep_their_order() -> None:
    disks = parse_disks(["vdb=b", "vda=a"])
    assert [disk.name for disk in disks] == ["vdb", "vda"]


def test_two_disks_of_one_name_are_refused_with_both_images() -> None:
    with pytest.raises(UsageError, match="NAME=IMAGE") as caught:
        parse_disks(["vm=x.raw", "other=z.raw", "/y/vm.raw"])
    for word in ("vm", "x.raw", "/y/vm.raw"):
        assert word in str(caught.value)


@given(st.text(max_size=120))
def test_whatever_is_typed_as_a_disk_gives_a_name_that_is_one_or_is_refused(text: str) -> None:
    try:
        disk = parse_disk(text)
    except UsageError:
        return
    assert re.fullmatch("[A-Za-z0-9._-]{1,100}", disk.name)
    assert text.endswith(disk.path)


@pytest.mark.parametrize("name", ["nightly", "2026-11-22", "a.b_c", "n"])
def test_a_session_s_name_is_made_of_letters_digits_and_three_signs(name: str) -> None:
    assert check_name(name, "a session") == name


@pytest.mark.parametrize("name", ["", "a+b", "a@b", "a/b", "a b", "..", "n\n", "é"])
def test_another_session_s_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="a session's name"):
        check_name(name, "a session")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64k", 64 << 10),
        ("64K", 64 << 10),
        ("64KiB", 64 << 10),
        ("1MiB", 1 << 20),
        ("10G", 10 << 30),
        ("10g", 10 << 30),
        ("2T", 2 << 40),
        ("1PiB", 1 << 50),
    ],
)
def test_a_size_is_a_number_with_a_unit_of_1024(text: str, size: int) -> None:
    assert parse_size(text, "--temp-limit") == size


@pytest.mark.parametrize("text", ["", "k", "1.5G", "-1", "64kb", "1MB", "1 k", "0x10", "1X", "٣"])
def test_what_is_no_size_is_refused_with_the_option_s_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"--temp-limit.*is no size"):
        parse_size(text, "--temp-limit")


@pytest.mark.parametrize("text", [str(1 << 63), "8192P", "9" * 10000])
def test_a_size_beyond_all_disks_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="more than any disk"):
        parse_size(text, "--temp-limit")


@pytest.mark.parametrize(("text", "mode"), [("660", 0o660), ("0600", 0o600), ("0o666", 0o666)])
def test_a_mode_is_octal(text: str, mode: int) -> None:
    assert parse_mode(text) == mode


@pytest.mark.parametrize("text", ["", "6", "rw", "888", "1660", "-660", "0x660"])
def test_what_is_no_mode_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--socket-mode"):
        parse_mode(text)


def test_a_group_is_given_by_name_or_by_number() -> None:
    known = grp.getgrall()[0]
    assert parse_group(known.gr_name) == known.gr_gid
    assert parse_group("12345") == 12345


@pytest.mark.parametrize("text", ["", "no-such-group", "a\0b"])
def test_an_unknown_group_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--socket-group"):
        parse_group(text)


@pytest.mark.parametrize(("text", "seconds"), [("1", 1.0), ("0.5", 0.5), ("86400", 86400.0)])
def test_a_period_is_more_than_no_time(text: str, seconds: float) -> None:
    assert values.parse_period(text, "--ttl") == seconds


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e10", "", "1m"])
def test_what_is_no_period_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--ttl: .* is no time"):
        values.parse_period(text, "--ttl")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9100", ("127.0.0.1", 9100)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert values.parse_address(text, "--metrics") == address


@pytest.mark.parametrize("text", ["9100", ":9100", "::1:9100", "host:", "host:x", "[::1]", ""])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--metrics: "):
        values.parse_address(text, "--metrics")
