"""libnbd's Python module, or an OSError that says what to install: whoever has it needs it."""

from __future__ import annotations

import errno

try:
    import nbd
except ImportError as missing:
    raise OSError(
        errno.ENOPKG, "libnbd's Python module is not there; install python3-libnbd"
    ) from missing

__all__ = ["nbd"]
