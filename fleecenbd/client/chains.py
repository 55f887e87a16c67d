"""How long a chain of qcow2 files may get before QEMU cannot open it any more.

QEMU makes a backing file's path from the folder of the file that names it and the name in there,
and does not take ``..`` out:

    /backup/vm/C/vda.qcow2 ▶ /backup/vm/C/../B/vda.qcow2 ▶ /backup/vm/C/../B/../A/vda.raw

Each night in a folder of its own adds its name, and a path of PATH_MAX bytes is one too long
(measured, QEMU 7.2). In one folder nothing is added, but QEMU opens every file of the chain, each
takes a descriptor, and a process has 1024 where nobody has asked for more.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from fleecenbd.client.records import Found

PATH_LENGTH_MAX = 4096 - 256
"""Bytes: PATH_MAX, and some for a folder that is moved, or mounted elsewhere, to be restored."""
FILES_MAX = 500

_HEADER = struct.Struct(">4sIQI")
"""Magic, version, offset and length of the backing file's name: QEMU's docs/interop/qcow2.txt."""
_MAGIC = b"QFI\xfb"
_NAME_LENGTH_MAX = 1023


def why_too_long(found: Found, final: Path) -> str | None:
    """Why nothing more can be put on a backup: a chain that begins at ``final``. None: it can.

    Raises OSError.
    """
    first = os.path.relpath(found.path.resolve(), final.parent.resolve())
    path = str(final.parent.resolve() / final.name)
    count = 1
    for name in (first, *_backing_names(found.path)):
        path = os.path.join(os.path.dirname(path), name)
        count += 1
        if len(os.fsencode(path)) > PATH_LENGTH_MAX or count > FILES_MAX:
            return (
                f"the chain that ends in {found.path} is as long as QEMU can open it: with one "
                "more file it might never be restored"
            )
    return None


def _backing_names(path: Path) -> Iterator[str]:
    """What each file of a chain says that it builds on."""
    while (name := backing_name(path)) is not None:
        yield name
        path = path.parent / name


def backing_name(path: Path) -> str | None:
    """What a qcow2 file builds on, as it says; None: it is no such file, or builds on nothing.

    Raises OSError.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        magic, _, offset, length = _HEADER.unpack(header)
        if magic != _MAGIC or not offset or not 0 < length <= _NAME_LENGTH_MAX:
            return None
        file.seek(offset)
        return os.fsdecode(file.read(length))
