"""Recognise disk images that are containers, by their first bytes.

Served as raw, a container would hand the guest the container's own bytes: a disk that does not
boot, and an image destroyed by the first write.
"""

from __future__ import annotations

PROBE_LENGTH = 4096
"""Bytes of an image's beginning that are enough to tell."""

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"QFI\xfb\x00\x00\x00\x01", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\x00", "QED"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (64, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"conectix", "VHD"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"Bochs Virtual HD Image", "Bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
)
"""(offset, bytes, name); where two fit, the first one counts."""


def container_format(first_bytes: bytes) -> str | None:
    """The container's name ("qcow2", "VMDK", ...), or None where nothing speaks against raw.

    ``first_bytes``: the first ``PROBE_LENGTH`` bytes of the image, or all of a shorter one.
    A VHD of fixed size has its mark at its end only, and a raw image before it: it reads as raw.
    """
    for offset, signature, name in _SIGNATURES:
        if first_bytes.startswith(signature, offset):
            return name
    return None
