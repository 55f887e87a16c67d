"""Which file descriptors this process has open, for tests that leave none (needs procfs).

Counts will not do: files that other tests left to be closed by threads go meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def open_descriptors() -> dict[tuple[int, int, int], str]:
    """Number, and device and inode of what it refers to; what that is called."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
            found[int(name), status.st_dev, status.st_ino] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the list's own, or closed since
            continue
    return found


def descriptors_of(path: Path) -> list[str]:
    """What is open at or below ``path``, sorted."""
    return sorted(name for name in open_descriptors().values() if name.startswith(str(path)))


@contextmanager
def no_new_descriptor() -> Iterator[None]:
    """Asserts that none is open after the block that was not before."""
    before = open_descriptors()
    yield
    assert {key: name for key, name in open_descriptors().items() if key not in before} == {}
