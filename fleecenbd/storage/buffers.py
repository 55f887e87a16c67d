"""Memory that reads fill: without clearing it first, or where direct I/O wants it."""

from __future__ import annotations

import ctypes
import mmap
import threading
from typing import Any

BOUNCE_LENGTH = 1 << 20
"""Bytes of a thread's bounce buffer: longer requests go through it in pieces."""

# bytearray(length) clears memory that the read then overwrites: a fifth of the time of a
# 256 KiB read from the page cache. A buffer that was not filled whole is never handed out.
uncleared_buffer: Any = ctypes.pythonapi.PyByteArray_FromStringAndSize
"""``uncleared_buffer(None, length)``: a bytearray that holds anything, to be filled whole."""
uncleared_buffer.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
uncleared_buffer.restype = ctypes.py_object


class BounceBuffers:
    """One buffer for each thread that asks, gone when that thread ends.

    A buffer begins with a page, which is more than any device asks of an address.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def mine(self) -> memoryview:
        """``BOUNCE_LENGTH`` bytes, the calling thread's until it asks again."""
        try:
            buffer: memoryview = self._local.buffer
        except AttributeError:
            # Its memory is the kernel's to give, page by page, as it is written.
            buffer = self._local.buffer = memoryview(mmap.mmap(-1, BOUNCE_LENGTH))
        return buffer
