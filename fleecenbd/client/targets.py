"""Which kind of target a word of the user's means: ``open_target``."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import stat
from collections.abc import Callable

from fleecenbd.client.endpoints import Target
from fleecenbd.client.file_target import open_block_device, open_file
from fleecenbd.client.nbd_target import open_nbd
from fleecenbd.client.options import QCOW2, RETRIES, Backing
from fleecenbd.client.qcow2_target import open_qcow2

_URI = re.compile(r"nbds?(\+unix|\+vsock)?://")
_RAW = "raw:"


async def open_target(
    text: str,
    size: int,
    *,
    force: bool,
    resume: bool,
    compress: bool = False,
    backing: Backing | None = None,
    connections: int | None = None,
    retries: int = RETRIES,
    tell: Callable[[str], None] = lambda text: None,
) -> Target:
    """Open ``text``: a path, ``raw:PATH``, ``qcow2:PATH`` or an NBD URI, for a disk of ``size``.

    ``force``: what is there may be written over. ``resume``: go on with what an earlier pull has
    left, whatever ``force`` says; what is not known to be durable there may read as anything
    (``is_zero`` is False).
    ``tell`` gets a line for the user where something is worth one. Raises OSError that says what
    to do.
    """
    if _URI.match(text):
        return await open_nbd(
            text,
            size,
            force=force,
            resume=resume,
            connections=connections,
            retries=retries,
            tell=tell,
        )
    if text.startswith(QCOW2):
        path = text.removeprefix(QCOW2)
        if _is_block_device(path):
            raise OSError(errno.EINVAL, "is a block device: qcow2 targets are files", path)
        return await open_qcow2(
            path,
            size,
            force=force,
            resume=resume,
            compress=compress,
            backing=backing,
            tell=tell,
        )
    if compress or backing is not None:
        raise OSError(errno.EINVAL, "is no qcow2: target, and only these have that", text)
    path = text.removeprefix(_RAW)
    opened = open_block_device if _is_block_device(path) else open_file
    call = asyncio.to_thread(opened, path, size, force=force, resume=resume)
    opening = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        # The thread goes on: what it makes is not to stay behind.
        await asyncio.wait({opening})
        if opening.exception() is None:
            target = opening.result()
            await (target.keep() if resume else target.discard())
        raise


def _is_block_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False
