"""The scenarios: what an executable model of the rules had, before there was an engine, and more.

Each is as small as the race that it is there for: one to three clusters, two to four actors.
"""

from __future__ import annotations

from .arming import ARMING
from .copying import COPYING
from .mapping import MAPPING
from .releasing import RELEASING
from .waiting import WAITING

SCENARIOS = (*COPYING, *WAITING, *RELEASING, *MAPPING, *ARMING)
