"""How a server goes on with what the last one left in its state directory.

    lock held ▶ description ▶ whom to trust ▶ map files, open temp images (looking.py)
    ▶ bitmaps, sessions (rebuilding.py)
    ▶ clean mark off, this run's description ▶ sweep ▶ clients are let in

What cannot be trusted, or read, is lost: a bitmap says so until it is begun anew, a session is
broken until it is finished. Each is named in the log and told as an event, with what it takes to
mend it. Nothing that is found keeps a server from starting, but what would be destroyed by it: a
session over a disk that is not served now, unless it may be forgotten.
"""

from __future__ import annotations

import logging
from functools import partial

from fleecenbd.server.server import Server
from fleecenbd.server.state.directory import StateDirectory
from fleecenbd.server.state.store import FileStore
from fleecenbd.server.state.trust import Image
from fleecenbd.storage.pool import ThreadPool

logger = logging.getLogger(__name__)


async def recover(
    server: Server,
    directory: StateDirectory,
    boot: str,
    *,
    trust_offline: frozenset[str] = frozenset(),
    forget_missing: bool = False,
) -> FileStore:
    """Go on with what the last server left. Before the first client is let in.

    ``directory`` is the store's from now on. Raises OSError, and DisksMissing unless
    ``forget_missing``, with nothing changed; the directory is closed then.
    """
    pool = ThreadPool(str(directory.path), "state", size_max=1)
    try:
        if not await pool.run(directory.has_description):
            store, rebuilding = FileStore(directory, boot), None
        else:
            # Imported here: most servers find nothing, and start sooner without.
            from fleecenbd.server.state.looking import look
            from fleecenbd.server.state.rebuilding import Rebuilding

            images = {name: Image.of(disk.device) for name, disk in server.disks.items()}
            find = partial(look, trust_offline=trust_offline, forget_missing=forget_missing)
            found = await pool.run(find, directory, boot, images)
            store = FileStore(directory, boot, found.description)
            rebuilding = Rebuilding(server, store, found)
    except BaseException:
        directory.close()
        raise
    finally:
        pool.close()
    sessions = []
    try:
        server.use(store)
        if rebuilding is not None:
            sessions = await rebuilding.run()
        await store.begin_run()
    except BaseException:
        store.close()
        server.store = None
        raise
    for session in sessions:
        server.adopt(session)
    if rebuilding is not None:
        rebuilding.tell()
    return store
