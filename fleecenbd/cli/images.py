"""Images opened for serving, with messages that say what to do."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from itertools import combinations

from fleecenbd.cli.errors import CommandError, UsageError, reason
from fleecenbd.cli.values import DiskSpec
from fleecenbd.engine.disk import Disk
from fleecenbd.storage.device import Device
from fleecenbd.storage.file import FileDevice
from fleecenbd.storage.locks import LockMode
from fleecenbd.storage.probe import PROBE_LENGTH, container_format


def open_disks(specs: Sequence[DiskSpec], *, read_only: bool, force_share: bool) -> list[Disk]:
    """Open, lock and look at every image that is a raw file or a block device.

    Raises CommandError. Blocks; needs no event loop.
    """
    check_all_different(specs)
    disks: list[Disk] = []
    try:
        for spec in specs:
            if spec.kind == "raw":
                device = _open(spec, read_only, force_share)
                disks.append(Disk(spec.name, device, discards=spec.discards))
    except BaseException:
        for disk in disks:
            disk.device.close()
        raise
    return disks


async def open_other(spec: DiskSpec, *, read_only: bool, force_share: bool) -> Disk:
    """Open what is no raw image: by a child of ours, or at another server. Raises CommandError."""
    # Only here: QMP, and libnbd, are for those who have such disks.
    device: Device
    try:
        if spec.kind == "nbd":
            from fleecenbd.storage.remote import open_remote

            device = await open_remote(spec.path, read_only=read_only)
        else:
            from fleecenbd.storage.qemu import open_qcow2

            device = await open_qcow2(
                spec.absolute, name=spec.image, read_only=read_only, locks=not force_share
            )
    except OSError as error:
        raise CommandError(f"cannot open disk {spec.name}: {reason(error, spec.image)}") from error
    if device.size == 0:
        device.close()
        raise CommandError(f"cannot open disk {spec.name}: {spec.image}: the image is empty")
    return Disk(spec.name, device, discards=spec.discards)


def check_all_different(specs: Sequence[DiskSpec]) -> None:
    """Two disks over one image would overwrite each other's past, whatever locks say."""
    _check_exports([spec for spec in specs if spec.kind == "nbd"])
    seen: dict[object, DiskSpec] = {}
    for spec in specs:
        identity: object
        if spec.kind == "nbd":
            continue
        try:
            status = os.stat(spec.path)
        except OSError:
            continue  # told when it is opened
        if stat.S_ISBLK(status.st_mode):
            identity = (True, status.st_rdev, 0)
        else:
            identity = (False, status.st_dev, status.st_ino)
        other = seen.setdefault(identity, spec)
        if other is not spec:
            raise _same(other, spec)


def _check_exports(specs: Sequence[DiskSpec]) -> None:
    if len(specs) < 2:
        return
    # Only here: a server that has no use for it starts without it.
    from fleecenbd.storage.nbd_places import leads_to_same

    for one, other in combinations(specs, 2):
        if leads_to_same(one.path, other.path):
            raise _same(one, other)


def _same(one: DiskSpec, other: DiskSpec) -> UsageError:
    return UsageError(f"{one.name} and {other.name} are the same image, {other.path}; give it once")


def _open(spec: DiskSpec, read_only: bool, force_share: bool) -> FileDevice:
    try:
        device = _kind_of(spec).open(
            spec.path, read_only=read_only, lock=LockMode.NONE if force_share else None
        )
    except OSError as error:
        text = reason(error, spec.path)
        if error.errno in (errno.EACCES, errno.EPERM):
            may = "read" if read_only else "read and write"
            text += (
                f" (run as somebody who may {may} it{'' if read_only else ', or try --read-only'})"
            )
        if spec.direct and error.errno == errno.ENOTSUP:
            text += "; serve it without --cache none, or from a disk"
        if error.errno == errno.ENOENT and os.path.exists(whole := f"{spec.name}={spec.path}"):
            text += f"; where the file {whole} is meant, write NAME={whole}"
        raise CommandError(f"cannot open disk {spec.name}: {text}") from error
    try:
        if device.size == 0:
            raise CommandError(
                f"cannot open disk {spec.name}: {spec.path}: the image is empty; "
                "give it a size (truncate -s 10G)"
            )
        if not spec.raw:
            _refuse_container(spec)
    except BaseException:
        device.close()
        raise
    return device


def _kind_of(spec: DiskSpec) -> type[FileDevice]:
    if not spec.direct:
        return FileDevice
    # Only here: a server that has no use for it starts without it.
    from fleecenbd.storage.direct import DirectDevice

    return DirectDevice


def _refuse_container(spec: DiskSpec) -> None:
    try:
        with open(spec.path, "rb", buffering=0) as file:
            kind = container_format(file.read(PROBE_LENGTH) or b"")
    except OSError as error:
        raise CommandError(
            f"cannot look into disk {spec.name}: {reason(error, spec.path)}"
        ) from error
    if kind is not None:
        raise CommandError(
            f"cannot open disk {spec.name}: {spec.path}: the content is a {kind} container, "
            "whose bytes a guest must not be handed as its disk; "
            + (
                f"write qcow2:{spec.path} to serve the disk in it, "
                if kind == "qcow2"
                else "convert it to a raw image, "
            )
            + f"or raw:{spec.path} if those bytes are what you mean"
        )
