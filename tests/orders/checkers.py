"""The simulation's checkers, for a world in which events come between any two callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.simulation.calls import CHANGES, Call
from tests.simulation.checkers import Checkers
from tests.simulation.world import SimDisk

if TYPE_CHECKING:
    from .world import OrderWorld


class OrderCheckers(Checkers):
    """The simulation's checkers, exact about the step in which an active write starts.

    The engine counts an active write in the step that starts it; its device call begins when the
    task made for it has its turn. Where events come between any two callbacks, an arming can begin
    to hold the guests in between: it waits for the counted write as for any other.
    """

    def __init__(self, world: OrderWorld) -> None:
        super().__init__(world)
        self.counted: dict[str, int] = {}
        """By disk: writes counted before the arming's hold whose calls have not begun."""

    def held(self, disk: SimDisk) -> None:
        """An arming holds the disk's guests from now on."""
        begun = sum(call.kind in CHANGES for call in disk.device.calls)
        self.counted[disk.name] = disk.engine_disk.active_writes - begun

    def call_began(self, device: Any, call: Call) -> None:
        disk = self.world.disk_of.get(device)
        if disk is None or call.kind not in CHANGES or not self.counted.get(disk.name):
            super().call_began(device, call)
            return
        self.counted[disk.name] -= 1
        holds, disk.holds = disk.holds, 0
        super().call_began(device, call)
        disk.holds = holds
