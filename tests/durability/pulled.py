"""``fleecenbd`` as it is, but its pull makes durable, notes and releases many times a second.

    python -m tests.durability.pulled pull URI TARGET …

What the package lacks yet of sources and targets is stood in for (``standins``).
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from fleecenbd.cli.main import main
from fleecenbd.client import copy_loop, pull
from tests.durability import standins

pull.BATCH_LENGTH = 1 << 20
copy_loop.BATCH_S = 0.02

for name, opens in (("source", "open_source"), ("targets", "open_target")):
    whole = f"fleecenbd.client.{name}"
    if importlib.util.find_spec(whole) is None:
        module = ModuleType(whole)
        setattr(module, opens, getattr(standins, opens))
        module.Backing = standins.Backing  # type: ignore[attr-defined]
        sys.modules[whole] = module

if __name__ == "__main__":
    main()
