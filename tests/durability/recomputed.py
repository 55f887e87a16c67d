"""The checksum of a file computed anew by the very lines that docs/pull.md prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "pull.md"


def recomputed(checksum: Path, image: Path) -> str:
    """The root, by the page's program: ``python checksum.py CHECKSUM IMAGE``."""
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", program, checksum, image],
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()
