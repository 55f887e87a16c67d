"""What ``fleecenbd serve`` was asked to do; what contradicts itself is refused here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fleecenbd.cli.endpoints import Addresses
from fleecenbd.cli.errors import UsageError
from fleecenbd.cli.values import DiskSpec
from fleecenbd.engine.session import SessionOptions


@dataclass(frozen=True)
class ServeOptions:
    """All that the server needs to know. ``addresses`` None: --single, or socket activation."""

    disks: tuple[DiskSpec, ...]
    addresses: Addresses | None
    state_directory: Path | None = None
    guests_directory: Path | None = None
    """Where it is noted which guests are connected; None: nowhere."""
    session: str | None = None
    session_options: SessionOptions = field(default_factory=SessionOptions)
    default_export: str | None = None
    read_only: bool = False
    force_share: bool = False
    shared: int = 1
    pidfile: Path | None = None
    command: str | None = None

    @property
    def exports(self) -> list[str]:
        """The names of all exports, guest disks first."""
        names = [disk.name for disk in self.disks]
        if self.session is not None:
            names += [f"{disk.name}@{self.session}" for disk in self.disks]
        return names

    @property
    def empty_name(self) -> str | None:
        """The export that the empty name means.

        None but for --default-export, with one exception: a client that started the server for
        itself, over one disk and a session, means the fleecing export.
        """
        if self.default_export is not None:
            return self.default_export
        if self.addresses is None and self.session is not None and len(self.disks) == 1:
            return f"{self.disks[0].name}@{self.session}"
        return None

    @property
    def command_export(self) -> str:
        """The export that ``$uri`` names for --run; "" where nothing says which."""
        if self.default_export is not None:
            return self.default_export
        if len(self.disks) > 1:
            return ""
        return self.exports[-1]


def check_default_export(options: ServeOptions) -> None:
    """Raise UsageError if the default export is none of the exports."""
    if options.default_export is not None and options.default_export not in options.exports:
        raise UsageError(
            f"--default-export: there will be no export called {options.default_export!r}; "
            f"there will be {', '.join(options.exports)}"
        )


def refuse_together(given: dict[str, bool], why: str) -> None:
    """Raise UsageError for the first of the options (name: was it given) that was given."""
    for name, was_given in given.items():
        if was_given:
            raise UsageError(f"{name} cannot be given {why}")
