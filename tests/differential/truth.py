"""What the right answers are: the disk's bytes, on both sides, and what was released where.

A guest's TRIM leaves bytes that may read as before or as zero: `hazy`, until they are written. So
does a "fast zero" that one of the two refuses.
Released clusters are kept for each server, because the rules differ where a TRIM covers parts of
clusters, and why they differ there.
"""

from tests.differential.peer import Answer
from tests.differential.script import CLUSTER, Step

ZERO = 2  # NBD_STATE_ZERO in base:allocation


class Truth:
    """One disk under one session, since the moment of arming."""

    def __init__(self, content: bytes) -> None:
        self.size = len(content)
        self.before = content
        self.now = bytearray(content)
        self.hazy = bytearray(self.size)
        # Clusters that the guest has changed in any way; those of which we have the old data.
        self.touched: set[int] = set()
        self.copied: set[int] = set()
        # Clusters that a backup client can no longer read: from us, from QEMU.
        self.released: set[int] = set()
        self.released_by_qemu: set[int] = set()
        self._parts: dict[int, bytearray] = {}

    def apply(self, step: Step) -> None:
        """A step that both servers have carried out, or that both have refused, is over."""
        if not step.length or step.end > self.size:
            return
        span = slice(step.offset, step.end)
        if step.side == "guest":
            if self.too_slow(step) or step.request == "trim":
                self.hazy[span] = b"\1" * step.length
            elif step.request in ("write", "zero"):
                self.copied.update(step.clusters)
                self.now[span] = step.payload() if step.request == "write" else bytes(step.length)
                self.hazy[span] = bytes(step.length)
            if step.request in ("write", "zero", "trim"):
                self.touched.update(step.clusters)
        elif step.request == "trim":
            self._release(step)

    def too_slow(self, step: Step) -> bool:
        """Whether old data must be copied before a "fast zero": we refuse it, QEMU does it."""
        return "fast" in step.flags and not self.copied.union(self.released) >= set(step.clusters)

    def wrong(self, step: Step, answer: Answer) -> str | None:
        """What is wrong with an answer's data or extents, if anything is. Errors are not judged."""
        if answer.data is not None:
            truth = self._truth(step.side, step.offset, step.end)
            if answer.data != truth:
                hazy = self._hazy(step.side, step.offset, step.end)
                for index, (got, right) in enumerate(zip(answer.data, truth, strict=True)):
                    if got != right and not (hazy[index] and not got):
                        return f"byte {step.offset + index} reads {got:#04x}, it is {right:#04x}"
        position = step.offset
        for length, flags in answer.extents or ():
            end = position + length
            if flags & ZERO and not self._may_be_zero(step.side, position, end):
                return f"[{position}, {end}) is said to be zero, it is not"
            position = end
        return None

    def _truth(self, side: str, offset: int, end: int) -> bytes:
        return self.before[offset:end] if side == "backup" else bytes(self.now[offset:end])

    def _hazy(self, side: str, offset: int, end: int) -> bytes:
        return bytes(end - offset) if side == "backup" else bytes(self.hazy[offset:end])

    def _may_be_zero(self, side: str, offset: int, end: int) -> bool:
        truth = self._truth(side, offset, end)
        if truth.count(0) == len(truth):
            return True
        hazy = self._hazy(side, offset, end)
        return all(hazy[index] for index, byte in enumerate(truth) if byte)

    def _bounds(self, cluster: int) -> tuple[int, int]:
        return cluster * CLUSTER, min((cluster + 1) * CLUSTER, self.size)

    def _covered(self, cluster: int, step: Step) -> bool:
        start, end = self._bounds(cluster)
        return step.offset <= start and end <= step.end

    def _release(self, step: Step) -> None:
        for cluster in step.clusters:
            start, end = self._bounds(cluster)
            if self._covered(cluster, step) and end - start == CLUSTER:
                self.released_by_qemu.add(cluster)
            if "fua" in step.flags:  # refused by us
                continue
            if self._covered(cluster, step):
                self.released.add(cluster)
                continue
            part = self._parts.setdefault(cluster, bytearray(end - start))
            first, last = max(start, step.offset), min(end, step.end)
            part[first - start : last - start] = b"\1" * (last - first)
            if all(part):
                self.released.add(cluster)
