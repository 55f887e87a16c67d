"""What another process keeps, and can lose: who is told of it, and never too late."""

from __future__ import annotations

from collections.abc import Callable


class Losing:
    """A part of devices that others keep (device.Losable)."""

    _why_lost: str | None = None
    _on_lost: Callable[[str], None] | None = None

    @property
    def is_lost(self) -> bool:
        """Whether nothing that it held can be trusted, or read, any more."""
        return self._why_lost is not None

    @property
    def on_lost(self) -> Callable[[str], None] | None:
        """Called with the reason, once; at once where it is lost already."""
        return self._on_lost

    @on_lost.setter
    def on_lost(self, tell: Callable[[str], None] | None) -> None:
        self._on_lost = tell
        if tell is not None and self._why_lost is not None:
            tell(self._why_lost)

    def _lose(self, why: str) -> None:
        if self._why_lost is None:
            self._why_lost = why
            if self._on_lost is not None:
                self._on_lost(why)
