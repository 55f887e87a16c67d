"""A pull's TARGET as it is typed: what it cannot mean, and what it is not said to mean."""

from __future__ import annotations

import os
import re

from fleecenbd.cli import values
from fleecenbd.cli.errors import UsageError

_NBD_URI = re.compile(r"nbds?(\+unix|\+vsock)?://")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+-]*:")

OTHER_FORMATS = (".qcow2", ".qcow", ".qed", ".vmdk", ".vhd", ".vhdx", ".vdi")
"""Names of files that say that they are not raw."""


def check_target(target: str) -> None:
    """What would be a file of a strange name, or a raw one that is called otherwise.

    Raises UsageError.
    """
    values.check_text(target, "TARGET")
    if target in ("", "raw:", "qcow2:"):
        raise UsageError("TARGET is empty; name a file")
    if target == "-":
        raise UsageError(
            "TARGET is a file, which is written here and there, not in order: standard output can "
            "be none (a file that is called - is ./-)"
        )
    if _NBD_URI.match(target) or target.startswith(("raw:", "qcow2:")):
        return
    scheme = _SCHEME.match(target)
    if scheme is not None:
        raise UsageError(
            f"TARGET is a path, raw:PATH, qcow2:PATH or an NBD URI, not {scheme.group()}…; a raw "
            f"file of that name is raw:{target}"
        )
    suffix = os.path.splitext(target)[1].lower()
    if suffix in OTHER_FORMATS:
        advice = f"write qcow2:{target} for that, or " if suffix == ".qcow2" else "write "
        raise UsageError(
            f"{target} would be a raw file, whatever its name says; {advice}raw:{target} if you "
            "want one"
        )


def is_no_file(target: str) -> bool:
    """Whether it gets no name of its own at the end: a device, or an NBD URI."""
    from fleecenbd.client.options import PullOptions, find_places

    return find_places(PullOptions("", target, journal="-")).file is None
