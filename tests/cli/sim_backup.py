"""Backups over crashes, failures and interruptions at any step: the real command's flow and files,
against a server of a few lines that keeps disks, bitmaps and sessions as semantics.md says.

    python -m tests.cli.sim_backup [SEEDS] [FIRST]
    python -m tests.cli.sim_backup --planted        # prints the table of docs/testing.md

A crash ends the process at the next thing that it would do: a call to the server (before it, or
after it without its answer), a rename, an fsync, a removal, a write. Nothing that happens in this
process after it has an effect. Each run of a seed then goes on where the crash has left everything.

Looked at after every run: **M**, what has a name and a record restores to the disk as it was at the
moment of the record's session, that of a run that succeeded above all; and a full backup that is
brought up to date in place is there at any moment, or can be rolled forward. **N**, a run that
failed or was interrupted leaves no session and no file. **F**, a chain goes on whatever happened:
where nothing was removed, no full backup is needed again.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

from fleecenbd.cli import logs
from fleecenbd.cli.backing_up import Backup
from fleecenbd.cli.backup_nights import Nights
from fleecenbd.cli.backup_pairs import Pair, Pairs
from fleecenbd.cli.backup_places import Places
from fleecenbd.cli.backup_work import Ask, Outcome, Work
from fleecenbd.cli.errors import CommandError
from fleecenbd.client import in_place, records
from fleecenbd.client.events import Done
from fleecenbd.engine.bitmap import Bitmap
from fleecenbd.engine.recording import NEW, USE, USE_OR_NEW
from tests.cli.planted_backup import BACKUP_BUGS, BackupBug, planted

GRANULARITY = 4096
GRANULES = 6
SIZE = GRANULES * GRANULARITY - 96
DISKS = ("vda", "vdb")
RUNS = 16
HUNT_SEEDS = 80
HOOKED = ("rename", "fsync", "unlink", "mkdir", "rmdir", "pwrite", "ftruncate", "utime")


class Crash(BaseException):
    """The process ends here."""


class World:
    """The server, the disk that backups are on, and what happens to a run at which step."""

    def __init__(self, folder: Path, seed: int, met: Counter[str]) -> None:
        self.folder = folder
        self.dice = random.Random(f"backup {seed}")
        self.met = met
        self.disks = {name: bytearray(self.dice.randbytes(SIZE)) for name in DISKS}
        self.bitmaps: dict[tuple[str, str], dict[str, Any]] = {}
        self.sessions: dict[str, dict[str, Any]] = {}
        self.moments: dict[str, dict[str, bytes]] = {}
        """By session: the disks as they were."""
        self.succeeded: set[str] = set()
        self.ids = 0
        self.is_dead = False
        self.is_deaf = False
        """No answer any more."""
        self.left = -1
        """Events until something happens; below 0: nothing will."""
        self.happens: Callable[[], None] = lambda: None

    # -- what happens ----------------------------------------------------------------------

    def event(self) -> None:
        """The run is about to do something, or has had it done."""
        if self.is_dead:
            raise Crash
        if self.left == 0:
            self.happens()
        self.left -= 1

    def crash(self) -> None:
        self.is_dead = True
        raise Crash

    # -- the guest, and the server ---------------------------------------------------------

    def write(self) -> None:
        """The guest writes somewhere."""
        disk = self.dice.choice(DISKS)
        granule = self.dice.randrange(GRANULES)
        start = granule * GRANULARITY
        end = min(SIZE, start + GRANULARITY)
        zero = self.dice.random() < 0.2
        data = bytes(end - start) if zero else self.dice.randbytes(end - start)
        self.disks[disk][start:end] = data
        for (name, _), bitmap in self.bitmaps.items():
            if name == disk:
                bitmap["dirty"].add(granule)

    def _new_id(self) -> str:
        self.ids += 1
        return f"{self.ids:08d}-0000"

    async def call(
        self, method: str, *words: str, body: Any = None, result: str | None = None
    ) -> Any:
        """control_client.ControlClient.call."""
        self.event()
        await asyncio.sleep(0)
        if self.is_deaf:
            raise CommandError("no server is there")
        if words == ("jobs",):
            return {"jobs": []}
        if method == "GET":
            answer = self._look(words[0])
        elif method == "PUT":
            answer = self.begin(words[1], body)
        else:
            answer = {"result": self.finish(words[1], str(result))}
        copied = json.loads(json.dumps(answer))
        self.event()
        return copied

    def _look(self, what: str) -> Any:
        if what == "sessions":
            return {"sessions": [self._shown(one) for one in self.sessions.values()]}
        return {
            "disks": [
                {
                    "name": disk,
                    "size": SIZE,
                    "bitmaps": [
                        {"name": name, "id": one["id"], "state": "good", "since": one["since"]}
                        for (owner, name), one in self.bitmaps.items()
                        if owner == disk
                    ],
                }
                for disk in DISKS
            ]
        }

    def _shown(self, session: dict[str, Any]) -> dict[str, Any]:
        disks = [
            {
                "disk": disk,
                "export": f"{disk}@{session['name']}",
                "uris": ["nbd://"],
                "size": SIZE,
                "clients": [],
                "bitmap": None
                if own is None
                else {key: own[key] for key in ("name", "id", "mode", "since", "reason")}
                | {"granularity": GRANULARITY, "dirty": GRANULARITY * len(own["dirty"])},
            }
            for disk, own in session["own"].items()
        ]
        shown = {key: session[key] for key in ("name", "id", "owner", "state", "armed_at")}
        return {**shown, "reason": "broken", "warnings": [], "disks": disks}

    def begin(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """As PUT does."""
        if name in self.sessions:
            raise CommandError(f"there is a session called {name} already")
        bitmap_name, mode = body.get("bitmap"), body.get("bitmap_mode")
        own: dict[str, Any] = {}
        session_id = self._new_id()
        moment = {"session": name, "session_id": session_id, "armed_at": 0.0}
        for disk in body["disks"] or DISKS:
            own[disk] = None
            if bitmap_name is None:
                continue
            bitmap = self.bitmaps.get((disk, bitmap_name))
            done = mode
            if mode == USE_OR_NEW:
                done = NEW if bitmap is None or bitmap["since"] is None else USE
            if done == USE and bitmap is None:
                raise CommandError("no such bitmap")
            made = bitmap is None
            if bitmap is None:
                bitmap = {"id": self._new_id(), "since": None, "dirty": set()}
                self.bitmaps[disk, bitmap_name] = bitmap
            own[disk] = {
                "name": bitmap_name,
                "id": bitmap["id"],
                "mode": done,
                "since": bitmap["since"],
                "dirty": set(bitmap["dirty"]),
                "made": made,
                "reason": None,
            }
            bitmap["dirty"].clear()
            bitmap["since"] = moment
        self.moments[session_id] = {disk: bytes(self.disks[disk]) for disk in own}
        self.sessions[name] = session = {
            "name": name,
            "id": session_id,
            "owner": body["owner"],
            "state": "active",
            "armed_at": time.time(),
            "own": own,
        }
        return self._shown(session)

    def finish(self, name: str, result: str) -> str:
        """As DELETE does."""
        session = self.sessions.pop(name, None)
        if session is None:
            raise CommandError(f"there is no session {name}")
        if session["state"] == "broken":
            result = "failed"
        if result == "success":
            self.succeeded.add(session["id"])
        for disk, own in session["own"].items():
            if own is None or result == "success":
                continue
            if own["made"]:
                del self.bitmaps[disk, own["name"]]
            else:
                bitmap = self.bitmaps[disk, own["name"]]
                bitmap["dirty"] |= own["dirty"]
                bitmap["since"] = own["since"]
        return result

    # -- files ----------------------------------------------------------------------------

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Calls that change files are events."""

        def hook(name: str) -> Callable[..., Any]:
            real = getattr(os, name)

            def call(*arguments: Any, **named: Any) -> Any:
                self.event()
                # Nothing here outlives the machine: an fsync is an event and no more.
                return None if name == "fsync" else real(*arguments, **named)

            return call

        with ExitStack() as stack:
            for name in HOOKED:
                stack.enter_context(mock.patch.object(os, name, hook(name)))
            yield

    def restored(self, path: Path) -> bytes:
        """A backup as qemu-img would restore it: from the file and what it builds on."""
        found = records.of_file(path)
        assert found is not None, path
        if found.disk.format == "raw":
            return path.read_bytes()
        overlay = json.loads(path.read_text())
        below = bytearray(SIZE)
        if overlay["backing"] is not None:
            below[:] = self.restored(path.parent / overlay["backing"])
        for granule, data in overlay["granules"].items():
            start = int(granule) * GRANULARITY
            below[start : start + GRANULARITY] = bytes.fromhex(data)
        return bytes(below)


class SimCopy:
    """backup_work.CopyDisk: a file at once, after some steps; or a failure."""

    def __init__(self, world: World, failure: int | None) -> None:
        self._world = world
        self._failure = failure
        """The copy that fails, counted from 0."""

    def begins(self, works: Sequence[Work]) -> None:
        assert works

    async def changed(self, work: Work) -> Bitmap:
        self._world.event()
        bitmap = Bitmap(SIZE, GRANULARITY)
        session = self._world.sessions[work.session]
        for granule in session["own"][work.disk]["dirty"]:
            bitmap.bits[granule] = 1
        return bitmap

    async def __call__(self, work: Work) -> Done:
        world, staged = self._world, work.destination.staged
        assert staged is not None
        part, journal = Path(f"{staged}.part"), Path(f"{staged}.journal")
        world.event()
        work.has_started = True
        _make(part, journal, resume=work.is_resumed)
        world.event()
        await asyncio.sleep(0)
        if self._failure is not None:
            self._failure -= 1
            if self._failure < 0:
                raise OSError(errno.ENOSPC, "no space left", str(staged))
        self._fill(work, part)
        world.event()
        os.rename(part, staged)
        os.unlink(journal)
        return Done(1, 1, 1, 0.0, None, verified=False)

    def _fill(self, work: Work, part: Path) -> None:
        world = self._world
        session = world.sessions.get(work.session)
        if session is None or session["id"] != work.session_id or session["state"] != "active":
            raise OSError(errno.EIO, "the session broke")
        content = world.moments[work.session_id][work.disk]
        own = session["own"][work.disk]
        dirty = range(GRANULES) if not work.dirty_only else sorted(own["dirty"])
        pieces = {n: content[n * GRANULARITY : (n + 1) * GRANULARITY] for n in dirty}
        if work.destination.format == "raw":
            with part.open("wb") as file:
                file.truncate(SIZE)
                for granule, data in pieces.items():
                    if any(data):
                        file.seek(granule * GRANULARITY)
                        file.write(data)
        else:
            granules = {n: data.hex() for n, data in pieces.items()}
            backing = work.destination.backing
            part.write_text(json.dumps({"backing": backing, "granules": granules}))


class SimRun:
    """One seed: backups of several kinds into one folder, one after the other."""

    def __init__(self, folder: Path, seed: int, met: Counter[str]) -> None:
        self.world = World(folder, seed, met)
        self.met = met
        self.folder = folder
        self.nights = folder / "nights"
        self.nights.mkdir()
        self.count = 0
        self.in_place_begun: set[str] = set()
        self.chains: set[str] = set()
        """Bitmaps that a backup which can be built on was made with."""

    def run(self) -> None:
        """AssertionError says what was violated."""
        for _ in range(RUNS):
            for _ in range(self.world.dice.randrange(4)):
                self.world.write()
            if self.world.dice.random() < 0.1:
                self._prune()
            self._one()
            self._look_at_all()

    def _prune(self) -> None:
        """Somebody removes a backup: what builds on it must not be built on any more."""
        dice = self.world.dice
        nights = sorted(path for path in self.nights.iterdir() if path.name[0] != ".")
        chain = sorted(self.folder.glob("chain-*.qcow2"))
        if dice.random() < 0.5 and nights:
            shutil.rmtree(dice.choice(nights[-2:]))
            self.chains.discard("nights")
        elif chain:
            dice.choice(chain[-2:]).unlink()
            self.chains.discard("chain")

    def _places(self) -> tuple[Places, str | None, str]:
        """Where to, bitmap, mode."""
        dice = self.world.dice
        self.count += 1
        kind = dice.choice(["nights", "nights", "in place", "in place", "both in place", "chain"])
        if kind == "nights":
            return Nights(self.nights, None), "nights", USE_OR_NEW
        if kind == "chain":
            self._names = [f"chain-{self.count:02}.qcow2"]
            pair = Pair("vda", f"qcow2:{self.folder}/{self._names[0]}")
            return Pairs([pair]), "chain", dice.choice([NEW, USE_OR_NEW])
        disks = DISKS if kind == "both in place" else DISKS[:1]
        self._names = [f"{kind.split()[0]}-{disk}.raw" for disk in disks]
        pairs = [
            Pair(disk, f"{self.folder}/{name}")
            for disk, name in zip(disks, self._names, strict=True)
        ]
        return Pairs(pairs, is_in_place=True), kind.replace(" ", "-"), USE_OR_NEW

    def _one(self) -> None:
        world, dice = self.world, self.world.dice
        places, bitmap, mode = self._places()
        resume = bool(world.sessions) and dice.random() < 0.4
        if world.sessions and dice.random() < 0.15:
            world.finish("backup", "failed")  # by its time to live, while nobody was there
        ask = Ask("backup", {}, bitmap, mode, or_full=mode == USE_OR_NEW, resume=resume)
        before, left_before = set(world.moments), self._left(places)
        failure = dice.randrange(2) if dice.random() < 0.1 else None
        how = dice.choice(["", "", "crash", "crash", "crash", "interrupt", "break", "deaf"])
        world.is_dead = world.is_deaf = False
        world.left = dice.randrange(45) if how else -1
        outcome: Outcome | None = None
        error: BaseException | None = None

        async def work() -> Outcome:
            task = asyncio.current_task()
            assert task is not None
            loop = asyncio.get_running_loop()
            world.happens = {
                "": lambda: None,
                "crash": world.crash,
                "interrupt": lambda: self._interrupt(loop, task),
                "break": self._break,
                "deaf": self._deaf,
            }[how]
            backup = Backup(world, ask, places, SimCopy(world, failure))  # type: ignore[arg-type]
            return await backup.run()

        with world.hooked(), mock.patch.object(logs, "report"):
            try:
                outcome = asyncio.run(work())
            except (Crash, asyncio.CancelledError, CommandError, OSError) as caught:
                error = caught
        if world.is_dead:
            _let_go(places)
        happened = how if world.left < 0 else ""
        if outcome is not None:
            self.met["whole"] += 1
            self.met["in place"] += any(one.destination.in_place for one in outcome.works)
            self.met["increments"] += any(one.destination.previous for one in outcome.works)
            self.met["resumed"] += resume
            for path in outcome.files:
                self._check(path, outcome.session_id)
                assert not Path(f"{path}.journal").exists(), f"N: {path} has a pull's journal"
            self._look_at_chain(str(bitmap), mode, outcome)
        elif world.is_dead:
            self.met["crashes"] += 1
        elif happened != "deaf" and not resume:
            kind = "interrupted" if isinstance(error, asyncio.CancelledError) else "failed"
            self.met[kind] += 1
            own = [one for one in world.sessions.values() if one["id"] not in before]
            assert own == [], f"N: {error!r} has left its session"
            left = [path for path in self._left(places) if path not in left_before]
            assert left == [], f"N: {error!r} has left {left}"
        else:
            self.met["failed otherwise"] += 1

    def _interrupt(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        loop.call_soon_threadsafe(task.cancel)

    def _look_at_chain(self, bitmap: str, mode: str, outcome: Outcome) -> None:
        full = any(one.destination.previous is None for one in outcome.works)
        assert not (full and mode == USE_OR_NEW and bitmap in self.chains), (
            f"F: a full backup of {bitmap}, though nothing was lost"
        )
        if outcome.session_id in self.world.succeeded:  # else what it made is gone with it
            self.chains.add(bitmap)

    def _break(self) -> None:
        for session in self.world.sessions.values():
            session["state"] = "broken"

    def _deaf(self) -> None:
        """From now on the server does not answer this run."""

        self.world.is_deaf = True

    def _left(self, places: Places) -> list[Path]:
        """What is there that is no whole backup."""
        if isinstance(places, Nights):
            return list(self.nights.glob(".part"))
        return [
            path
            for name in self._names
            if not in_place.is_pending(self.folder / name)
            for suffix in (".backing-up*", ".*.new")
            for path in self.folder.glob(f"{name}{suffix}")
        ]

    def _check(self, path: Path, session_id: str) -> None:
        found = records.of_file(path)
        assert found is not None, path
        assert found.record.id == session_id, f"M: {path} is of {found.record.id}"
        why = records.why_not_whole(found)
        assert why is None, f"M: {why}"
        moment = self.world.moments[session_id][found.disk.disk]
        assert self.world.restored(path) == moment, f"M: {path} is not the disk at its moment"

    def _look_at_all(self) -> None:
        folders = [self.folder, *(one for one in self.nights.iterdir() if one.name[0] != ".")]
        for folder in folders:
            for found in records.in_folder(folder):
                path = found.path
                if in_place.is_pending(path) or records.why_not_whole(found) is not None:
                    continue
                self._check(path, found.record.id)
                self.met["looked at"] += 1
        for path in self.folder.glob("*.raw*"):
            target = _target_of(path)
            if in_place.is_pending(target):
                self.met["pending"] += 1
                self._check_pending(target)
            self.in_place_begun.add(target.name)
        for name in self.in_place_begun:
            target = self.folder / name
            written = records.of_file(target) is not None
            assert not written or target.exists() or self._can_come(target), (
                f"M: no {name} any more"
            )

    def _can_come(self, target: Path) -> bool:
        """It is a moment away: rolled forward, or given its name, by the next run."""
        return in_place.is_pending(target) or in_place.staged_path(target).exists()

    def _check_pending(self, target: Path) -> None:
        """What is pending can be rolled forward at any time, on a copy of it all."""
        copy = self.folder / "copy"
        copy.mkdir()
        for path in self.folder.glob(f"{target.name}*"):
            shutil.copy2(path, copy / path.name)
        try:
            record = in_place.roll_forward(copy / target.name)
        except OSError as error:
            raise AssertionError(f"M: {error}") from error
        assert record is not None
        self._check(copy / target.name, record.id)
        shutil.rmtree(copy)


def _let_go(places: Places) -> None:
    """The kernel does it when a process ends."""
    held = places._locks.values() if isinstance(places, Pairs) else [places._lock]  # type: ignore[attr-defined]
    for lock in held:
        if lock is not None:
            with suppress(OSError):
                os.close(lock._descriptor)


def _make(part: Path, journal: Path, *, resume: bool) -> None:
    assert resume or not part.exists(), "it would be refused"
    part.touch()
    journal.touch()


def _target_of(path: Path) -> Path:
    """The backup that a file beside it belongs to."""
    name = path.name
    for suffix in (".backing-up", ".roll-forward", ".rolling", ".backup.json"):
        name = name.partition(suffix)[0]
    return path.with_name(name)


def simulate(seeds: int, first: int) -> Counter[str]:
    """So many seeds; AssertionError says what was violated, by which."""
    met: Counter[str] = Counter()
    for seed in range(first, first + seeds):
        with tempfile.TemporaryDirectory(prefix="fleecenbd-sim-") as folder:
            try:
                SimRun(Path(folder), seed, met).run()
            except BaseException:
                print(f"seed {seed}: {dict(met)}")
                with suppress(OSError):
                    print("\n".join(sorted(str(path) for path in Path(folder).rglob("*"))))
                raise
    return met


def hunt(bug: BackupBug) -> tuple[int, str]:
    """After how many seeds it is caught, and by what; 0: not within HUNT_SEEDS."""
    with planted(bug), redirect_stdout(StringIO()):
        for seed in range(1, HUNT_SEEDS + 1):
            try:
                simulate(1, seed)
            except (AssertionError, OSError) as error:
                return seed, str(error).splitlines()[0]
    return 0, "nothing"


def main() -> None:
    """The long form."""
    if sys.argv[1:] == ["--planted"]:
        print(
            "| planted bug | in | checker | after backups |", "| --- | --- | --- | --- |", sep="\n"
        )
        for bug in BACKUP_BUGS:
            seeds, said = hunt(bug)
            print(f"| {bug.name} | {bug.module} | {said[0]} | {seeds} |")
        return
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    print(dict(simulate(seeds, first)))


if __name__ == "__main__":
    main()
