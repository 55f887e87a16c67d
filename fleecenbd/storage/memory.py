"""MemoryDevice: a sparse block device in this process's memory, for tests and small disks."""

from __future__ import annotations

from fleecenbd.storage.device import EXTENT_HOLE, EXTENT_ZERO, Buffer, Data, Extent
from fleecenbd.storage.errors import closed_error

PAGE_SIZE = 4096
"""Bytes per page: the smallest hole."""

_ZERO_PAGE = bytes(PAGE_SIZE)


class MemoryDevice:
    """Pages in a dict; a page that is missing reads as zeroes and holds no space.

    Nothing here ever waits. With ``now=False`` it still answers every ``*_now`` with
    None or False, so that callers' slow paths can be tried.
    """

    hole_size = PAGE_SIZE

    def __init__(self, size: int, *, name: str = "memory", now: bool = True) -> None:
        assert size >= 0, "a device's size is not negative"
        self.name = name
        self.size = size
        self._now = now
        self._pages: dict[int, bytearray] = {}
        self._closed = False

    @property
    def used_bytes(self) -> int:
        """Bytes of space in use: whole pages."""
        return len(self._pages) * PAGE_SIZE

    def pread_now(self, offset: int, length: int) -> Buffer | None:
        """Read, unless made with ``now=False``."""
        return self._read(offset, length) if self._now else None

    def pread_into_now(self, offset: int, buffer: memoryview) -> bool:
        """As ``pread_now``."""
        if not self._now:
            return False
        buffer[:] = self._read(offset, len(buffer))
        return True

    async def pread(self, offset: int, length: int) -> Buffer:
        """Read ``length`` bytes at ``offset``."""
        return self._read(offset, length)

    def pwrite_now(self, offset: int, data: Data) -> bool:
        """Write, unless made with ``now=False``."""
        if not self._now:
            return False
        self._write(offset, data)
        return True

    async def pwrite(self, offset: int, data: Data) -> None:
        """Write all of ``data`` at ``offset``."""
        self._write(offset, data)

    async def zero(
        self, offset: int, length: int, *, may_trim: bool = True, fast: bool = False
    ) -> None:
        """Make the range read as zeroes; without ``may_trim`` its pages are kept or made."""
        if may_trim:
            self._trim(offset, length)
            return
        end = offset + length
        while offset < end:
            piece = _ZERO_PAGE[: min(end - offset, PAGE_SIZE - offset % PAGE_SIZE)]
            self._write(offset, piece)
            offset += len(piece)

    async def trim(self, offset: int, length: int) -> None:
        """Drop whole pages, zero parts of pages. Never fails."""
        self._trim(offset, length)

    def flush_now(self) -> bool:
        """Nothing here is durable: nothing to do."""
        self._check(0, 0)
        return True

    async def flush(self) -> None:
        """Nothing here is durable: nothing to do."""
        self._check(0, 0)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Pages that are there are data, all others holes."""
        self._check(offset, length)
        extents: list[Extent] = []
        position = offset
        for index in self._indexes(offset, length):
            start, end = max(index * PAGE_SIZE, offset), (index + 1) * PAGE_SIZE
            end = min(end, offset + length)
            if start > position:
                extents.append((start - position, EXTENT_HOLE | EXTENT_ZERO))
            elif extents:  # right behind the data before it
                start -= extents.pop()[0]
            extents.append((end - start, 0))
            position = end
        if position < offset + length:
            extents.append((offset + length - position, EXTENT_HOLE | EXTENT_ZERO))
        return extents

    def close(self) -> None:
        """Take no more calls, and give the memory back."""
        self._closed = True
        self._pages.clear()

    async def wait_closed(self) -> None:
        """No call lasts: closed is closed."""

    def _check(self, offset: int, length: int) -> None:
        if self._closed:
            raise closed_error(self.name)
        assert 0 <= offset <= offset + length <= self.size, "the caller checks the range"

    def _indexes(self, offset: int, length: int) -> list[int]:
        """The pages that are there and touch the range, in order."""
        pages = self._pages
        indexes = range(offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE))
        if len(pages) < len(indexes):
            return sorted(index for index in pages if index in indexes)
        return [index for index in indexes if index in pages]

    def _read(self, offset: int, length: int) -> Buffer:
        self._check(offset, length)
        first, start = divmod(offset, PAGE_SIZE)
        if length == PAGE_SIZE and start == 0:
            return bytes(self._pages.get(first, _ZERO_PAGE))
        if start + length <= PAGE_SIZE:
            return bytes(self._pages.get(first, _ZERO_PAGE)[start : start + length])
        last = (offset + length - 1) // PAGE_SIZE
        get = self._pages.get
        data = b"".join([get(index, _ZERO_PAGE) for index in range(first, last + 1)])
        return data if start == 0 and len(data) == length else data[start : start + length]

    def _write(self, offset: int, data: Data) -> None:
        length = len(data)
        self._check(offset, length)
        view = memoryview(data)
        done = 0
        while done < length:
            index, start = divmod(offset + done, PAGE_SIZE)
            count = min(length - done, PAGE_SIZE - start)
            page = self._pages.get(index)
            if page is None:
                page = self._pages[index] = bytearray(PAGE_SIZE)
            page[start : start + count] = view[done : done + count]
            done += count

    def _trim(self, offset: int, length: int) -> None:
        self._check(offset, length)
        end = offset + length
        for index in self._indexes(offset, length):
            page_start = index * PAGE_SIZE
            start, stop = max(offset - page_start, 0), min(end - page_start, PAGE_SIZE)
            # The last page of the device may be partly behind its end.
            if start == 0 and (stop == PAGE_SIZE or end == self.size):
                del self._pages[index]
            else:
                self._pages[index][start:stop] = bytes(stop - start)
