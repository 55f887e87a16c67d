"""How a server stops.

Stopping must not be felt by a guest beyond a pause: requests in flight end, images are synced,
and guest connections are *closed* without a reply to what else they sent. ESHUTDOWN is never sent
on a guest export: QEMU hands it to the guest as an I/O error, while it repeats all that a closed
connection left unanswered once it has reconnected. (docs/semantics.md, section 9)

    drain ▶ sync images ▶ sync bitmaps, temp images, description ▶ clean mark ▶ close

Only a server that got all the way leaves the mark; any other is as good as killed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from fleecenbd.engine.disk import Disk
from fleecenbd.server.temp_making import given_back
from fleecenbd.storage.device import Losable

if TYPE_CHECKING:
    from fleecenbd.server.server import Server

logger = logging.getLogger(__name__)

STOP_DEADLINE_S = 10.0
"""Seconds that requests in flight have to end when the server stops."""
CLOSE_DEADLINE_S = 1.0
"""Seconds after that for the last replies to leave, and again for images to be closed."""
TEMPS_DEADLINE_S = 5.0
"""Seconds for temp images that others keep to give back their space: guests wait for the next
server meanwhile."""


async def stop_server(server: Server, *, deadline_s: float) -> bool:
    """``Server.stop``."""
    server.stop_listening()
    temps = [fleece.temp for session in server.sessions.values() for fleece in session.fleeces]
    connections = list(server.clients.connections)
    if server.store is None or server.end_sessions:
        # Backups first: a guest must not wait for a session that nobody will read any more.
        server.finish_all()
    drains = [connection.drain() for connection in connections]
    drained = await _within(deadline_s, [*drains, server.clients.wait_leftovers()])
    synced: set[str] = set()
    if not server.read_only:
        await _within(deadline_s, [_sync(disk, synced) for disk in server.disks.values()])
        for disk in server.disks.values():
            if disk.name not in synced:
                logger.error(
                    "%s is not synced: what its guest wrote last may be lost with the machine",
                    disk.device.name,
                )
    all_synced = server.read_only or len(synced) == len(server.disks)
    if server.store is not None:
        if not drained:
            logger.warning("no clean mark is left: requests were still in flight")
        elif all_synced and not await _within(deadline_s, [_save(server)]):
            logger.warning("no clean mark is left: saving took longer than %g s", deadline_s)
    for connection in connections:
        connection.close()
    await _within(CLOSE_DEADLINE_S, [connection.closed() for connection in connections])
    server.abort()
    # A hung call keeps its image open; the process's end lets go of it.
    closes = [disk.device.wait_closed() for disk in server.disks.values()]
    # The space of those that others keep is given back; that of a file is by itself.
    elsewhere = [temp for temp in temps if isinstance(temp, Losable)]
    closes += [temp.wait_closed() for temp in temps if temp not in elsewhere]
    if server.store is not None:
        closes.append(server.store.wait_closed())
    await _within(CLOSE_DEADLINE_S, [*closes, server.records_settled()])
    # Those of sessions that had ended before, too.
    giving_back = [given_back(), *(temp.wait_closed() for temp in elsewhere)]
    if not await _within(TEMPS_DEADLINE_S, giving_back):
        logger.warning("not all temp images are closed: what they hold may stay")
    return all_synced


async def _save(server: Server) -> None:
    assert server.store is not None, "there is nothing to save"
    try:
        await server.store.wait_ended()
        await server.store.save()
    except OSError as error:
        logger.warning(
            "no clean mark is left: %s: %s", error.filename or "state", error.strerror or error
        )


async def _sync(disk: Disk, synced: set[str]) -> None:
    try:
        await disk.flush()
        synced.add(disk.name)
    except OSError as error:
        logger.error("%s could not be synced: %s", disk.device.name, error.strerror)


async def _within(deadline_s: float, waits: Sequence[Coroutine[Any, Any, None]]) -> bool:
    """Wait for all of these, ``deadline_s`` at most; what is left then is given up: False.

    Nothing is undone by that: these only wait, and calls on devices go on.
    """
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    if not tasks:
        return True
    try:
        _, left = await asyncio.wait(tasks, timeout=deadline_s)
        return not left
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                logger.error("stopping: %r", result)
