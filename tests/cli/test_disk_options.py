"""--cache and --discard: what they say of each disk, and what a server then does."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import nbd
import pytest

from fleecenbd.cli.disk_options import DiskOptions, parse_disk_options
from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.values import parse_disks
from tests.cli.conftest import Fails
from tests.serving import FLEECENBD, Serving, connected, serving

SIZE = 1 << 20
DISKS = parse_disks(["vda=a.raw", "vdb=b.raw"])


def parsed(cache: str | None = None, *discard: str) -> DiskOptions:
    return parse_disk_options(cache, discard, DISKS)


def test_by_default_the_page_cache_is_used_and_discards_free_space() -> None:
    assert parsed() == parsed("writeback", "unmap")
    for disk in map(parsed().of, DISKS):
        assert not disk.direct
        assert disk.discards


@pytest.mark.parametrize(
    ("discard", "expected"),
    [
        (["ignore"], [False, False]),
        (["vdb=ignore"], [True, False]),
        (["ignore", "vda=unmap"], [True, False]),
        (["vda=unmap", "vdb=ignore"], [True, False]),
    ],
)
def test_discards_are_ignored_for_all_disks_or_for_one(
    discard: Sequence[str], expected: list[bool]
) -> None:
    options = parsed("none", *discard)
    assert [options.of(disk).discards for disk in DISKS] == expected
    assert all(options.of(disk).direct for disk in DISKS)


def test_a_disk_that_comes_later_gets_what_holds_for_all() -> None:
    (later,) = parse_disks(["vdc=c.raw"])
    assert not parsed(None, "ignore", "vda=unmap").of(later).discards
    assert parsed(None, "vda=ignore").of(later).discards


@pytest.mark.parametrize(
    ("discard", "message"),
    [
        (["off"], "--discard: 'off' is neither unmap nor ignore"),
        (["vda=off"], "'vda=off' is neither"),
        (["vda"], "'vda' is neither"),
        (["=ignore"], "no disk called ''; there will be vda, vdb"),
        (["vdc=ignore"], "no disk called 'vdc'; there will be vda, vdb"),
        (["ignore", "unmap"], "given twice for all disks"),
        (["vda=ignore", "vda=ignore"], "given twice for vda"),
    ],
)
def test_what_cannot_be_meant_is_refused(discard: Sequence[str], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        parsed(None, *discard)
    assert message in str(refused.value)


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vm.raw"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_a_wrong_word_is_one_line(fails: Fails, image: Path) -> None:
    assert "--discard: 'no' is neither" in fails("serve", image, "--discard", "no", status=2)
    assert "--cache" in fails("serve", image, "--cache", "directsync", status=2)


def test_tmpfs_is_refused_with_the_way_out(fails: Fails) -> None:
    path = Path(f"/dev/shm/fleecenbd-test-{os.getpid()}.raw")
    path.write_bytes(bytes(4096))
    try:
        line = fails("serve", f"vda={path}", "--cache", "none", "-U", "-")
    finally:
        path.unlink()
    assert line == (
        f"fleecenbd: cannot open disk vda: {path}: the file system takes no direct I/O (O_DIRECT), "
        "as tmpfs does not; serve it without --cache none, or from a disk"
    )


def test_the_help_tells_of_both() -> None:
    shown = subprocess.run(
        [FLEECENBD, "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    assert "--cache" in shown
    assert "[NAME=]unmap|ignore" in shown


def _is_direct(server: Serving, image: Path) -> bool:
    """Whether the server has the image open with O_DIRECT."""
    (flags,) = server.open_flags(image)
    return bool(flags & os.O_DIRECT)


def _add_disk(server: Serving, name: str, image: Path) -> None:
    control = f"{server.unix}.control"
    command = [FLEECENBD, "disk", "add", f"{name}={image}", "--control", control]
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def test_a_guest_and_a_backup_of_a_disk_past_the_page_cache(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    with (
        serving(tmp_path, image, "--cache", "none", "--begin", "n") as server,
        connected(server.uri("vm")) as guest,
        connected(server.uri("vm@n")) as backup,
    ):
        assert _is_direct(server, image)
        for offset in (0, 5, 4096, SIZE - 700):
            guest.pwrite(b"new" * 200, offset)
        assert guest.pread(600, 5) == b"new" * 200
        assert backup.pread(SIZE, 0) == before
        guest.flush()
        added = tmp_path / "added.raw"
        added.write_bytes(before)
        _add_disk(server, "added", added)
        assert _is_direct(server, added)
    assert image.read_bytes()[SIZE - 700 : SIZE - 100] == b"new" * 200


def test_without_the_option_an_image_goes_through_the_page_cache(
    tmp_path: Path, image: Path
) -> None:
    with serving(tmp_path, image) as server:
        assert not _is_direct(server, image)


def test_ignored_discards_free_nothing_and_succeed(tmp_path: Path, image: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(image.read_bytes())
    before = image.read_bytes()
    full = image.stat().st_blocks

    def discard(guest: nbd.NBD) -> None:
        guest.trim(SIZE // 2, 0)
        guest.zero(SIZE // 4, SIZE // 2)
        guest.flush()

    with serving(tmp_path, image, other, "--discard", "vm=ignore") as server:
        with connected(server.uri("vm")) as guest:
            discard(guest)
        assert image.read_bytes()[: SIZE // 2] == before[: SIZE // 2]
        assert image.read_bytes()[SIZE // 2 : SIZE // 4 * 3] == bytes(SIZE // 4)
        assert image.stat().st_blocks == full
        with connected(server.uri("other")) as guest:
            discard(guest)
        assert other.stat().st_blocks < full


def test_an_added_disk_has_the_server_s_discards(tmp_path: Path, image: Path) -> None:
    added = tmp_path / "added.raw"
    added.write_bytes(image.read_bytes())
    full = added.stat().st_blocks
    with serving(tmp_path, image, "--discard", "ignore") as server:
        _add_disk(server, "added", added)
        with connected(server.uri("added")) as guest:
            guest.trim(SIZE, 0)
            guest.flush()
        assert added.stat().st_blocks == full
    assert added.read_bytes() == image.read_bytes()
