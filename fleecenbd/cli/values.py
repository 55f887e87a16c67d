"""Values as they are typed: disks, names, sizes, modes. Every function raises UsageError."""

from __future__ import annotations

import grp
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from fleecenbd.cli.errors import UsageError
from fleecenbd.server.names import WHAT_NAMES_ARE, bad_name, is_name

_SIZE = re.compile(r"([0-9]+)(?:([kmgtp])(?:ib)?)?", re.IGNORECASE)
_NBD_URI = re.compile(r"(nbds?(\+unix|\+vsock)?)://")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_RAW = "raw:"
_QCOW2 = "qcow2:"
_UNITS = ("", "k", "m", "g", "t", "p")

PORT_MAX = 65535
PERIOD_MAX_S = 1e9


@dataclass(frozen=True)
class DiskSpec:
    """A disk as given on the command line: ``[NAME=]IMAGE``.

    ``path``: of the image, or an NBD URI. ``raw``: written as ``raw:PATH``, so that its content is
    not looked at.
    """

    name: str
    path: str
    raw: bool = False
    kind: Literal["raw", "qcow2", "nbd"] = "raw"
    direct: bool = False
    """A raw image is opened with O_DIRECT."""
    discards: bool = True
    """What its guest discards is freed."""

    @property
    def absolute(self) -> str:
        """The path, for who is in another folder."""
        return os.path.abspath(self.path)

    @property
    def image(self) -> str:
        """As it is shown, and as it can be typed again."""
        return f"{_QCOW2}{self.path}" if self.kind == "qcow2" else self.path


def parse_disk(text: str) -> DiskSpec:
    """``[NAME=]IMAGE``; NAME stands before the first ``/`` and defaults to the file's stem."""
    name, equals, image = text.partition("=")
    if not equals or "/" in name or name.startswith((_RAW, _QCOW2)):
        name, equals, image = "", "", text
    elif not is_name(name):
        raise UsageError(
            f"{text}: {name!r} before the '=' cannot be a disk's name: {WHAT_NAMES_ARE}; "
            f"where {text} is the file, write NAME={text}"
        )
    kind: Literal["raw", "qcow2", "nbd"] = "raw"
    raw = image.startswith(_RAW)
    if raw:
        image = image.removeprefix(_RAW)
    elif image.startswith(_QCOW2):
        image, kind = image.removeprefix(_QCOW2), "qcow2"
    elif _NBD_URI.match(image):
        try:
            place = urlsplit(image)
            _ = place.port
        except ValueError as error:
            raise UsageError(f"{text}: {error}") from None
        if not equals:
            name = unquote(place.path.removeprefix("/"))
            if not is_name(name):
                raise UsageError(
                    f"{text}: its export's name, {name!r}, cannot be a disk's: {WHAT_NAMES_ARE}; "
                    f"write NAME={text}"
                )
        return DiskSpec(name, image, kind="nbd")
    elif uri := _URI.match(image):
        raise UsageError(
            f"{text}: disks cannot be served from {uri[0]}; give a raw image, a block device, "
            "qcow2:PATH or an NBD URI (what QEMU or nbdkit can open, they can serve by NBD)"
        )
    if not image:
        raise UsageError(f"{text!r} names no image; write [NAME=]IMAGE")
    if not equals:
        name = Path(image).stem
        if not is_name(name):
            raise UsageError(_bad_stem(text, name, image, raw=raw))
    return DiskSpec(name, image, raw, kind)


def _bad_stem(text: str, stem: str, image: str, *, raw: bool) -> str:
    before, equals, after = image.partition("=")
    if raw and equals and is_name(before) and after:
        return (
            f"{text}: {_RAW} goes before the path, after NAME=: write {before}={_RAW}{after}, "
            f"or NAME={text} where {image} is the file"
        )
    message = (
        f"{text}: {stem!r}, of the file's name, cannot be a disk's name: {WHAT_NAMES_ARE}; "
        f"write NAME={text}"
    )
    if equals and before and not text.startswith((".", "/")):
        message += f", where {text} is the file; {before!r} is no NAME, for it has a '/'"
    return message


def parse_disks(texts: Sequence[str]) -> tuple[DiskSpec, ...]:
    """As ``parse_disk``, and no name may come twice."""
    disks: dict[str, DiskSpec] = {}
    for text in texts:
        disk = parse_disk(text)
        other = disks.setdefault(disk.name, disk)
        if other is not disk:
            raise UsageError(
                f"two disks are called {disk.name}: {other.image} and {disk.image}; "
                "write NAME=IMAGE to name them apart"
            )
    return tuple(disks.values())


def check_name(text: str, whose: str) -> str:
    """The text, if it can be a name; ``whose``: "a session", for the message."""
    if not is_name(text):
        raise UsageError(bad_name(text, whose))
    return text


def check_text(text: str, what: str) -> str:
    """A word that is written down, as JSON. Raises UsageError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{what}: {text!r} is no UTF-8 text, as what is noted of it must be; name it otherwise"
        ) from None
    return text


def parse_size(text: str, option: str) -> int:
    """Bytes of ``4096``, ``64k``, ``10G``, ``1MiB``: units are powers of 1024."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{option}: {text!r} is no size; write it as 4096, 64k, 1MiB or 10G")
    number, unit = match.groups()
    # A decimal of any length would cost time; sizes are below 2**63.
    size = int(number[:20]) << 10 * _UNITS.index((unit or "").lower())
    if len(number) > 20 or size >= 1 << 63:
        raise UsageError(f"{option}: {text} is more than any disk holds")
    return size


def parse_size_or_none(text: str, option: str, none: int | None) -> int | None:
    """The same, or ``none`` for "none"."""
    if text == "none":
        return none
    try:
        return parse_size(text, option)
    except UsageError as error:
        raise UsageError(f"{error}; or none") from None


def parse_port(text: str, option: str) -> int:
    """A TCP port; 0 stands for any."""
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > PORT_MAX:
        raise UsageError(f"{option}: {text!r} is no port: 0 to {PORT_MAX}")
    return int(text)


def parse_count(text: str, option: str) -> int:
    """A number of connections; 0 stands for any."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(f"{option}: {text!r} is no number of connections; 0 is for any number")
    return int(text)


def parse_seconds(text: str, option: str) -> float:
    """A length of time, as in 20 or 0.5."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UsageError(f"{option}: {text!r} is no time: 0 or more seconds")
    return seconds


def parse_period(text: str, option: str) -> float:
    """A length of time after which something ends: more than 0 seconds."""
    seconds = parse_seconds(text, option)
    if not 0 < seconds <= PERIOD_MAX_S:
        raise UsageError(f"{option}: {text!r} is no time after which it could end; more than 0")
    return seconds


def parse_address(text: str, option: str) -> tuple[str, int]:
    """Host and port of ``127.0.0.1:9100``, ``[::1]:9100``, ``host:9100``."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host:
        raise UsageError(f"{option}: {text!r} is no ADDR:PORT, as in 127.0.0.1:9100 or [::1]:9100")
    return host, parse_port(port, option)


def parse_mode(text: str) -> int:
    """Permission bits of ``660``, ``0660`` or ``0o660``."""
    if not re.fullmatch(r"(0o?)?[0-7]{3}", text):
        raise UsageError(f"--socket-mode: {text!r} is no mode; write three octal digits, as in 660")
    return int(text[-3:], 8)


def parse_group(text: str) -> int:
    """The id of a group given by name or by number."""
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except (KeyError, ValueError):
        raise UsageError(f"--socket-group: there is no group called {text!r}") from None
