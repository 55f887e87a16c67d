"""A pull from its first look at the target to its last word: ``pull``.

    leftovers? ▶ source ▶ journal ▶ what is wanted, and may be read ▶ target
               ▶ copy, make durable, release ▶ verify ▶ checksum ▶ the target's name ▶ journal goes

Until the target has its name (or, where it has none to get, the journal its mark "complete"),
whatever happens leaves what ``--resume`` goes on with; or nothing, if nothing became durable.
"""

from __future__ import annotations

import asyncio
import errno
from contextlib import suppress
from dataclasses import replace
from typing import TypeAlias

from fleecenbd.client import checksums, leftovers
from fleecenbd.client.block_io import READ_LENGTH_MAX
from fleecenbd.client.checksums import BLOCK_SIZE, Checksums
from fleecenbd.client.controls import Controls
from fleecenbd.client.copy_loop import BATCH_LENGTH, IN_FLIGHT_LENGTH_MAX, CopyLoop
from fleecenbd.client.endpoints import OpenSource, OpenTarget, Source, Target, check_session
from fleecenbd.client.events import Checksum, Done, Event, Failed, Note, OnEvent, Start
from fleecenbd.client.journal import COMPLETE, COMPLETING, Header, Journal
from fleecenbd.client.journal_file import DurableFile
from fleecenbd.client.options import PullOptions, find_places, source_uri
from fleecenbd.client.plan import ACCESS, DIRTY, Plan
from fleecenbd.client.telling import Telling, full_text, text_of
from fleecenbd.client.verify import Differs, verify, wanted_blocks

STOP_TIMEOUT_S = 10.0
"""Seconds that a pull which was cancelled takes to make durable what it has in hand."""

Summary: TypeAlias = Done


def ignore(_event: Event) -> None:
    """For who wants no events."""


async def pull(
    options: PullOptions,
    on_event: OnEvent = ignore,
    *,
    controls: Controls | None = None,
    open_source: OpenSource | None = None,
    open_target: OpenTarget | None = None,
) -> Summary:
    """Copy the source to the target, and release in the source what is durable there.

    Raises OSError, after the event ``failed``; so does being cancelled: what is in hand is made
    durable first, unless it is cancelled once more. Cancelled when the target has its name, or is
    getting it, it is complete. ``open_source`` and ``open_target``: others than a libnbd client
    and the targets of ``targets.py``.
    """
    work = _Pull(options, on_event, controls or Controls(options.rate), open_source, open_target)
    try:
        done = await work.run()
    except asyncio.CancelledError:
        if work.done is None:
            on_event(Failed("interrupted", work.kept))
            raise
        done = work.done  # what was not closed yet ends with the process
        _forget_cancel()
    except OSError as error:
        on_event(Failed(text_of(error), work.kept))
        raise
    on_event(done)
    return done


def _forget_cancel() -> None:
    task = asyncio.current_task()
    assert task is not None, "this is one"
    task.uncancel()


class _Pull:
    """One call of ``pull``."""

    def __init__(
        self,
        options: PullOptions,
        on_event: OnEvent,
        controls: Controls,
        open_source: OpenSource | None,
        open_target: OpenTarget | None,
    ) -> None:
        self.kept: str | None = None
        """What is left for ``--resume`` after a failure."""
        self.done: Done | None = None
        """The target is complete, and all that is left is to hang up."""
        self._options = options
        self._on_event = on_event
        self._controls = controls
        self._open_source = open_source
        self._open_target = open_target
        self._places = find_places(options)
        self._is_complete = False

    def _note(self, text: str) -> None:
        self._on_event(Note(text))

    async def run(self) -> Done:
        """The whole of it."""
        options = self._options
        if options.checksum is not None:
            Checksums(options.checksum, 1)  # is there such a thing?
        leftovers.check(options, self._places)
        bitmap = options.bitmap
        source = await self._find_open_source()(
            source_uri(options),
            contexts=() if bitmap is None else (f"{DIRTY}{bitmap}",),
            connections=options.connections,
            requests=options.requests,
            retries=options.retries,
            tell=self._note,
        )
        try:
            if not source.size:
                raise OSError(
                    errno.EINVAL, "it has no bytes: there is nothing to copy", source.name
                )
            if options.session_id is not None:
                check_session(source, options.session_id)
            file = leftovers.open_journal(self._places.journal, options.target)
            try:
                return await self._with_journal(source, file)
            finally:
                await file.close()
        finally:
            with suppress(OSError):  # what was done is done, and what failed has its own reason
                await source.close()

    def _find_open_source(self) -> OpenSource:
        if self._open_source is not None:
            return self._open_source
        # Only here: who has sources of their own needs no libnbd.
        from fleecenbd.client.source import open_source

        return open_source

    def _find_open_target(self) -> OpenTarget:
        if self._open_target is not None:
            return self._open_target
        from fleecenbd.client.targets import open_target

        return open_target

    async def _with_journal(self, source: Source, file: DurableFile) -> Done:
        """Decide what the journal is worth, and what of it stays."""
        options, places = self._options, self._places
        header = Header(
            source=options.source,
            target=options.target,
            size=source.size,
            session=source.session_id,
            block=BLOCK_SIZE,
            bitmap=options.bitmap,
            algorithm=options.checksum or (checksums.DEFAULT_ALGORITHM if options.verify else None),
            force=options.force,
            verify=options.verify,
            checksum=options.checksum is not None,
        )
        journal = leftovers.take_up(file, header, options, places, self._note)
        options = self._options = self._as_begun(journal.header)
        plan = Plan(source, journal.durable, bitmap=options.bitmap, align=self._align(source))
        try:
            await plan.scan()
        except BaseException:
            if not file.content:
                await journal.remove()  # it was made just now
            raise
        if leftovers.is_done(journal, places):
            return await self._already_done(plan, journal)
        resumes = leftovers.has_part(options, journal, places)
        if options.resume and not resumes:
            leftovers.remove_part(places)
        try:
            await journal.begin()
            target = await self._find_open_target()(
                options.target,
                source.size,
                force=journal.header.force,
                resume=resumes,
                compress=options.compress,
                backing=options.backing,
                connections=options.connections,
                retries=options.retries,
                tell=self._note,
            )
        except BaseException:
            # As it was: what an earlier pull has left is still what --resume goes on with.
            await (file.replace(file.content) if file.content else file.remove())
            raise
        try:
            return await self._with_target(source, journal, plan, target)
        except BaseException:
            if not self._is_complete:
                await self._leave(journal, target)
            raise

    def _as_begun(self, header: Header) -> PullOptions:
        """What was asked for when it was begun is asked for still."""
        options = self._options
        if header.verify and not options.verify:
            self._note("it was begun with --verify: it is read back, and compared, at the end")
            options = replace(options, verify=True)
        if header.checksum and options.checksum is None:
            self._note(f"it was begun with --checksum {header.algorithm}: that is written")
            options = replace(options, checksum=header.algorithm)
        return options

    def _align(self, source: Source) -> int:
        return min(source.cluster, BLOCK_SIZE) if self._options.read_once else 1

    def _releases_by_reading(self, source: Source) -> bool:
        """Whether a READ can cover whole clusters: no part of a block is read twice."""
        return self._options.read_once and source.cluster <= BLOCK_SIZE

    def _in_flight_length(self) -> int:
        """Who asks for more READs in flight than usual gets the memory for them."""
        return max(IN_FLIGHT_LENGTH_MAX, (self._options.requests or 0) * READ_LENGTH_MAX)

    async def _already_done(self, plan: Plan, journal: Journal) -> Done:
        """The last pull was killed after its last step but one."""
        self._note(f"{self._options.target} was complete already")
        if self._places.file is not None:
            await journal.remove()
        self.done = Done(plan.resumed, 0, 0, 0.0, None, verified=False)
        return self.done

    async def _leave(self, journal: Journal, target: Target) -> None:
        """After a failure: keep what is durable, if there is any and it can be of use."""
        options, places = self._options, self._places
        try:
            if (options.keep or self._controls.keeps) and journal.durable.bits.any():
                self.kept = places.part or options.target
                await target.keep()
            else:
                await target.discard()
                await journal.remove()
        except OSError as error:
            self._note(f"not left as it should be: {text_of(error)}")

    async def _with_target(
        self, source: Source, journal: Journal, plan: Plan, target: Target
    ) -> Done:
        options = self._options
        algorithm = journal.header.algorithm
        sums = None if algorithm is None else Checksums(algorithm, source.size)
        self._say_what_is_special(source)
        copying = CopyLoop(
            source,
            target,
            plan,
            journal,
            rate=self._controls.rate,
            note=self._note,
            checksums=sums,
            # On anything but a fleecing export a TRIM would discard the disk's own data.
            trims=options.trim and not options.read_once and ACCESS in source.contexts,
            reads_once=self._releases_by_reading(source),
            read_length=max(READ_LENGTH_MAX, self._align(source)),
            in_flight_length=self._in_flight_length(),
            batch_length=BATCH_LENGTH,
        )
        self._controls.attach(copying)
        self._on_event(
            Start(
                source.name,
                target.name,
                source.session_id,
                source.size,
                plan.to_copy,
                plan.resumed,
            )
        )
        telling = Telling(source, plan, copying, self._on_event, options)
        async with telling:
            await self._copy(copying, target)
            root: Checksum | None = None
            if sums is not None:
                if options.verify:
                    self._note(f"everything is durable; {target.name} is read back")
                    await self._verify(target, plan, sums, journal, releases=copying.releases)
                blocks = (block for block, _ in wanted_blocks(plan))
                if options.checksum is not None:
                    root = Checksum(sums.algorithm, sums.root(blocks, journal.digests))
                    self._write_checksum(root, plan)
            await self._finish(journal, target)
            self.done = telling.done(root, verified=options.verify)
        return self.done

    async def _verify(
        self, target: Target, plan: Plan, sums: Checksums, journal: Journal, *, releases: bool
    ) -> None:
        """Read it back. Raises Differs: what can be read once more is copied again then."""
        try:
            await verify(target, plan, sums, journal.digests)
        except Differs as error:
            if releases:
                self._note(
                    "what differs was released, and cannot be copied again: --resume compares once "
                    "more; if it differs again, pull from a new session, to another target"
                )
            else:
                await journal.forget(error.blocks)
            raise

    async def _finish(self, journal: Journal, target: Target) -> None:
        """Give the target its name. Cancelled meanwhile, it is complete all the same."""

        async def finish() -> None:
            await journal.set_mark(COMPLETING)
            leftovers.remove_checksums(self._places, but=self._options.checksum)
            await target.complete()
            self._is_complete = True
            if self._places.file is not None:
                await journal.remove()
            else:
                await journal.set_mark(COMPLETE)

        work = asyncio.create_task(finish(), name="complete")
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await work
            _forget_cancel()

    def _say_what_is_special(self, source: Source) -> None:
        options = self._options
        if options.read_once and not self._releases_by_reading(source):
            self._note(
                f"{source.name} has clusters of {source.cluster >> 20} MiB, and {BLOCK_SIZE >> 20} "
                "MiB is read at a time: nothing is released; leave out --read-once"
            )
        if not options.trim or options.read_once or source.can_trim:
            return
        if source.session_id is None:
            self._note(
                f"{source.name} is no fleecing export: it is copied as it is, nothing is released, "
                "and what is written there meanwhile makes it no image of one moment"
            )
        else:
            self._note(
                f"{source.name} offers no TRIM: nothing is released, and the server keeps old data "
                "until its session is finished"
            )

    async def _copy(self, copying: CopyLoop, target: Target) -> None:
        """Copy; when cancelled, make durable what is in hand, and be cancelled then."""
        work = asyncio.create_task(copying.run(), name="pull")
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            copying.stop()
            await asyncio.wait({work}, timeout=STOP_TIMEOUT_S)
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                text = full_text(error, copying.data_left, self._places.file)
                raise OSError(error.errno, text, target.name) from error
            raise
        finally:
            work.cancel()
            await asyncio.wait({work})
            if not work.cancelled():
                work.exception()  # told already, or not the reason

    def _write_checksum(self, root: Checksum, plan: Plan) -> None:
        path = self._places.checksum(root.algorithm)
        if path is None:
            self._note(
                f"{self._options.target} is no file to have one beside it: its {root.algorithm} "
                f"checksum is {root.root}"
            )
            return
        ranges = None
        if plan.dirty is not None:
            ranges = zip(plan.dirty[::2], plan.dirty[1::2], strict=True)
        text = checksums.checksum_text(root.algorithm, plan.durable.size, root.root, ranges)
        leftovers.write_durably(path, text.encode())
