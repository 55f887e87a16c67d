"""Stamps: when an image was last written through us, for whoever looks at its mtime later.

Two stamps of the real-time clock and the number of writes in flight, in the first page of a
mapped file (mapped.py). After a kill they tell whether somebody else has written to the image:
if none was in flight, its mtime is not after ``ended``; if some were, not much after ``began``.
(docs/semantics.md, section 11)

Order of stores, since a kill can come between two of them: at a beginning the stamp, then the
number; at the end the stamp, then the number. So a write in flight is always counted with its
stamp, and of one that has ended the later moment is known.
"""

from __future__ import annotations

from time import time_ns

from fleecenbd.storage.mapped import STAMPS_OFFSET, MappedFile

BEGAN, ENDED, IN_FLIGHT = 0, 1, 2


class Stamps:
    """Counts the active writes of one disk; keeps the count and its stamps once it is attached.

    ``begin`` and ``end`` take a third of a microsecond each at most.
    """

    __slots__ = ("_cells", "_in_flight")

    def __init__(self) -> None:
        self._in_flight = 0
        self._cells: memoryview | None = None

    def begin(self) -> None:
        """In the step that starts an active write, before the device call."""
        self._in_flight += 1
        cells = self._cells
        if cells is not None:
            cells[BEGAN] = time_ns()
            cells[IN_FLIGHT] = self._in_flight

    def end(self) -> None:
        """When the call has ended, well or not."""
        self._in_flight -= 1
        cells = self._cells
        if cells is not None:
            if not self._in_flight:
                cells[ENDED] = time_ns()
            cells[IN_FLIGHT] = self._in_flight

    @property
    def is_attached(self) -> bool:
        """Whether a file has the stamps."""
        return self._cells is not None

    def attach(self, file: MappedFile, mtime_ns: int) -> None:
        """From now on the file has the stamps. ``mtime_ns``: the image's, which is trusted."""
        cells = file.cells(STAMPS_OFFSET, 3)
        now = time_ns()
        cells[BEGAN] = now
        cells[ENDED] = max(now, mtime_ns)
        cells[IN_FLIGHT] = self._in_flight
        self._cells = cells

    def detach(self) -> None:
        """The file is about to be closed."""
        self._cells = None


def stamps_of(file: MappedFile) -> tuple[int, int, int]:
    """(began, ended, in flight) as the last run left them; times in nanoseconds."""
    began, ended, in_flight = file.cells(STAMPS_OFFSET, 3)
    return began, ended, in_flight
