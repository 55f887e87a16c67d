"""A server's life: sockets, session, ready; until it is asked to stop; and down again.

    bind ▶ take up what the last server left ▶ begin the session ▶ let clients in
         ▶ pidfile, READY=1 ▶ ... ▶ STOPPING=1
         ▶ socket files go ▶ requests in flight end, images and state are synced ▶ exit status

Whatever fails on the way up goes the same way down.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from fleecenbd.cli import logs
from fleecenbd.cli.controlling import Control, ServerPlaces
from fleecenbd.cli.endpoints import Endpoint, open_endpoints
from fleecenbd.cli.errors import CommandError, reason
from fleecenbd.cli.handed import NOTHING_HANDED, Handed
from fleecenbd.cli.images import open_other
from fleecenbd.cli.lasting import take_up
from fleecenbd.cli.options import ServeOptions
from fleecenbd.cli.pidfile import pidfile
from fleecenbd.cli.stopping import Stopping
from fleecenbd.cli.temp_directory import TempDirectory
from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import MakeTemp
from fleecenbd.server.guest_records import GuestRecords
from fleecenbd.server.server import Server
from fleecenbd.server.size_watch import SizeWatch
from fleecenbd.server.sockets import notify
from fleecenbd.server.temp_watch import TempWatch

logger = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 10.0
"""Seconds that the command of --run has to end after SIGTERM."""
TASKS_TIMEOUT_S = 1.0
"""Seconds that what is left of the server's tasks has to end."""


async def run_server(
    options: ServeOptions, disks: Sequence[Disk], handed: Handed = NOTHING_HANDED
) -> int:
    """Serve until asked to stop; the exit status. Raises CommandError."""
    asyncio.get_running_loop().set_exception_handler(logs.loop_exception)
    stopping = Stopping()
    stopping.catch_signals()
    records = guest_records(options, disks)
    server = Server(
        default_export=options.empty_name,
        shared=options.shared,
        read_only=options.read_only,
        guest_records=records,
        end_sessions=options.end_sessions,
    )
    for disk in disks:
        server.add_disk(disk)
    control = Control(options, handed)
    with ExitStack() as files:
        try:
            status = await _serve(server, control, records, options, handed, stopping, files)
        finally:
            notify(os.environ, "STOPPING=1")
            files.close()  # while the sockets are open: see open_endpoints
            stopped = await _stop(server, control, stopping)
            stopping.release_signals()
    return status if stopped else 1


def guest_records(options: ServeOptions, disks: Sequence[Disk]) -> GuestRecords | None:
    """Where connected guests are noted; refuses disks that a guest would find different.

    None where no guest could come back: the server is one client's own.
    """
    if options.guests_directory is None:
        return None
    records = GuestRecords(options.guests_directory)
    for disk in disks:
        _check_record(records, disk, options)
    return records


def _check_record(records: GuestRecords, disk: Disk, options: ServeOptions) -> None:
    try:
        records.check(disk.name, disk.device.name, disk.size, writable=not options.read_only)
    except OSError as error:
        raise CommandError(f"cannot serve: {reason(error)}") from error


async def _serve(
    server: Server,
    control: Control,
    records: GuestRecords | None,
    options: ServeOptions,
    handed: Handed,
    stopping: Stopping,
    files: ExitStack,
) -> int:
    if not await _unless_asked(stopping, _open_others(server, records, options)):
        return 0
    if options.session is not None and options.temp.directory is not None:
        from fleecenbd.cli.temp_directory import check_there

        if not await _unless_asked(stopping, check_there(options.temp.directory, options.session)):
            return 0
    endpoints = handed.endpoints or []
    if options.addresses is not None:
        endpoints = open_endpoints(options.addresses, files)
    if options.lasts and not await _unless_asked(stopping, take_up(server, options, handed)):
        return 0
    control.open(endpoints, files)
    if options.session is not None and not await _unless_asked(
        stopping, _begin(server, options, options.session)
    ):
        return 0
    for watch in (SizeWatch(server), TempWatch(server)):
        watch.start()
        files.callback(watch.stop)
    for endpoint in endpoints:
        server.listen(endpoint.socket, backup_only=endpoint.backup_only)
    if options.temp.is_one_export and len(server.disks) > 1:
        logger.warning(
            "--temp %s: a session over more than one of the %d disks cannot begin: each needs an "
            "export of its own; {disk} in the URI stands for a name",
            options.temp.temp,
            len(server.disks),
        )
    if (directory := options.temp.directory) is not None:
        # Only here: a server that has no use for it starts without it.
        from fleecenbd.cli.temp_directory import look_for

        looking = asyncio.create_task(look_for(directory))
        files.callback(looking.cancel)
    control.start(server, ServerPlaces(server, options, endpoints, records))
    if handed.starter is not None:
        stopping.ask_at_end_of(handed.starter)
    if options.pidfile is not None:
        files.enter_context(pidfile(options.pidfile))
    _tell_addresses(options, endpoints)
    control.tell()
    if options.empty_name is None and (handed.client or handed.starter) is not None:
        # Such a client seldom names an export, and never shows why it was refused.
        logger.warning(
            "the empty export name means none of %s; where the client asks for no other, give "
            "--default-export NAME",
            ", ".join(options.exports),
        )
    notify(os.environ, "READY=1")
    if options.command is not None:
        return await _run_command(options, options.command, endpoints, control.path, stopping)
    if handed.client is not None:
        await _unless_asked(stopping, server.serve_connected(handed.client))
    else:
        await stopping.asked.wait()
    return 0


async def _open_others(server: Server, records: GuestRecords | None, options: ServeOptions) -> None:
    """Open, one after the other, the disks that are no raw images. Raises CommandError."""
    for spec in options.disks:
        if spec.kind == "raw":
            continue
        disk = await open_other(spec, read_only=options.read_only, force_share=options.force_share)
        try:
            if records is not None:
                _check_record(records, disk, options)
            server.add_disk(disk)
        except BaseException:
            disk.device.close()
            raise


async def _unless_asked(stopping: Stopping, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work to its end, or until asked to stop: False."""
    task = asyncio.create_task(work)
    asked = asyncio.create_task(stopping.asked.wait())
    try:
        await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task  # raises what it raised
            return True
        return False
    finally:
        task.cancel()
        asked.cancel()


async def _begin(server: Server, options: ServeOptions, session: str) -> None:
    if session in server.sessions and _goes_on(server, session):
        return
    directory = options.state_directory
    assert directory is not None, "a session needs a state directory"
    try:
        make_temp: MakeTemp = TempDirectory(
            directory, session, options.temp, server.disks.values
        ).make
        if server.store is not None:
            make_temp = server.store.temps.maker(session, options.temp)
            server.store.extras[session] = {
                "all_disks": True,
                "ttl_s": options.ttl_s,
                "idle_ttl_s": options.idle_ttl_s,
                **options.temp.lasting(),
            }
        await server.begin(session, None, options.session_options, make_temp)
    except OSError as error:
        raise CommandError(f"cannot begin session {session}: {reason(error)}") from error


def _goes_on(server: Server, name: str) -> bool:
    """Whether --begin's session, which the last server left, is the one that is asked for.

    A broken one is finished, as failed: whoever starts the server by a fixed command line wants a
    session, and that one can no longer be read. Raises CommandError for other disks.
    """
    session = server.sessions[name]
    if session.state == "broken":
        server.finish(name, failed=True)
        logger.warning("session %s is begun anew: the last server's is broken", name)
        return False
    disks = [fleece.disk.name for fleece in session.fleeces]
    if set(disks) != set(server.disks):
        raise CommandError(
            f"cannot begin session {name}: the last server left one of this name over "
            f"{', '.join(disks)}, and now there are {', '.join(server.disks)}; start without "
            f"--begin and finish it (fleecenbd session finish {name}), or begin another name"
        )
    logger.info("session %s is not begun anew: it goes on (--begin)", name)
    return True


def _tell_addresses(options: ServeOptions, endpoints: Sequence[Endpoint]) -> None:
    known = [endpoint for endpoint in endpoints if endpoint.is_known and not endpoint.backup_only]
    first = known[0] if known else None
    if first is not None:
        for export in options.exports:
            logger.info("serving %s at %s", export, first.uri(export))
    everything = "all exports" if first is not None else ", ".join(options.exports)
    for endpoint in endpoints:
        which = "fleecing exports only" if endpoint.backup_only else everything
        if not endpoint.is_known:
            path = (endpoint.unix or "").replace("\0", "@")
            logger.info("serving %s at the Unix socket %s, as it was handed over", which, path)
        elif endpoint is not first:
            logger.info("serving %s at %s", which, endpoint.uri(""))


async def _run_command(
    options: ServeOptions,
    command: str,
    endpoints: Sequence[Endpoint],
    control: str | None,
    stopping: Stopping,
) -> int:
    """Run the command of --run to its end; its exit status, 128 + n for signal n."""
    environment = dict(os.environ)
    environment.pop("NOTIFY_SOCKET", None)
    first = endpoints[0]
    environment["uri"] = first.uri(options.command_export)
    if control is not None:
        environment["FLEECENBD_CONTROL"] = control
    environment["unixsocket"] = first.unix or ""
    ports = [endpoint.port for endpoint in endpoints if endpoint.port and not endpoint.backup_only]
    environment["port"] = str(ports[0]) if ports else ""
    try:
        process = await asyncio.create_subprocess_exec("/bin/sh", "-c", command, env=environment)
    except OSError as error:
        raise CommandError(f"cannot run the command of --run: {reason(error)}") from error
    ended = asyncio.create_task(process.wait())
    asked = asyncio.create_task(stopping.asked.wait())
    at_once = asyncio.create_task(stopping.at_once.wait())
    try:
        await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            # At a terminal it has had the signal already; once more does no harm.
            with suppress(ProcessLookupError):
                process.terminate()
            await asyncio.wait(
                {ended, at_once},
                timeout=COMMAND_TIMEOUT_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
        if not ended.done():
            logger.warning("the command of --run (pid %d) goes on", process.pid)
            return 1
        status = ended.result()
        return 128 - status if status < 0 else status
    finally:
        for task in (ended, asked, at_once):
            task.cancel()


async def _stop(server: Server, control: Control, stopping: Stopping) -> bool:
    """Stop the server; False where it was at once, it failed, or an image is not synced."""
    stop = asyncio.create_task(_stop_all(server, control))
    at_once = asyncio.create_task(stopping.at_once.wait())
    try:
        await asyncio.wait({stop, at_once}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.done():
            server.abort()
            return False
        if (error := stop.exception()) is not None:
            logger.error("the server did not stop as it should", exc_info=error)
            return False
        return stop.result()
    finally:
        await _end_tasks()


async def _stop_all(server: Server, control: Control) -> bool:
    closing = asyncio.create_task(control.close())
    stopped = await server.stop()
    try:
        await closing
    except Exception as error:
        logger.error("the control socket was not closed as it should be", exc_info=error)
    return stopped


async def _end_tasks() -> None:
    """Cancel what is left running, and let it end: the loop would complain of what is not."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=TASKS_TIMEOUT_S)
