"""What a begin asks for, and how that is known again after a restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fleecenbd.engine.recording import BitmapRequest
from fleecenbd.engine.session import Session, SessionOptions
from fleecenbd.server.hooks import HOOK_TIMEOUT_S
from fleecenbd.server.temp_place import OWN_FILES, TempPlace, place_of


@dataclass(frozen=True)
class Ask:
    """What a begin asks for; two that are equal ask for the same.

    ``disks`` None: all. ``owner``: who may ask again; None: nobody. ``freeze``, ``thaw``:
    commands around arming; None: none.
    """

    disks: tuple[str, ...] | None = None
    options: SessionOptions = field(default_factory=SessionOptions)
    owner: str | None = None
    ttl_s: float | None = None
    idle_ttl_s: float | None = None
    freeze: str | None = None
    thaw: str | None = None
    bitmap: BitmapRequest | None = None
    temp: TempPlace = OWN_FILES
    hook_timeout_s: float = HOOK_TIMEOUT_S


def lasting(ask: Ask) -> dict[str, str | int | float | bool | None]:
    """What the next server must know to keep the session: all but what the session itself knows."""
    return {
        "all_disks": ask.disks is None,
        "ttl_s": ask.ttl_s,
        "idle_ttl_s": ask.idle_ttl_s,
        "freeze": ask.freeze,
        "thaw": ask.thaw,
        "hook_timeout_s": ask.hook_timeout_s,
        "bitmap": None if ask.bitmap is None else ask.bitmap.name,
        "bitmap_mode": None if ask.bitmap is None else ask.bitmap.mode,
        "granularity": None if ask.bitmap is None else ask.bitmap.granularity,
        **ask.temp.lasting(),
    }


def ask_of(session: Session, extra: Mapping[str, Any]) -> Ask:
    """The ask of a session that the last server began, ``extra`` being what it noted."""
    names = tuple(fleece.disk.name for fleece in session.fleeces)
    bitmap = None
    if extra.get("bitmap") is not None:
        bitmap = BitmapRequest(extra["bitmap"], extra["bitmap_mode"], extra["granularity"])
    same = ("ttl_s", "idle_ttl_s", "freeze", "thaw", "hook_timeout_s")
    return Ask(
        disks=None if extra.get("all_disks") else names,
        options=session.options,
        owner=session.owner,
        bitmap=bitmap,
        temp=place_of(extra),
        **{name: extra[name] for name in same if name in extra},
    )
