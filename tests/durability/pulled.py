"""``fleecenbd`` as it is, but its pull makes durable, notes and releases many times a second.

python -m tests.durability.pulled pull URI TARGET …
"""

from __future__ import annotations

from fleecenbd.cli.main import main
from fleecenbd.client import copy_loop, pull

if __name__ == "__main__":
    pull.BATCH_LENGTH = 1 << 20
    copy_loop.BATCH_S = 0.02
    main()
