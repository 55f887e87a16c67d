"""What a server's command line knows, and the server asks for: where images and clients are."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Protocol

from fleecenbd.engine.disk import Disk
from fleecenbd.engine.session import MakeTemp
from fleecenbd.server.temp_place import TempPlace


class Places(Protocol):
    """Where things are."""

    temp: TempPlace
    """Where temp images are, and of what kind, where a session does not say."""

    temp_reserve: int | None
    """As SessionOptions has it, where a session does not say."""

    def make_temp(self, session: str, place: TempPlace) -> MakeTemp:
        """Who makes the temp images of a session. Raises OSError where there is no place."""

    def open_disk(self, name: str, image: str) -> Awaitable[Disk]:
        """Open, lock and check the image of a disk to come. Raises OSError."""

    def uris(self, export: str) -> Sequence[str]:
        """The NBD URIs that lead to an export."""
