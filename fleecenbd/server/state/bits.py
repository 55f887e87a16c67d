"""Bits in mapped files, as the engine takes them (engine/store.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

from fleecenbd.storage.mapped import MappedFile


class FileFleeceBits:
    """The bitmaps of one fleece, in a mapped file."""

    def __init__(self, file: MappedFile, closed: Callable[[str], None]) -> None:
        self.file = file
        self.access: bytearray | memoryview = file.area("access")
        self.done: bytearray | memoryview = file.area("done")
        self.own: bytearray | memoryview | None = file.area("own") if file.has_area("own") else None
        self.is_broken = file.broken is not None
        self._closed = closed

    def mark_broken(self, cause: str) -> None:
        """The flag is in the file when this returns."""
        self.file.mark_broken(cause)
        self.is_broken = True

    def close(self) -> None:
        """Unmap; the file goes once the description does not name it."""
        _close(self.file, [self.access, self.done, self.own])
        self._closed(self.file.path)


class FileRecordingBits:
    """The bits of one recording bitmap, in a mapped file."""

    def __init__(self, file: MappedFile, closed: Callable[[str], None]) -> None:
        self.file = file
        self.buffer: bytearray | memoryview = file.area("bits")
        self._closed = closed

    def mark_lost(self, cause: str) -> None:
        """The flag is in the file when this returns."""
        self.file.mark_broken(cause)

    def close(self) -> None:
        """Unmap; the file goes once the description does not name it."""
        _close(self.file, [self.buffer])
        self._closed(self.file.path)


def _close(file: MappedFile, views: Iterable[bytearray | memoryview | None]) -> None:
    for view in views:
        if isinstance(view, memoryview):
            with suppress(BufferError):  # a bitmap lives there still, and keeps the map
                view.release()
    file.close()
