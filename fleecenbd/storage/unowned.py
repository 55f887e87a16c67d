"""Files with a name whose owner may be killed: each is locked by it, and whoever comes next in the
same folder removes those that nobody has locked.

The lock is flock(2)'s: other programs' locks on the content (QEMU's) do not meet it.
"""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import suppress

logger = logging.getLogger(__name__)

_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class OwnedFile:
    """A new, empty file, mode 0600, that is ours until ``remove``, or until the process ends."""

    def __init__(self, directory: str, prefix: str, suffix: str) -> None:
        """Raises OSError. Blocks."""
        while True:
            self.path = os.path.join(directory, f"{prefix}{os.urandom(8).hex()}{suffix}")
            self._descriptor = os.open(self.path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # somebody found it before it was locked, and is about to remove it
            except BaseException:
                self.remove()
                raise
            else:
                if os.fstat(self._descriptor).st_nlink:
                    return
            os.close(self._descriptor)

    def remove(self) -> None:
        """Remove it, and let go of it. Blocks."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        os.close(self._descriptor)


def remove_unowned(directory: str, prefix: str, suffix: str) -> None:
    """Remove the files of such names whose owners are gone. Raises OSError. Blocks."""
    for entry in os.scandir(directory):
        name = entry.name
        if name.startswith(prefix) and name.endswith(suffix):
            with suppress(OSError):  # another user's, or gone
                _remove_if_unowned(entry.path)


def _remove_if_unowned(path: str) -> None:
    descriptor = os.open(path, _FLAGS)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        logger.info("%s was left over, and is removed", path)
    finally:
        os.close(descriptor)
