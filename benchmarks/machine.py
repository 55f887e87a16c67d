"""The machine and the versions that figures come from, and how busy the machine was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import clients

ROOT = Path(__file__).parents[1]

COMMANDS = ("qemu-storage-daemon", "qemu-nbd", "qemu-img", "nbdkit", "nbdcopy", "fio")
LIBRARIES = ("bitarray", "uvloop")
BUSY_CORES = 0.3
"""Cores' worth of others' work, past which figures are not to be believed."""
SAMPLE_S = 1.0


def machine() -> dict[str, object]:
    """What the figures depend on; nothing that names the machine."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name", ":") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "system": _field("/etc/os-release", "PRETTY_NAME", "=").strip('"'),
    }


def versions() -> dict[str, str]:
    """Every program's own words. Raises RuntimeError for one that is missing."""
    found = {"fleecenbd": importlib.metadata.version("fleecenbd")}
    found["python"] = platform.python_version()
    for library in LIBRARIES:
        found[library] = importlib.metadata.version(library)
    for command in COMMANDS:
        found[command] = clients.run([command, "--version"]).splitlines()[0]
    return found


def commit(checkout: Path = ROOT) -> str:
    """The commit that is measured, and whether files of it were changed since."""
    try:
        name = _git(checkout, "rev-parse", "--short=12", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--", "fleecenbd", "benchmarks")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name} with changes" if changed else name


def busy_cores() -> float:
    """Cores' worth of work that others do now, for a second: while we do nothing."""
    before = _core_seconds()
    time.sleep(SAMPLE_S)
    return round(max(0.0, _core_seconds() - before) / SAMPLE_S, 2)


def warning(busy: Sequence[float]) -> str:
    """A sentence where others were at work before a round, else nothing."""
    if max(busy) <= BUSY_CORES:
        return ""
    return (
        f"Others kept {max(busy):g} cores busy before a round began: the figures are not to be "
        "believed. Run this on a machine that does nothing else."
    )


def _core_seconds() -> float:
    """Since the start, in all cores: everything but idle and waiting; stolen time included."""
    first = Path("/proc/stat").read_text().splitlines()[0].split()
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _git(checkout: Path, *words: str) -> str:
    # The owner of the checkout may be somebody else than who measures.
    command = ["git", "-c", f"safe.directory={checkout}", "-C", str(checkout), *words]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def _field(path: str, name: str, separator: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(separator)
        if key.strip() == name:
            return value.strip()
    return ""
