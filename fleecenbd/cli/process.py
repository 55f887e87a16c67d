"""What is set once for the whole process, before the loop runs."""

from __future__ import annotations

import ctypes
import gc
import logging

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

BUFFER_LENGTH_MAX = 4 << 20
"""Bytes. Buffers up to this are kept on the heap."""
HEAP_KEPT_MAX = 32 << 20
"""Bytes of free heap that are not given back to the kernel."""


def keep_buffers_on_the_heap() -> None:
    """Let glibc reuse the memory of replies instead of getting it anew for each.

    By itself it maps and unmaps a buffer of 128 KiB and more, or gives the heap's end back, so
    that each reply of 256 KiB costs 64 page faults: a third of the CPU time of a pull. Elsewhere
    than with glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    if not (
        mallopt(_M_MMAP_THRESHOLD, BUFFER_LENGTH_MAX) and mallopt(_M_TRIM_THRESHOLD, HEAP_KEPT_MAX)
    ):
        logger.debug("the allocator keeps its own thresholds")


def start_collecting() -> None:
    """End the command's pause of garbage collection: what is there by now, code mostly, stays.

    So collections never walk through it, which would take longer than most requests do.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
