"""The scenarios: those of the design's model that concern the engine, and more of its own.

Names as in the model where one is from there. Each is as small as the race that it is there for:
one to three clusters, two to four actors.
"""

from __future__ import annotations

from .arming import ARMING
from .copying import COPYING
from .mapping import MAPPING
from .releasing import RELEASING
from .waiting import WAITING

SCENARIOS = (*COPYING, *WAITING, *RELEASING, *MAPPING, *ARMING)
