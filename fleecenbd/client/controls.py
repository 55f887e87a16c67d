"""What can be said to a pull while it works: pause, go on, so many bytes per second."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fleecenbd.client.rate import Rate

if TYPE_CHECKING:
    from fleecenbd.client.copy_loop import CopyLoop


class Controls:
    """Made before the pull, and usable before it copies."""

    def __init__(self, bytes_per_s: float | None = None) -> None:
        self.rate = Rate(bytes_per_s)
        self.is_paused = False
        self.keeps = False
        """What is durable stays for ``resume`` if the pull fails now, whatever was asked for."""
        self._copying: CopyLoop | None = None

    def attach(self, copying: CopyLoop) -> None:
        """From now on it is this loop that is told."""
        self._copying = copying
        copying.paused = self.is_paused

    def pause(self) -> None:
        """Read nothing more. What was read already, as whole blocks, still becomes durable."""
        self._set_paused(True)

    def resume(self) -> None:
        """Go on."""
        self._set_paused(False)

    def set_rate(self, bytes_per_s: float | None) -> None:
        """Bytes read per second; None: no limit."""
        self.rate.set(bytes_per_s)

    def _set_paused(self, paused: bool) -> None:
        self.is_paused = paused
        if self._copying is not None:
            self._copying.paused = paused
