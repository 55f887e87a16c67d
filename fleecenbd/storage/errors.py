"""The errors that several devices raise, each with the device's name and what went wrong."""

from __future__ import annotations

import errno


def named_error(error: OSError, name: str) -> OSError:
    """The same, with the device's name: a system call on a descriptor does not know it."""
    return OSError(error.errno, error.strerror, name)


def closed_error(name: str) -> OSError:
    """A call on a device after its close()."""
    return OSError(errno.EBADF, "the device was closed", name)


def no_thread_error(name: str) -> OSError:
    """A call that may block, and no thread to make it in."""
    return OSError(
        errno.EAGAIN, "no thread can be started; allow more processes, or give more memory", name
    )


def shrank_error(name: str, offset: int) -> OSError:
    """The image ended inside the size that it had when it was opened."""
    return OSError(
        errno.EIO, f"the image shrank while it was open: nothing to read at offset {offset}", name
    )


def past_end_error(name: str, end: int) -> OSError:
    """A change beyond what the image has become."""
    return OSError(errno.EIO, f"the image shrank while it was open, and ends at {end} now", name)


def read_only_error(name: str) -> OSError:
    """A write to a device that was opened for reading only."""
    return OSError(errno.EPERM, "the device was opened read-only", name)


def slow_zero_error(name: str) -> OSError:
    """A fast zero that would not be faster than writing zeroes."""
    return OSError(errno.ENOTSUP, "zeroing would not be faster than writing zeroes", name)


def no_direct_error(name: str) -> OSError:
    """An image on a file system that has no way around the page cache."""
    return OSError(
        errno.ENOTSUP, "the file system takes no direct I/O (O_DIRECT), as tmpfs does not", name
    )
