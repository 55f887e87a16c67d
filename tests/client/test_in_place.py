"""An increment put into a full backup: ended at every step, and begun again, it comes out whole."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fleecenbd.client import in_place, records
from fleecenbd.client.records import BackedUp, BitmapUse, Record
from fleecenbd.engine.bitmap import Bitmap

GRANULARITY = 4096
SIZE = 40 * GRANULARITY + 1000


class Crash(BaseException):
    """The process ends here."""


class Fulls:
    """A full backup of one moment, and what has changed until another."""

    def __init__(self, folder: Path, seed: int = 1) -> None:
        dice = random.Random(seed)
        self.target = folder / "vda.raw"
        self.first = bytearray(dice.randbytes(SIZE))
        self.target.write_bytes(self.first)
        self.then = bytearray(self.first)
        self.changed = Bitmap(SIZE, GRANULARITY)
        side = bytearray(SIZE)
        for granule in (0, 1, 2, 7, 9, 10, 40):
            offset, length = self.changed.bytes_of(granule, granule + 1)
            data = bytes(length) if granule in (1, 9) else dice.randbytes(length)
            self.then[offset : offset + length] = data
            side[offset : offset + length] = data
            self.changed.set(offset, length)
        self.staged = in_place.staged_path(self.target)
        with self.staged.open("wb") as file:
            file.truncate(SIZE)
            for offset, length, is_set in self.changed.runs(0, SIZE):
                if is_set and any(side[offset : offset + length]):
                    file.seek(offset)
                    file.write(side[offset : offset + length])
        use = BitmapUse("chain", "bitmap-1", "id-1")
        entry = BackedUp("vda", SIZE, "vda.raw", "raw", "full", use)
        self.before = records.whole_file(self.target, entry)
        records.write(
            records.record_path(self.target), Record("id-1", "backup", 1.0, [self.before])
        )
        self.record = Record("id-2", "backup", 2.0, [entry])

    def mark(self, *stale: str) -> None:
        in_place.set_mark(self.target, self.record, self.before, self.changed, list(stale))

    def is_then(self) -> None:
        """Rolled forward, with nothing left over."""
        assert self.target.read_bytes() == self.then
        assert sorted(os.listdir(self.target.parent)) == ["vda.raw", "vda.raw.backup.json"]
        found = records.of_file(self.target)
        assert found is not None
        assert found.record.id == "id-2"
        assert records.why_not_whole(found) is None


def _crash_at(index: int) -> Callable[[str], None]:
    left = index

    def step(_name: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Crash

    return step


def _steps(tmp_path: Path) -> list[str]:
    names: list[str] = []
    (tmp_path / "counted").mkdir()
    fulls = Fulls(tmp_path / "counted")
    fulls.mark()
    in_place.roll_forward(fulls.target, names.append)
    return names


def test_the_changes_are_put_into_it_and_nothing_else_is_touched(tmp_path: Path) -> None:
    fulls = Fulls(tmp_path)
    assert in_place.roll_forward(fulls.target) is None, "without the mark nothing is done"
    assert fulls.target.read_bytes() == fulls.first
    (tmp_path / "vda.raw.blake2b").write_text("no longer true")
    fulls.mark("vda.raw.blake2b")
    assert in_place.pending_session(fulls.target) == "id-2"
    done = in_place.roll_forward(fulls.target)
    assert done is not None
    assert done.id == "id-2"
    fulls.is_then()
    assert in_place.roll_forward(fulls.target) is None


def test_ended_at_any_step_and_any_two_it_goes_on(tmp_path: Path) -> None:
    steps = _steps(tmp_path)
    assert steps[0] == "rename to .rolling"
    assert steps[-1] == "remove the mark"
    assert steps.count("write") == 4
    for first in range(len(steps)):
        for second in (None, *range(len(steps))):
            folder = tmp_path / f"{first}-{second}"
            folder.mkdir()
            fulls = Fulls(folder, seed=first)
            fulls.mark()
            for end in (first, second):
                if end is not None:
                    try:
                        in_place.roll_forward(fulls.target, _crash_at(end))
                    except Crash:
                        content = fulls.target.exists() and fulls.target.read_bytes()
                        # Under its own name it is never a mix.
                        assert content in (False, fulls.first, fulls.then)
            in_place.roll_forward(fulls.target)
            fulls.is_then()


def test_what_was_written_is_durable_before_anything_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def note(name: str, call: Callable[..., object], what: Callable[..., str]) -> None:
        def noted(*arguments: object, **named: object) -> object:
            done.append(f"{name} {what(*arguments)}")
            return call(*arguments, **named)

        monkeypatch.setattr(os, name, noted)

    def named(descriptor: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    fulls = Fulls(tmp_path)
    note("fsync", os.fsync, named)
    note("pwrite", os.pwrite, lambda descriptor, *_rest: named(descriptor))
    note("rename", os.rename, lambda old, new: f"{Path(old).name} {Path(new).name}")
    note("unlink", os.unlink, lambda path, **_rest: Path(path).name)
    fulls.mark()
    in_place.roll_forward(fulls.target)
    folder = f"fsync {tmp_path.name}"
    compact = [line for i, line in enumerate(done) if i == 0 or line != done[i - 1]]
    assert compact == [
        "pwrite vda.raw.roll-forward.new",
        "fsync vda.raw.roll-forward.new",
        "rename vda.raw.roll-forward.new vda.raw.roll-forward",
        folder,
        "rename vda.raw vda.raw.rolling",
        folder,
        "pwrite vda.raw.rolling",
        "fsync vda.raw.rolling",
        "pwrite vda.raw.backup.json.new",
        "fsync vda.raw.backup.json.new",
        "rename vda.raw.backup.json.new vda.raw.backup.json",
        folder,
        "rename vda.raw.rolling vda.raw",
        folder,
        "unlink vda.raw.backing-up",
        "unlink vda.raw.roll-forward",
        folder,
    ]


def _refused(target: Path, words: str) -> None:
    with pytest.raises(OSError, match=words) as caught:
        in_place.roll_forward(target)
    assert caught.value.filename is not None


def test_another_file_in_the_full_one_s_place_is_not_written_to(tmp_path: Path) -> None:
    fulls = Fulls(tmp_path)
    fulls.mark()
    fulls.target.write_bytes(bytes(SIZE))
    os.utime(fulls.target, ns=(1, 1))
    _refused(fulls.target, "cannot be rolled forward: .* was written to since")
    assert fulls.target.read_bytes() == bytes(SIZE)


def test_another_file_beside_a_half_rolled_one_is_left_alone(tmp_path: Path) -> None:
    fulls = Fulls(tmp_path)
    fulls.mark()
    with pytest.raises(Crash):
        in_place.roll_forward(fulls.target, _crash_at(3))
    fulls.target.write_bytes(b"another")
    _refused(fulls.target, "is there too")
    assert fulls.target.read_bytes() == b"another"
    fulls.target.unlink()
    in_place.roll_forward(fulls.target)
    fulls.is_then()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("vda.raw", "it is gone"),
        ("vda.raw.backing-up", "which has the changes"),
    ],
)
def test_what_is_gone_is_named(tmp_path: Path, what: str, words: str) -> None:
    fulls = Fulls(tmp_path)
    fulls.mark()
    (tmp_path / what).unlink()
    _refused(fulls.target, words)


def test_a_half_rolled_full_whose_mark_is_gone_is_named(tmp_path: Path) -> None:
    fulls = Fulls(tmp_path)
    fulls.target.rename(in_place.rolling_path(fulls.target))
    assert in_place.is_pending(fulls.target)
    _refused(fulls.target, "which says what is to be put into it")


def test_a_damaged_mark_is_not_believed(tmp_path: Path) -> None:
    fulls = Fulls(tmp_path)
    fulls.mark()
    mark = in_place.mark_path(fulls.target)
    content = bytearray(mark.read_bytes())
    content[len(content) // 2] ^= 1
    mark.write_bytes(content)
    _refused(fulls.target, "cannot be told: its checksum is another")
    mark.write_bytes(b"")
    _refused(fulls.target, "cannot be told")
    assert fulls.target.read_bytes() == fulls.first


def test_two_do_not_roll_it_at_once(tmp_path: Path) -> None:
    fulls = Fulls(tmp_path)
    fulls.mark()
    with in_place.mark_path(fulls.target).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another backup is rolling") as caught:
            in_place.roll_forward(fulls.target)
        assert caught.value.errno == errno.EBUSY
    in_place.roll_forward(fulls.target)
    fulls.is_then()
