"""Steps of a backup that come together once in a long while, one at a time."""

from __future__ import annotations

import asyncio
import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fleecenbd.cli import backup_places
from fleecenbd.cli.backing_up import Backup
from fleecenbd.cli.backup_owner import Owner
from fleecenbd.cli.backup_pairs import Pair, Pairs
from fleecenbd.cli.backup_places import Lock, Places, roll_all
from fleecenbd.cli.backup_work import Ask, Outcome, Work
from fleecenbd.cli.errors import CommandError
from fleecenbd.client import in_place, records
from fleecenbd.client.events import Done
from fleecenbd.engine.recording import NEW, USE
from tests.cli.sim_backup import DISKS, SimCopy, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, 1, Counter())


def _pairs(folder: Path, *disks: str, in_place: bool = False) -> Pairs:
    return Pairs([Pair(disk, f"{folder}/{disk}.raw") for disk in disks], is_in_place=in_place)


def _backup(world: World, places: Places, copy: SimCopy | None = None, **ask: Any) -> Backup:
    asked = Ask("backup", {}, **ask)
    return Backup(world, asked, places, copy or SimCopy(world, None))  # type: ignore[arg-type]


class _Interrupted(SimCopy):
    """Is interrupted each time it is complete, as ``pull`` forgets it."""

    def __init__(self, world: World, run: asyncio.Task[Outcome] | None) -> None:
        super().__init__(world, None)
        self.run = run
        self.copied: list[str] = []

    async def __call__(self, work: Work) -> Done:
        done = await super().__call__(work)
        self.copied.append(work.disk)
        assert self.run is not None
        self.run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        return done


@pytest.mark.parametrize("count", [1, 2])
async def test_who_interrupts_between_two_disks_ends_it(
    world: World, tmp_path: Path, count: int
) -> None:
    copy = _Interrupted(world, None)
    copy.run = asyncio.create_task(_backup(world, _pairs(tmp_path, *DISKS[:count]), copy).run())
    if count == 1:  # all of it is whole
        assert (await copy.run).result == "success"
        return
    with pytest.raises(asyncio.CancelledError):
        await copy.run
    assert copy.copied == ["vda"]
    assert not world.sessions
    assert os.listdir(tmp_path) == []


async def test_the_journal_of_a_pull_that_was_whole_is_no_part_of_the_backup(
    world: World, tmp_path: Path
) -> None:
    owner = Owner()
    session = world.begin("backup", {"owner": owner.name, "disks": ["vda"]})
    owner.close()
    staged = tmp_path / "vda.raw.backing-up"
    staged.write_bytes(world.disks["vda"])
    staged.with_name(f"{staged.name}.journal").touch()
    staged.with_name(f"{staged.name}.lock").write_text(session["id"])
    outcome = await _backup(world, _pairs(tmp_path, "vda"), resume=True).run()
    assert outcome.result == "success"
    assert set(os.listdir(tmp_path)) == {"vda.raw", "vda.raw.backup.json"}


async def _leaves_its_mark(world: World, folder: Path) -> None:
    """An increment in place, of which the run is killed before it goes there."""
    await _backup(world, _pairs(folder, "vda", in_place=True), bitmap="b", mode=NEW).run()
    world.write()
    places = _pairs(folder, "vda", in_place=True)

    def settle(*_: Any) -> None:
        raise OSError

    places.settle = settle  # type: ignore[method-assign]
    with pytest.raises(CommandError):
        await _backup(world, places, bitmap="b", mode=USE).run()
    assert in_place.is_pending(folder / "vda.raw")


async def test_what_another_run_is_about_to_put_into_its_place_is_left_to_it(
    world: World, tmp_path: Path
) -> None:
    await _leaves_its_mark(world, tmp_path)
    lock = Lock(tmp_path / "vda.raw.backing-up.lock", "to it")
    await _backup(world, _pairs(tmp_path, "vdb")).run()
    assert in_place.is_pending(tmp_path / "vda.raw")
    lock.close(remove=False)
    (tmp_path / "vdb.raw").unlink()
    await _backup(world, _pairs(tmp_path, "vdb")).run()
    assert not in_place.is_pending(tmp_path / "vda.raw")


async def test_who_interrupts_a_roll_forward_is_told_of_no_failure(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _leaves_its_mark(world, tmp_path)
    said: list[str] = []
    monkeypatch.setattr(backup_places.logs, "report", said.append)

    def step(_name: str) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        roll_all([tmp_path / "vda.raw"], step)
    assert said == []


@pytest.mark.parametrize("is_there", [True, False])
async def test_what_cannot_be_written_down_takes_no_other_backup_s_record(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    if is_there:
        await _backup(world, _pairs(tmp_path, *DISKS), bitmap="b", mode=NEW).run()
    before = sorted(os.listdir(tmp_path))
    kept = [records.of_file(tmp_path / f"{disk}.raw") for disk in DISKS]
    world.write()
    pairs = [Pair(disk, f"{tmp_path}/{disk}.raw") for disk in DISKS]
    real = records.write

    def write(path: Path, record: records.Record) -> None:
        if record.disks[0].disk == "vdb":
            raise OSError(errno.ENOSPC, "no space left", str(path))
        real(path, record)

    monkeypatch.setattr(records, "write", write)
    with pytest.raises(OSError, match="no space left"):
        await _backup(world, Pairs(pairs, force=True), bitmap="b", mode=NEW).run()
    assert sorted(os.listdir(tmp_path)) == before
    assert [records.of_file(tmp_path / f"{disk}.raw") for disk in DISKS] == kept
    assert not any(found and records.why_not_whole(found) for found in kept)


async def test_what_comes_to_have_a_target_s_name_meanwhile_is_not_written_over(
    world: World, tmp_path: Path
) -> None:
    class Copy(SimCopy):
        async def __call__(self, work: Work) -> Done:
            (tmp_path / "vda.raw").write_text("somebody else's")
            return await super().__call__(work)

    for force in (False, True):
        places = Pairs([Pair("vda", f"{tmp_path}/vda.raw")], force=force)
        run = _backup(world, places, Copy(world, None)).run()
        if force:
            assert (await run).result == "success"
            assert (tmp_path / "vda.raw").read_bytes() == world.disks["vda"]
        else:
            with pytest.raises(FileExistsError, match="has come to be there meanwhile"):
                await run
            assert (tmp_path / "vda.raw").read_text() == "somebody else's"
            assert os.listdir(tmp_path) == ["vda.raw"]
            assert not world.sessions
            (tmp_path / "vda.raw").unlink()


async def test_a_whole_backup_whose_session_cannot_be_finished_says_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = _pairs(tmp_path, "vda")

    def refuse(name: str, result: str) -> str:
        raise CommandError("the disk is full")

    said: list[str] = []
    monkeypatch.setattr("fleecenbd.cli.logs.report", said.append)
    monkeypatch.setattr(world, "finish", refuse)
    assert (await _backup(world, places).run()).error == "the disk is full"
    for resume in (False, True):
        run = _backup(world, _pairs(tmp_path, "vda"), resume=resume).run()
        if resume:
            assert (await run).error == "the disk is full"
        else:
            with pytest.raises(CommandError, match="could not be finished: the disk is full"):
                await run
    assert said == []
    assert os.listdir(tmp_path)
