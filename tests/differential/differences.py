"""In what our answers may differ from QEMU's. Each has its reason in docs/semantics.md.

`explain` names the differences between two answers to one step, or says what it cannot explain.
An answer that both give alike is not looked at here; whether it is right, is the truth's business.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.differential.peer import Answer
from tests.differential.script import CLUSTER, Step
from tests.differential.truth import Truth
from tests.disks import KIB

# The names, as they stand in docs/semantics.md, section 12.
DIFFERENCES = (
    "length-zero",
    "write-past-end",
    "fast-zero-copies",
    "write-to-backup",
    "zero-on-backup",
    "cache-on-backup",
    "fua-on-backup",
    "status-of-released",
    "parts-of-clusters",
    "last-cluster",
    "trimmed-bytes",
    "zeroes-found",
    "zeroes-missed",
)

# What QEMU before 8.0 gets wrong, and later ones do not (7.2 was looked at). A request on the
# fleecing export for clusters of which some have been copied and some not is answered from the
# active image: with what the guest has written since. And a TRIM of parts of clusters there ends
# the whole daemon (an assertion), so it is sent the whole clusters alone.
FAULTY_BEFORE = 8
WRONG_ACROSS = "qemu-7-wrong-across"
SPARED_TRIM = "qemu-7-spared-trim"

# What an export offers here and in QEMU, where that differs.
OFFERS: dict[tuple[str, str], tuple[int, int]] = {
    ("guest", "multi-conn"): (False, True),
    ("guest", "block-preferred"): (64 * KIB, 4 * KIB),
    ("backup", "block-preferred"): (64 * KIB, 4 * KIB),
    ("backup", "zero"): (False, True),
    ("backup", "fast-zero"): (False, True),
    ("backup", "fua"): (False, True),
    ("backup", "cache"): (False, True),
}

# Our error, and what QEMU may answer (None: it carries the request out).
ERRORS: dict[str, tuple[str, set[str | None]]] = {
    "length-zero": ("EINVAL", {None, "ENOTSUP"}),
    "write-past-end": ("ENOSPC", {"EINVAL"}),
    "fast-zero-copies": ("ENOTSUP", {None}),
    "write-to-backup": ("EPERM", {"ENOTSUP"}),
    "write-to-backup past its end": ("EPERM", {"EINVAL"}),
    "zero-on-backup": ("EINVAL", {"ENOTSUP"}),
    "cache-on-backup": ("EINVAL", {None}),
    "fua-on-backup": ("EINVAL", {None, "ENOTSUP"}),
}


REFUSED_TO_BACKUP = {
    "write": "write-to-backup",
    "zero": "zero-on-backup",
    "cache": "cache-on-backup",
}

HOLE_AND_ZERO = 3  # NBD_STATE_HOLE | NBD_STATE_ZERO


@dataclass(frozen=True)
class Unexplained:
    """A difference that nobody has written down."""

    step: Step
    why: str

    def __str__(self) -> str:
        return f"step {self.step.number}: {self.step}: {self.why}"


def explain(step: Step, ours: Answer, theirs: Answer, truth: Truth) -> set[str | Unexplained]:
    """Names of the differences between two answers to a step, taken before the step is applied."""
    if ours == theirs:
        return set()
    name = _about_requests(step, truth)
    if name is not None:
        our_error, their_errors = ERRORS[_where(step, name, truth)]
        if ours.error == our_error and theirs.error in their_errors:
            return {name}
        return {Unexplained(step, f"{name}, but we say {ours}, QEMU {theirs}")}
    if step.request == "read":
        return set(_about_reads(step, ours, theirs, truth))
    if step.request == "status":
        return set(_about_status(step, ours, theirs, truth))
    return {Unexplained(step, f"we say {ours}, QEMU {theirs}")}


def _about_requests(step: Step, truth: Truth) -> str | None:
    """The difference that a request makes by itself, whatever was released."""
    if (step.side, step.request) == ("backup", "write") and "fua" not in step.flags:
        return "write-to-backup"  # whatever its range is
    if step.length == 0 and step.request != "flush":
        return "length-zero"
    if step.side == "guest" and step.request in ("write", "zero") and step.end > truth.size:
        return "write-past-end"
    if step.side == "backup":
        if "fua" in step.flags:
            return "fua-on-backup"
        return REFUSED_TO_BACKUP.get(step.request)
    return "fast-zero-copies" if truth.too_slow(step) else None


def _where(step: Step, name: str, truth: Truth) -> str:
    """The row of ERRORS for a difference: QEMU looks at a write's range before all else."""
    past_end = name == "write-to-backup" and step.length and step.end > truth.size
    return f"{name} past its end" if past_end else name


def _only_we_released(cluster: int, truth: Truth) -> str:
    """Why a cluster is released here and not in QEMU."""
    return "last-cluster" if (cluster + 1) * CLUSTER > truth.size else "parts-of-clusters"


def _about_reads(
    step: Step, ours: Answer, theirs: Answer, truth: Truth
) -> Iterator[str | Unexplained]:
    touched = set(step.clusters)
    ours_lost = touched & truth.released
    theirs_lost = touched & truth.released_by_qemu
    if step.side == "guest" and ours.data is not None and theirs.data is not None:
        # Both are right, so they differ only where a guest's TRIM left the choice.
        yield "trimmed-bytes"
    elif (ours.error, theirs.error) == ("EINVAL", None) and ours_lost and not theirs_lost:
        yield from {_only_we_released(cluster, truth) for cluster in ours_lost}
    elif (ours.error, theirs.error) == (None, "EINVAL") and theirs_lost and not ours_lost:
        yield "fua-on-backup"
    else:
        yield Unexplained(step, f"we say {ours}, QEMU {theirs}")


def _about_status(
    step: Step, ours: Answer, theirs: Answer, truth: Truth
) -> Iterator[str | Unexplained]:
    for start, end, our_flags, their_flags in _side_by_side(step.offset, ours, theirs):
        cluster = start // CLUSTER
        if our_flags == their_flags:
            continue
        if step.side == "backup" and our_flags == 0 and cluster in truth.released:
            yield _only_we_released(cluster, truth)
        elif (our_flags, their_flags) == (HOLE_AND_ZERO, 0):
            yield "zeroes-found"
        elif (our_flags, their_flags) == (0, HOLE_AND_ZERO):
            yield "zeroes-missed"
        else:
            yield Unexplained(
                step, f"[{start}, {end}) has flags {our_flags} here, {their_flags} in QEMU"
            )
    if ours.error != theirs.error:
        lost = step.side == "backup" and truth.released_by_qemu.intersection(step.clusters)
        if lost and (ours.error, theirs.error) == (None, "EINVAL"):
            yield "status-of-released"
        else:
            yield Unexplained(step, f"we say {ours}, QEMU {theirs}")


def _side_by_side(offset: int, ours: Answer, theirs: Answer) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, our flags, their flags) of pieces, within clusters, that both have told of."""
    mine, yours = list(ours.extents or ()), list(theirs.extents or ())
    while mine and yours:
        length = min(mine[0][0], yours[0][0], CLUSTER - offset % CLUSTER)
        yield offset, offset + length, mine[0][1], yours[0][1]
        offset += length
        for extents in (mine, yours):
            extents[0] = (extents[0][0] - length, extents[0][1])
            if not extents[0][0]:
                extents.pop(0)
