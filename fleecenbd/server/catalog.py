"""The exports of a server by name: what a client finds, and why it does not find one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from fleecenbd.nbd.constants import NBD_REP_ERR_POLICY, NBD_REP_ERR_UNKNOWN
from fleecenbd.nbd.errors import NegotiationError, shown_name
from fleecenbd.server.exports import READ_ONCE, Export, FleecingExport

FINISHED_MAX = 20
"""Finished sessions that are remembered, for their reason."""
LISTED_MAX = 20
"""Export names in the message that refuses the empty name."""


class Exports(dict[str, Export]):
    """Exports by name. ``default``: what the empty name means; None: it is refused."""

    def __init__(self, default: str | None) -> None:
        super().__init__()
        self.default = default
        self._gone: deque[tuple[frozenset[str], str]] = deque(maxlen=FINISHED_MAX)
        """Of each finished session: the names of its exports, and its result."""

    def session_is_gone(self, names: Iterable[str], reason: str) -> None:
        """Remember why the exports of these names are not served any more."""
        self._gone.append((frozenset(names), reason))

    def find(self, name: str, backup_only: bool) -> Export:
        """The export for a client; ``backup_only``: of fleecing ones. Raises NegotiationError.

        DISK@SESSION+once is found, and not listed: a client that lists looks into what it finds.
        """
        if name == "":
            if self.default is None:
                raise NegotiationError(NBD_REP_ERR_POLICY, self._no_default(backup_only))
            name = self.default
        main = name.removesuffix(READ_ONCE)
        export = self.get(main)
        if isinstance(export, FleecingExport) and name != main:
            return export.reading_once()
        if export is None or name != main:
            for names, reason in reversed(self._gone):
                if main in names:
                    raise NegotiationError(NBD_REP_ERR_UNKNOWN, f"{shown_name(name)}: {reason}")
            raise NegotiationError(
                NBD_REP_ERR_UNKNOWN, f"there is no export called {shown_name(name)}"
            )
        if backup_only and export.is_guest:
            raise NegotiationError(
                NBD_REP_ERR_POLICY,
                f"{shown_name(name)} is a guest's disk; this listener serves backups only",
            )
        return export

    def listed(self, backup_only: bool) -> list[tuple[str, str]]:
        """Name and description of each."""
        return [
            (name, export.info.description)
            for name, export in self.items()
            if not (backup_only and export.is_guest)
        ]

    def _no_default(self, backup_only: bool) -> str:
        names = [name for name, _ in self.listed(backup_only)]
        shown = ", ".join(names[:LISTED_MAX]) + (", …" if len(names) > LISTED_MAX else "")
        return f"name an export: {shown or 'there is none yet'}"
