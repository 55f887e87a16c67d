"""A whole pull, from leftovers to the target's name, over fakes."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import sys
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleecenbd.client import copy_loop
from fleecenbd.client import pull as module
from fleecenbd.client.controls import Controls
from fleecenbd.client.endpoints import SourceLost, TargetLost
from fleecenbd.client.events import Done, Event, Failed, Note, OnEvent, Progress, Start
from fleecenbd.client.journal_file import DurableFile
from fleecenbd.client.options import PullOptions
from fleecenbd.client.plan import DIRTY
from fleecenbd.client.pull import ignore, pull
from fleecenbd.client.targets import open_target
from tests.client.fakes import UNIT, FakeSource, FakeTarget, FakeTargets

MIB = 1 << 20
URI = "nbd+unix:///vda@n?socket=/s"


def content(mib: int, *, seed: int = 1, extra: int = 0) -> bytes:
    """A MiB of data, one of zeroes, one with a bit of both, and so on."""
    dice = random.Random(seed)
    found = bytearray()
    for index in range(mib):
        if index % 3 == 0:
            found += dice.randbytes(MIB)
        elif index % 3 == 1:
            found += bytes(MIB)
        else:
            found += bytes(MIB // 2) + dice.randbytes(UNIT) + bytes(MIB // 2 - UNIT)
    return bytes(found + dice.randbytes(extra))


class Pulling:
    """One source and one target path, pulled as often as a test likes."""

    def __init__(self, path: Path, source: FakeSource) -> None:
        self.path = path
        self.uri = URI
        self.format = ""
        self.source = source
        self.events: list[Event] = []
        self.targets = FakeTargets()
        self.controls = Controls()
        self.look: OnEvent = ignore

    def _told(self, event: Event) -> None:
        self.events.append(event)
        self.look(event)

    async def __call__(self, **options: Any) -> Done:
        self.events.clear()
        return await pull(
            PullOptions(self.uri, f"{self.format}{self.path}", **{"progress_s": 0.01, **options}),
            self._told,
            controls=self.controls,
            open_source=self.source.open,
            open_target=self.targets.open,
        )

    async def fails(self, **options: Any) -> str:
        """What the pull that must fail says."""
        with pytest.raises(OSError, match=r".") as caught:
            await self(**options)
        (failed,) = (event for event in self.events if isinstance(event, Failed))
        assert caught.value.strerror is not None
        assert caught.value.strerror in failed.error
        return failed.error

    async def until_paused(self) -> asyncio.Task[Done]:
        """A pull that has begun, and reads nothing."""
        self.controls.pause()
        begun = asyncio.Event()
        self.look = lambda event: begun.set() if isinstance(event, Progress) else None
        task = asyncio.create_task(self())
        await begun.wait()
        return task

    def notes(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Note)]

    def leave(self, content: bytes) -> None:
        """A target that is not complete."""
        Path(f"{self.path}.part").write_bytes(content)

    def left(self) -> set[str]:
        """The names of files that are there."""
        return {path.name for path in self.path.parent.iterdir()}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_loop, "BATCH_S", 0.01)


@pytest.fixture
def pulling(tmp_path: Path) -> Pulling:
    return Pulling(tmp_path / "vm.raw", FakeSource(content(7, extra=777)))


def failing_at(offsets: Iterable[int], error: OSError) -> Any:
    """A hook that raises once an offset is one of these, or past the last."""
    first = min(offsets)

    def hook(offset: int) -> None:
        if offset >= first:
            raise error

    return hook


async def test_a_pull_copies_everything_and_releases_everything(pulling: Pulling) -> None:
    done = await pulling()
    assert pulling.path.read_bytes() == pulling.source.content
    assert pulling.left() == {"vm.raw"}
    assert sum(length for _, length in pulling.source.trims) == pulling.source.size
    assert done.durable == done.released == pulling.source.size
    assert done.read < 4 * MIB, "zeroes are not read"
    assert pulling.source.closed


async def test_its_events_begin_with_what_there_is_to_do_and_end_with_what_was_done(
    pulling: Pulling,
) -> None:
    done = await pulling()
    start, *between, last = pulling.events
    size = pulling.source.size
    assert start == Start(URI, str(pulling.path), "id-1", size, size, 0)
    assert last is done
    assert all(isinstance(event, Progress) for event in between)
    assert isinstance(between[-1], Progress)
    assert (between[-1].durable, between[-1].eta_s) == (size, 0.0)


async def test_a_target_that_holds_something_gets_its_zeroes_too(pulling: Pulling) -> None:
    def fill(target: FakeTarget) -> None:
        with open(target.part, "r+b") as part:
            part.write(b"x" * pulling.source.size)

    pulling.targets = FakeTargets(fill, is_zero=False)
    await pulling()
    assert pulling.path.read_bytes() == pulling.source.content


async def test_a_pull_that_fails_goes_on_where_it_was(pulling: Pulling) -> None:
    source = pulling.source
    source.before_read = failing_at([6 * MIB], OSError(errno.EIO, "vda@n: the disk hangs"))
    error = await pulling.fails(requests=1)
    assert error == "vda@n: the disk hangs"


async def test_what_is_durable_stays_for_resume_and_is_not_read_again(pulling: Pulling) -> None:
    source = pulling.source
    await _fail_half_way(pulling)
    assert pulling.left() == {"vm.raw.part", "vm.raw.journal"}
    (failed,) = (event for event in pulling.events if isinstance(event, Failed))
    assert failed.kept == f"{pulling.path}.part"
    assert source.released
    source.reads.clear()
    done = await pulling(resume=True)
    assert pulling.path.read_bytes() == source.content
    assert all(offset >= 3 * MIB for offset, _ in source.reads)
    assert pulling.left() == {"vm.raw"}
    start = pulling.events[0]
    assert isinstance(start, Start)
    assert start.resumed == 4 * MIB
    assert done.durable == source.size


async def _fail_half_way(pulling: Pulling, **options: Any) -> None:
    """Blocks 0 to 2, and the zeroes of block 4, become durable; then the source fails."""
    source, real = pulling.source, pulling.source.pread
    noted = asyncio.Event()

    async def pread(offset: int, length: int) -> Any:
        if offset < 3 * MIB:
            return await real(offset, length)
        await noted.wait()
        raise OSError(errno.EIO, "the disk hangs")

    trims = source.can_trim and options.get("trim", True)

    def look(event: Event) -> None:
        if isinstance(event, Progress):
            least = min(event.durable, event.released) if trims else event.durable
            if least == 4 * MIB:
                noted.set()

    source.pread = pread  # type: ignore[method-assign]
    pulling.look = look
    await pulling.fails(**options)
    source.pread = real  # type: ignore[method-assign]


async def test_a_pull_of_which_nothing_became_durable_leaves_nothing(pulling: Pulling) -> None:
    pulling.source.before_read = failing_at([0], OSError(errno.EIO, "broken"))
    await pulling.fails()
    assert pulling.left() == set()


async def test_a_pull_that_need_not_be_kept_leaves_nothing(pulling: Pulling) -> None:
    await _fail_half_way(pulling, keep=False)
    assert pulling.left() == set()


async def test_a_pull_that_nobody_needs_is_kept_where_who_started_it_has_gone(
    pulling: Pulling,
) -> None:
    pulling.controls.keeps = True
    await _fail_half_way(pulling, keep=False)
    assert pulling.left() == {"vm.raw.part", "vm.raw.journal"}


async def test_a_pull_that_has_not_ended_is_not_pulled_over(pulling: Pulling) -> None:
    await _fail_half_way(pulling)
    error = await pulling.fails()
    assert "a pull to it has not ended" in error
    assert "--resume" in error
    assert "--force" in error
    assert pulling.left() == {"vm.raw.part", "vm.raw.journal"}


async def test_force_begins_anew_where_everything_can_be_read(pulling: Pulling) -> None:
    await _fail_half_way(pulling)
    pulling.source = FakeSource(content(5, seed=2), session_id="id-2")
    await pulling(force=True)
    assert pulling.path.read_bytes() == pulling.source.content
    assert pulling.notes() == [
        "given up: 4194304 bytes of session id-1, which were pulled before; what of it was "
        "released can be read nowhere else"
    ]


async def test_force_does_not_give_up_what_the_same_session_can_never_read_again(
    pulling: Pulling,
) -> None:
    await _fail_half_way(pulling)
    error = await pulling.fails(force=True)
    assert "what is at 0 may not be read" in error
    assert pulling.left() == {"vm.raw.part", "vm.raw.journal"}
    await pulling(resume=True)
    assert pulling.path.read_bytes() == pulling.source.content


async def test_what_could_not_be_opened_over_a_pull_leaves_it_as_it_was(pulling: Pulling) -> None:
    await _fail_half_way(pulling)
    source, targets = pulling.source, pulling.targets
    pulling.source = FakeSource(content(5, seed=2), session_id="id-2")

    async def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "too small", "vm.raw")

    targets.open = refuse  # type: ignore[method-assign]
    assert await pulling.fails(force=True) == "vm.raw: too small"
    pulling.source, pulling.targets = source, FakeTargets()
    await pulling(resume=True)
    assert pulling.path.read_bytes() == source.content


async def test_a_disk_of_no_bytes_is_refused(pulling: Pulling) -> None:
    pulling.source = FakeSource(b"")
    assert "it has no bytes" in await pulling.fails()
    assert pulling.left() == set()


async def test_who_wants_one_session_gets_no_other(pulling: Pulling) -> None:
    error = await pulling.fails(session_id="id-0")
    assert "session id-1 answers there, and not id-0" in error
    assert pulling.source.trims == []
    assert pulling.left() == set()
    assert (await pulling(session_id="id-1")).durable == pulling.source.size


async def test_resume_refuses_another_session(pulling: Pulling) -> None:
    await _fail_half_way(pulling)
    pulling.source.session_id = "id-2"
    error = await pulling.fails(resume=True)
    assert "what is there is of session id-1" in error
    assert "this is session id-2: another moment's image" in error
    assert pulling.left() == {"vm.raw.part", "vm.raw.journal"}


async def test_resume_refuses_another_disk_of_the_same_moment(pulling: Pulling) -> None:
    await _fail_half_way(pulling)
    pulling.uri = "nbd+unix:///vdb@n?socket=/s"
    error = await pulling.fails(resume=True)
    assert "what is there is of vda@n, and this is vdb@n" in error
    assert pulling.left() == {"vm.raw.part", "vm.raw.journal"}
    pulling.uri = "nbd://host/vda%40n+once"
    await pulling(resume=True)
    assert pulling.path.read_bytes() == pulling.source.content


async def test_a_qcow2_file_is_not_resumed_as_a_raw_one(pulling: Pulling) -> None:
    pulling.targets.open = open_target  # type: ignore[method-assign]
    pulling.format = "qcow2:"
    await _fail_half_way(pulling)
    part = pulling.path.with_suffix(".raw.part")
    before = part.read_bytes()
    for other in ("", "raw:"):
        pulling.format = other
        assert "was begun as qcow2:" in await pulling.fails(resume=True)
    assert part.read_bytes() == before
    pulling.format = "qcow2:"
    await pulling(resume=True)
    assert pulling.left() == {"vm.raw"}


async def test_a_journal_is_of_one_target(pulling: Pulling) -> None:
    journal = str(pulling.path.with_name("j"))
    await _fail_half_way(pulling, journal=journal)
    begun = pulling.path
    pulling.path = begun.with_name("other.raw")
    pulling.path.with_suffix(".raw.part").touch()
    error = await pulling.fails(journal=journal, resume=True)
    assert f"{journal} tells what is durable in {begun}; name that" in error
    begun.with_suffix(".raw.part").rename(pulling.path.with_suffix(".raw.part"))
    await pulling(journal=journal, resume=True, force=True)
    assert pulling.path.read_bytes() == pulling.source.content


async def test_a_journal_does_not_take_the_place_of_a_file_that_is_none(
    pulling: Pulling, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.write_text("do not lose this\n")

    async def copies(*_: Any, **__: Any) -> Any:
        return FakeTarget(tmp_path / "device", pulling.source.size, resume=False)

    options = {"open_source": pulling.source.open, "open_target": copies}
    asked = PullOptions(URI, "nbd://host/t", journal=str(notes))
    with pytest.raises(OSError, match="is there, and is no pull's journal"):
        await pull(asked, **options)  # type: ignore[arg-type]
    assert notes.read_text() == "do not lose this\n"
    await pull(replace(asked, force=True), **options)  # type: ignore[arg-type]
    assert "complete" in notes.read_text()


async def test_what_was_begun_with_force_replaces_when_it_is_resumed(pulling: Pulling) -> None:
    pulling.path.write_bytes(b"old")
    await _fail_half_way(pulling, force=True)
    assert pulling.left() == {"vm.raw", "vm.raw.part", "vm.raw.journal"}
    await pulling(resume=True)
    assert pulling.path.read_bytes() == pulling.source.content


async def test_what_has_come_meanwhile_is_replaced_with_force_alone(pulling: Pulling) -> None:
    await _fail_half_way(pulling)
    pulling.path.write_bytes(b"new")
    assert "give --force" in await pulling.fails(resume=True)
    await pulling(resume=True, force=True)
    assert pulling.path.read_bytes() == pulling.source.content


async def test_resume_needs_something_to_resume(pulling: Pulling) -> None:
    error = await pulling.fails(resume=True)
    assert "nothing can be resumed: there is no" in error
    pulling.path.with_suffix(".raw.part").touch()
    error = await pulling.fails(resume=True)
    assert "vm.raw.part is there, and" in error
    assert "begin anew with --force" in error


async def test_a_source_without_a_session_is_resumed_on_the_user_s_word_only(
    pulling: Pulling,
) -> None:
    pulling.source = FakeSource(content(7), session_id=None, can_trim=False)
    await pulling()
    assert "is no fleecing export: it is copied as it is" in pulling.notes()[0]
    pulling.path.unlink()
    await _fail_half_way(pulling)
    assert "add --force" in await pulling.fails(resume=True)
    await pulling(resume=True, force=True)
    assert pulling.path.read_bytes() == pulling.source.content


async def test_what_is_nowhere_to_be_had_ends_a_resume_before_it_copies(pulling: Pulling) -> None:
    await _fail_half_way(pulling)
    pulling.source.released.add(5 * MIB // UNIT)
    error = await pulling.fails(resume=True)
    assert f"what is at {5 * MIB} was released by somebody else" in error
    assert "this backup cannot be completed" in error


async def test_a_backup_with_holes_is_refused(pulling: Pulling) -> None:
    pulling.source.released.add(3)
    error = await pulling.fails()
    assert "what is at 12288 may not be read: either the session reads only what changed" in error
    assert "a backup with holes" in error
    assert pulling.left() == set()


async def test_what_changed_takes_no_whole_disk_s_place(pulling: Pulling) -> None:
    pulling.source.contexts |= {f"{DIRTY}monday"}
    pulling.source.dirty = set(range(16, 32))
    await pulling(trim=False)
    error = await pulling.fails(bitmap="monday", force=True)
    assert "what changed in monday is no whole disk to take its place" in error
    assert pulling.path.read_bytes() == pulling.source.content


async def test_a_bitmap_copies_what_is_dirty_and_nothing_else(pulling: Pulling) -> None:
    source = pulling.source
    source.contexts |= {f"{DIRTY}monday"}
    source.dirty = set(range(16, 32)) | set(range(3 * 256, 3 * 256 + 300)) | {1790}
    source.released = set(range(1793)) - source.dirty
    pulling.targets = FakeTargets(is_zero=False)
    done = await pulling(bitmap="monday", checksum="blake2b")
    found = pulling.path.read_bytes()
    for unit in range(1793):
        span = slice(unit * UNIT, (unit + 1) * UNIT)
        expected = source.content[span] if unit in source.dirty else bytes(len(found[span]))
        assert found[span] == expected
    assert done.durable == len(source.dirty) * UNIT
    ranges = [line for line in _checksum(pulling).splitlines() if line.startswith("range")]
    assert ranges == [
        "range 65536 65536",
        f"range {3 * MIB} {300 * UNIT}",
        f"range {1790 * UNIT} 4096",
    ]


def _checksum(pulling: Pulling) -> str:
    return Path(f"{pulling.path}.blake2b").read_text()


async def test_changes_that_were_released_are_missed(pulling: Pulling) -> None:
    pulling.source.contexts |= {f"{DIRTY}monday"}
    pulling.source.dirty = set(range(9, 20))
    pulling.source.released = set(range(100)) - {9, 11, 12}
    error = await pulling.fails(bitmap="monday")
    assert "what is at 40960 has changed, and was released already" in error


async def test_an_export_without_the_bitmap_says_so(pulling: Pulling) -> None:
    assert "the export tells of no bitmap friday" in await pulling.fails(bitmap="friday")


async def test_no_trim_releases_nothing_and_says_nothing(pulling: Pulling) -> None:
    await pulling(trim=False)
    assert pulling.source.trims == []
    assert pulling.notes() == []


async def test_a_server_without_trim_is_told_of(pulling: Pulling) -> None:
    pulling.source.can_trim = False
    await pulling()
    assert pulling.source.trims == []
    (note,) = pulling.notes()
    assert "offers no TRIM: nothing is released" in note


async def test_a_source_that_tells_no_map_is_read_whole(pulling: Pulling) -> None:
    pulling.source.session_id, pulling.source.contexts = None, frozenset()
    pulling.source.can_trim = False
    done = await pulling()
    assert done.read == pulling.source.size
    assert pulling.path.read_bytes() == pulling.source.content


async def test_read_once_asks_for_the_export_that_releases_and_trims_nothing(
    pulling: Pulling,
) -> None:
    done = await pulling(read_once=True)
    assert done.released == done.read > 0
    assert pulling.source.uri == "nbd+unix:///vda@n+once?socket=/s"
    assert pulling.source.trims == []
    assert all(offset % (64 << 10) == 0 for offset, _ in pulling.source.reads)
    sizes = [length for offset, length in pulling.source.reads if offset + length < 7 * MIB]
    assert all(length % (64 << 10) == 0 for length in sizes)


async def test_clusters_that_no_read_covers_are_told(pulling: Pulling) -> None:
    pulling.source.cluster = 2 * MIB
    done = await pulling(read_once=True)
    assert done.released == 0
    (note,) = pulling.notes()
    assert "has clusters of 2 MiB, and 1 MiB is read at a time: nothing is released" in note


async def test_a_target_that_lost_writes_gets_them_again(pulling: Pulling) -> None:
    def prepare(target: FakeTarget) -> None:
        def once() -> None:
            target.before_flush = lambda: None
            os_truncate_all(target)
            raise TargetLost(errno.EIO, "connected anew")

        target.before_flush = once

    pulling.targets = FakeTargets(prepare)
    await pulling()
    assert pulling.path.read_bytes() == pulling.source.content
    assert any("was lost and is back" in note for note in pulling.notes())


def os_truncate_all(target: FakeTarget) -> None:
    """All that was written is gone."""
    size = target.part.stat().st_size
    with open(target.part, "r+b") as part:
        part.truncate(0)
        part.truncate(size)


async def test_a_target_that_is_lost_all_the_time_ends_the_pull(pulling: Pulling) -> None:
    def prepare(target: FakeTarget) -> None:
        def lose() -> None:
            raise TargetLost(errno.EIO, "connected anew")

        target.before_flush = lose

    pulling.targets = FakeTargets(prepare)
    error = await pulling.fails()
    assert "it was lost 6 times, and nothing became durable in between: connected anew" in error


async def test_a_full_target_says_how_much_is_missing(pulling: Pulling) -> None:
    def prepare(target: FakeTarget) -> None:
        target.before_write = failing_at([0], OSError(errno.ENOSPC, "No space left on device"))

    pulling.targets = FakeTargets(prepare)
    error = await pulling.fails()
    assert "No space left on device; about " in error
    assert " bytes are still to be written, and " in error
    assert error.endswith("are missing; make room")


async def test_a_trim_that_fails_is_told_once_and_ends_nothing(pulling: Pulling) -> None:
    async def trim(offset: int, length: int) -> None:
        raise OSError(errno.EIO, "the temp image cannot be punched")

    pulling.source.trim = trim  # type: ignore[method-assign]
    done = await pulling()
    assert done.released == 0
    (note,) = pulling.notes()
    assert note.endswith("the temp image cannot be punched; they are safe here")


async def test_a_session_that_is_gone_ends_the_pull_while_it_is_needed(pulling: Pulling) -> None:
    source = pulling.source

    async def trim(offset: int, length: int) -> None:
        raise SourceLost(errno.ESHUTDOWN, "session n was finished")

    source.trim = trim  # type: ignore[method-assign]
    real = source.pread

    async def pread(offset: int, length: int) -> Any:
        if offset >= 3 * MIB:
            await asyncio.Event().wait()
        return await real(offset, length)

    source.pread = pread  # type: ignore[method-assign]
    assert await pulling.fails() == "session n was finished"


async def test_a_cancelled_pull_makes_durable_what_it_has_and_can_be_resumed(
    pulling: Pulling, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, real = pulling.source, pulling.source.pread
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def pread(offset: int, length: int) -> Any:
        if offset >= 6 * MIB:
            arrived.set()
            await go_on.wait()
        return await real(offset, length)

    source.pread = pread  # type: ignore[method-assign]
    monkeypatch.setattr(copy_loop, "BATCH_S", 1000.0)
    monkeypatch.setattr(module, "IN_FLIGHT_LENGTH_MAX", MIB)
    task = asyncio.create_task(pulling())
    await arrived.wait()
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pulling.events[-1] == Failed("interrupted", f"{pulling.path}.part")
    assert len(source.trims) == 1, "what is durable is released, too"
    source.reads.clear()
    await pulling(resume=True)
    assert pulling.path.read_bytes() == source.content
    assert all(offset >= 7 * MIB for offset, _ in source.reads)


async def test_what_is_cancelled_while_it_gets_its_name_is_complete(pulling: Pulling) -> None:
    arrived, go_on = asyncio.Event(), asyncio.Event()

    def prepare(target: FakeTarget) -> None:
        real = target.complete

        async def complete() -> None:
            arrived.set()
            await go_on.wait()
            await real()

        target.complete = complete  # type: ignore[method-assign]

    pulling.targets = FakeTargets(prepare)
    task = asyncio.create_task(pulling())
    await arrived.wait()
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    assert (await task).durable == pulling.source.size
    assert pulling.left() == {"vm.raw"}


async def test_what_is_cancelled_while_it_hangs_up_is_complete(pulling: Pulling) -> None:
    arrived = asyncio.Event()

    async def close() -> None:
        arrived.set()
        await asyncio.Event().wait()

    pulling.source.close = close  # type: ignore[method-assign]
    task = asyncio.create_task(pulling())
    await arrived.wait()
    task.cancel()
    done = await task
    assert pulling.events[-1] is done
    assert pulling.left() == {"vm.raw"}
    assert not task.cancelling()


async def test_who_is_cancelled_while_the_journal_is_begun_leaves_none(
    pulling: Pulling, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    arrived, go_on = asyncio.Event(), threading.Event()
    real = DurableFile._replace

    def slow(file: DurableFile, data: bytes) -> None:
        loop.call_soon_threadsafe(arrived.set)
        assert go_on.wait(30)
        real(file, data)

    monkeypatch.setattr(DurableFile, "_replace", slow)
    task = asyncio.create_task(pulling())
    await arrived.wait()
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pulling.left() == set()


async def test_trims_that_hang_do_not_keep_the_target_from_being_complete(
    pulling: Pulling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_loop, "RELEASE_TIMEOUT_S", 0.05)

    async def trim(offset: int, length: int) -> None:
        await asyncio.Event().wait()

    pulling.source.trim = trim  # type: ignore[method-assign]
    done = await pulling()
    assert done.released == 0
    (note,) = pulling.notes()
    assert "the server has not answered the last TRIMs for 0.05 s" in note


async def test_a_pull_that_is_cancelled_twice_ends_at_once(
    pulling: Pulling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_loop, "BATCH_S", 1000.0)  # nothing is durable, zeroes neither
    pulling.source.hold.clear()
    task = asyncio.create_task(pulling())
    await pulling.source.asked.wait()
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pulling.left() == set()


async def test_a_paused_pull_reads_nothing_until_it_may(pulling: Pulling) -> None:
    task = await pulling.until_paused()
    assert pulling.source.reads == []
    progress = pulling.events[-1]
    assert isinstance(progress, Progress)
    assert progress.paused
    pulling.controls.resume()
    await task
    assert pulling.path.read_bytes() == pulling.source.content


async def test_a_pull_that_is_paused_under_a_limit_reads_nothing_either(pulling: Pulling) -> None:
    source, looks = pulling.source, asyncio.Queue[None]()
    paused = False

    def pause(_offset: int) -> None:
        nonlocal paused
        paused = True
        pulling.controls.pause()

    source.before_read = pause
    pulling.look = lambda event: looks.put_nowait(None) if paused else None
    pulling.controls.set_rate(4.0 * MIB)  # a READ in a sixteenth of a second
    task = asyncio.create_task(pulling())
    for _ in range(30):
        await looks.get()
    assert len(source.reads) == 1
    source.before_read = lambda _offset: None
    pulling.controls.set_rate(None)
    pulling.controls.resume()
    await task
    assert pulling.path.read_bytes() == source.content


async def test_the_temp_image_is_looked_at_where_the_server_tells(pulling: Pulling) -> None:
    pulling.source.in_temp = set(range(10))
    done = await pulling()
    assert done.temp_peak == 10 * UNIT
    assert any(isinstance(e, Progress) and e.temp_bytes == 10 * UNIT for e in pulling.events)
    pulling.path.unlink()
    pulling.source.released.clear()
    assert (await pulling(watch_temp=False)).temp_peak is None


def _reads_back_wrong(target: FakeTarget) -> None:
    real = target.pread

    async def pread(offset: int, length: int) -> Any:
        data = bytearray(await real(offset, length))
        if offset in (3 * MIB, 5 * MIB):
            data[77] ^= 1
        return data

    target.pread = pread  # type: ignore[method-assign]


async def test_verify_names_the_place_that_differs_and_keeps_the_part(pulling: Pulling) -> None:
    pulling.targets = FakeTargets(_reads_back_wrong)
    error = await pulling.fails(verify=True)
    assert f"it differs first in the MiB that begins at {3 * MIB}, and in 1 others" in error
    assert any("cannot be copied again: --resume compares once more" in n for n in pulling.notes())
    assert pulling.left() == {"vm.raw.part", "vm.raw.journal"}
    assert "and in 1 others" in await pulling.fails(verify=True, resume=True)
    pulling.targets = FakeTargets()
    assert (await pulling(verify=True, resume=True)).verified
    assert pulling.left() == {"vm.raw"}


async def test_what_was_begun_with_verify_is_not_complete_without(pulling: Pulling) -> None:
    pulling.targets = FakeTargets(_reads_back_wrong)
    await pulling.fails(verify=True)
    assert "read back, it is not what was written" in await pulling.fails(resume=True)
    assert any("it was begun with --verify" in note for note in pulling.notes())
    assert not pulling.path.exists()


async def test_what_differs_is_copied_again_where_nothing_was_released(pulling: Pulling) -> None:
    pulling.targets = FakeTargets(lambda target: _writes_wrong(target, 3 * MIB))
    await pulling.fails(verify=True, trim=False)
    assert not any("cannot be copied again" in note for note in pulling.notes())
    pulling.targets = FakeTargets(is_zero=False)
    pulling.source.reads.clear()
    assert (await pulling(resume=True, trim=False)).verified
    assert {offset // MIB for offset, _ in pulling.source.reads} == {3}
    assert pulling.path.read_bytes() == pulling.source.content


def _writes_wrong(target: FakeTarget, at: int) -> None:
    real = target.pwrite

    async def pwrite(offset: int, data: Any) -> None:
        if offset <= at < offset + len(data):
            data = bytearray(data)
            data[at - offset] ^= 1
        await real(offset, data)

    target.pwrite = pwrite  # type: ignore[method-assign]


async def test_a_checksum_that_was_asked_for_is_written_after_a_resume(pulling: Pulling) -> None:
    await _fail_half_way(pulling, checksum="sha256")
    assert (await pulling(resume=True)).checksum is not None
    assert any("begun with --checksum sha256" in note for note in pulling.notes())
    assert pulling.left() == {"vm.raw", "vm.raw.sha256"}


async def test_verify_is_taken_up_with_the_checksums_there_are(pulling: Pulling) -> None:
    await _fail_half_way(pulling, checksum="sha256")
    assert "has sha256 checksums" in await pulling.fails(resume=True, checksum="md5")
    assert (await pulling(resume=True, verify=True)).verified


async def test_an_old_checksum_does_not_outlive_its_file(pulling: Pulling) -> None:
    await pulling(checksum="blake2b")
    other = pulling.path.with_name("vm.raw.sha1")
    other.write_text("not ours\n")
    pulling.source.released.clear()
    await pulling(force=True)
    assert pulling.left() == {"vm.raw", "vm.raw.sha1"}


async def test_a_target_that_was_half_made_is_made_anew(pulling: Pulling) -> None:
    """A kill may come while it is made: by qemu-img, say."""

    def killed(target: FakeTarget) -> None:
        os.close(target.descriptor)
        raise KilledError

    pulling.targets = FakeTargets(killed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DurableFile, "replace", _leaving(DurableFile.replace))
        patch.setattr(DurableFile, "remove", _leaving(DurableFile.remove))
        with pytest.raises(KilledError):
            await pulling()
    pulling.leave(bytes(MIB) + b"half")  # where there are zeroes
    pulling.targets = FakeTargets()
    await pulling(resume=True)
    assert pulling.path.read_bytes() == pulling.source.content


class KilledError(BaseException):
    """The process is gone."""


def _leaving(real: Any) -> Any:
    """A call of a process that was killed does nothing."""

    async def call(self: DurableFile, *words: bytes) -> None:
        if not isinstance(sys.exc_info()[1], KilledError):
            await real(self, *words)

    return call


async def test_no_journal_is_made_beside_somebody_else_s_part(pulling: Pulling) -> None:
    """A kill just then would make it this pull's."""
    pulling.leave(b"theirs")
    pulling.targets = FakeTargets(lambda target: pytest.fail("it was opened"))
    assert "is there, from another pull" in await pulling.fails()
    assert pulling.left() == {"vm.raw.part"}


async def test_a_pull_without_checksums_is_not_resumed_with_them(pulling: Pulling) -> None:
    await _fail_half_way(pulling)
    error = await pulling.fails(resume=True, checksum="sha256")
    assert "was begun without --checksum and --verify" in error
    await pulling(resume=True)


async def test_the_checksum_outlasts_a_resume(pulling: Pulling) -> None:
    done = await pulling(checksum="sha256")
    pulling.path.unlink()
    pulling.source.released.clear()
    pulling.source.trims.clear()
    await _fail_half_way(pulling, checksum="sha256")
    again = await pulling(checksum="sha256", resume=True)
    assert again.checksum == done.checksum
    assert again.checksum is not None


async def test_an_unknown_checksum_names_those_there_are(pulling: Pulling) -> None:
    error = await pulling.fails(checksum="crc7")
    assert error.startswith("there is no checksum 'crc7'; choose one of blake2b, blake2s,")


async def test_two_pulls_to_one_target_do_not_meet(pulling: Pulling) -> None:
    task = await pulling.until_paused()
    other = Pulling(pulling.path, pulling.source)
    assert "another pull is at work on this target" in await other.fails(resume=True)
    pulling.controls.resume()
    await task
