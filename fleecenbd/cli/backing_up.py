"""``fleecenbd backup`` from its first look to its last word.

    what a killed run left ▶ what is possible ▶ begin ▶ copy disk by disk ▶ write down ▶ finish
                                                  └──── whatever fails ────▶ finish --failed, clean

The session is finished as a success once every disk is whole, durable and written down (the record,
or the mark of an increment in place): from then on the backup counts whatever happens. Before, all
that was made goes, and the server gives the changes back to the bitmap: nothing is forgotten.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

from fleecenbd.cli import logs
from fleecenbd.cli.backup_places import Places, entry_of
from fleecenbd.cli.backup_sessions import (
    FAILED,
    SUCCESS,
    BackupSession,
    tell_warnings,
    to_its_end,
)
from fleecenbd.cli.backup_work import Ask, CopyDisk, Outcome, Work
from fleecenbd.cli.control_client import ControlClient
from fleecenbd.cli.errors import CommandError
from fleecenbd.client.events import Done
from fleecenbd.client.options import JOURNAL_SUFFIX
from fleecenbd.client.records import Found, Record, RecordedChecksum
from fleecenbd.client.telling import text_of
from fleecenbd.engine.recording import NEW, USE


class NoPredecessor(CommandError):
    """There is nothing that the changes could be put on."""


class Left(Exception):  # no error
    """What a killed run had made was whole, and that is all that was asked for."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


class Backup:
    """One run."""

    def __init__(
        self,
        client: ControlClient,
        ask: Ask,
        places: Places,
        copy_disk: CopyDisk,
    ) -> None:
        self._client = client
        self._ask = ask
        self._places = places
        self._copy = copy_disk
        self._session = BackupSession(client, ask.session)
        self._works: list[Work] = []

    async def run(self) -> Outcome:
        """Raises CommandError or OSError, after everything was cleaned up."""
        started = time.monotonic()
        try:
            await self._in_thread(self._places.enter)
            try:
                outcome = await self._run()
            except Left as left:
                outcome = left.outcome
        finally:
            self._session.close()
            self._places.leave()
        outcome.elapsed_s = time.monotonic() - started
        return outcome

    async def _in_thread(self, work: Callable[[Callable[[str], None]], None]) -> None:
        """Work that may roll a backup forward, which can take its time; cancelled, it stays
        pending."""
        ending = Event()

        def step(_name: str) -> None:
            if ending.is_set():
                raise InterruptedError

        task = asyncio.ensure_future(asyncio.to_thread(work, step))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            ending.set()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()
            raise

    async def _run(self) -> Outcome:
        left = await self._left_over()
        if left is None:
            self._places.clean()
        self._places.check()
        if left is not None:
            return await self._go_on(left, is_resumed=True)
        mode = await self._possible_mode()
        try:
            return await self._go_on(await self._begin(mode), is_resumed=False)
        except NoPredecessor as error:
            if not self._ask.or_full:
                raise
            logs.report(f"a full backup: {error}")
            return await self._go_on(await self._begin(NEW), is_resumed=False)

    # -- what a killed run has left --------------------------------------------------------

    async def _left_over(self) -> dict[str, Any] | None:
        """The session to go on with; None: a new one is to be begun."""
        resume = self._ask.resume
        shown = await self._session.left(keep=resume)
        if shown is None:
            if resume:
                raise CommandError(
                    f"nothing can be resumed: there is no session {self._ask.session}; run it "
                    "without --resume"
                )
            return None
        session_id = shown["id"]
        disks = [disk["disk"] for disk in shown["disks"]]
        files = self._places.made_from(session_id, disks)
        if files is not None:
            outcome = Outcome(shown["name"], session_id, shown["armed_at"], None, files=files)
            await self._finish(outcome)
            if outcome.error is None:
                logs.report(
                    f"the backup of an earlier run, which was killed, was whole: session "
                    f"{shown['name']} is finished"
                )
            if resume:
                raise Left(outcome)
            if outcome.error is not None:
                raise CommandError(
                    f"the backup of an earlier run, which was killed, is whole, but session "
                    f"{shown['name']} could not be finished: {outcome.error}"
                )
        elif resume:
            self._check_resumable(shown)
            return shown
        else:
            logs.report(
                f"session {shown['name']} was left unfinished by an earlier run; it counts as "
                "failed"
            )
            await self._session.finish(session_id, FAILED)
            self._places.clean_after(session_id)
        self._session.renew()
        return None

    def _check_resumable(self, shown: Mapping[str, Any]) -> None:
        name = shown["name"]
        if shown["state"] != "active":
            raise CommandError(
                f"session {name} cannot be resumed: it broke: {shown['reason']}; run it without "
                "--resume"
            )
        disks = [disk["disk"] for disk in shown["disks"]]
        wanted = self._places.disks
        if wanted is not None and set(wanted) != set(disks):
            raise CommandError(
                f"session {name} is over {', '.join(disks)}, not {', '.join(wanted)}; resume it "
                "with what it was begun with"
            )
        names = {disk["bitmap"]["name"] if disk["bitmap"] else None for disk in shown["disks"]}
        if names != {self._ask.bitmap} or not self._places.is_prepared(shown["id"]):
            raise CommandError(
                f"session {name} was not begun with these targets and this bitmap; resume it with "
                "what it was begun with, or run it without --resume"
            )

    # -- what is possible ------------------------------------------------------------------

    async def _possible_mode(self) -> str:
        """Look before a session is begun: every one is a pause for the guest."""
        ask = self._ask
        if ask.bitmap is None or ask.mode == NEW:
            return NEW
        answer = await self._client.call("GET", "disks")
        wanted = self._places.disks
        for disk in answer["disks"]:
            if wanted is not None and disk["name"] not in wanted:
                continue
            problem = self._why_full(disk)
            if problem is None:
                continue
            if not self._ask.or_full:
                raise NoPredecessor(_needs_full(problem))
            if any(one["name"] == ask.bitmap and one["since"] for one in disk["bitmaps"]):
                logs.report(f"a full backup: {problem}")
                return NEW
        return ask.mode

    def _why_full(self, disk: Mapping[str, Any]) -> str | None:
        bitmap = next((one for one in disk["bitmaps"] if one["name"] == self._ask.bitmap), None)
        if bitmap is None:
            return f"{disk['name']} has no bitmap {self._ask.bitmap} yet"
        if bitmap["state"] != "good":
            return f"the bitmap {bitmap['name']} of {disk['name']} was lost: {bitmap['reason']}"
        if bitmap["since"] is None:
            return f"no backup has begun the chain {bitmap['name']} of {disk['name']} yet"
        since = bitmap["since"]["session_id"]
        found = self._places.previous(disk["name"], disk["size"], bitmap["id"], since)
        return None if isinstance(found, Found) else found

    async def _begin(self, mode: str) -> dict[str, Any]:
        ask = self._ask
        body = {**ask.body, "disks": self._places.disks}
        if ask.bitmap is not None:
            body |= {"bitmap": ask.bitmap, "bitmap_mode": mode}
        answer = await self._session.begin(body)
        tell_warnings(answer)
        return answer

    # -- one session -----------------------------------------------------------------------

    async def _go_on(self, session: Mapping[str, Any], *, is_resumed: bool) -> Outcome:
        try:
            outcome = await self._make(session, is_resumed=is_resumed)
        except BaseException as error:
            is_untouched = is_resumed and not any(work.has_started for work in self._works)
            if is_untouched and isinstance(error, OSError | CommandError):
                logs.report(
                    f"session {self._ask.session} and what was pulled of it stay as they are"
                )
            else:
                await to_its_end(self._give_up(session["id"]))
            raise
        await to_its_end(self._finish(outcome))
        await self._settle(outcome)
        return outcome

    async def _make(self, session: Mapping[str, Any], *, is_resumed: bool) -> Outcome:
        """All that the session is for; it is written down when this returns."""
        works = [self._plan(session, disk, is_resumed=is_resumed) for disk in session["disks"]]
        if not is_resumed:
            self._places.prepare(session["id"])
        self._works = works
        self._copy.begins(works)
        for work in works:
            _end_if_interrupted()
            await self._copy_one(work)
        return self._write_down(session, works)

    def _plan(
        self, session: Mapping[str, Any], answer: Mapping[str, Any], *, is_resumed: bool
    ) -> Work:
        own, disk = answer["bitmap"], answer["disk"]
        previous = None
        if own is not None and own["mode"] == USE:
            since = (own["since"] or {}).get("session_id")
            found = (
                "no backup has begun its chain"
                if since is None
                else self._places.previous(disk, answer["size"], own["id"], since)
            )
            if isinstance(found, str):
                raise NoPredecessor(_needs_full(found))
            previous = found
        destination = self._places.destination(disk, previous)
        return Work(session["name"], session["id"], answer, destination, is_resumed)

    async def _copy_one(self, work: Work) -> None:
        if work.destination.in_place:
            work.changed = await self._copy.changed(work)
        staged = work.destination.staged
        if work.is_resumed and staged is not None and staged.exists():
            # Whole: it gets this name at its end, and loses its journal then.
            staged.with_name(f"{staged.name}{JOURNAL_SUFFIX}").unlink(missing_ok=True)
            return
        # In a task of its own: one that is interrupted when it is complete already forgets that,
        # and we must not.
        work.done = await asyncio.ensure_future(self._copy(work))

    def _write_down(self, session: Mapping[str, Any], works: list[Work]) -> Outcome:
        """In one step of the loop: who interrupts now comes before it or after it."""
        entries = [
            entry_of(work.destination, work.answer, _recorded(work.done))
            for work in works
            if work.destination.final is not None
        ]
        record = Record(session["id"], session["name"], session["armed_at"], entries)
        files: list[Path] = []
        if entries:
            changed = {work.disk: work.changed for work in works if work.changed is not None}
            destinations = [work.destination for work in works]
            files = self._places.commit(record, destinations, changed)
            named = [work for work in works if work.destination.final is not None]
            for work, file in zip(named, files, strict=True):
                work.file = file
        warnings = list(session.get("warnings", ()))
        return Outcome(record.session, record.id, record.armed_at, None, works, files, warnings)

    async def _give_up(self, session_id: str) -> None:
        """Finish it as failed, and remove what was made; or leave all of it, and say so."""
        try:
            await self._session.finish(session_id, FAILED)
        except CommandError as problem:
            logs.report(
                f"session {self._ask.session} could not be finished as failed: {problem}; what was "
                "pulled is kept: --resume goes on with it, and without that the next backup ends it"
            )
            return
        self._places.clean()
        self._session.renew()

    async def _finish(self, outcome: Outcome) -> None:
        """Nothing that happens here makes the backup less whole."""
        try:
            outcome.result = await self._session.finish(outcome.session_id, SUCCESS)
        except CommandError as error:
            outcome.error = str(error)
            return
        if outcome.result != SUCCESS:
            logs.report(
                f"warning: the backup is whole, but session {outcome.session} "
                + ("was gone already" if outcome.result is None else "counts as failed")
                + ": the next increment holds these changes, too"
            )
            outcome.result = FAILED

    async def _settle(self, outcome: Outcome) -> None:
        destinations = [work.destination for work in outcome.works]
        if not any(one.in_place for one in destinations):
            return
        later = (
            "the changes are whole beside it, and are put into it by the next backup, or by "
            "fleecenbd backup --roll-forward"
        )
        try:
            await self._in_thread(lambda step: self._places.settle(destinations, step))
        except OSError as error:
            raise CommandError(f"{text_of(error)}; {later}") from error
        except asyncio.CancelledError:
            logs.report(f"session {outcome.session} is finished; {later}")
            raise


def _end_if_interrupted() -> None:
    task = asyncio.current_task()
    assert task is not None, "this is one"
    if task.cancelling():
        raise asyncio.CancelledError


def _needs_full(problem: str) -> str:
    return (
        f"{problem}: a full backup is needed, which --or-full makes where it must be, and --bitmap "
        "in the place of --incremental at once"
    )


def _recorded(done: Done | None) -> RecordedChecksum | None:
    if done is None or done.checksum is None:
        return None
    return RecordedChecksum(done.checksum.algorithm, done.checksum.root)
