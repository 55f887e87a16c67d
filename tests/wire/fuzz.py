"""``python -m tests.wire.fuzz --seconds 60``: libFuzzer on each target; what it found, in words.

The targets are fuzz_handshake.py and fuzz_requests.py, which need atheris: `make fuzz` installs it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from tests.arguments import positive

TARGETS = ("handshake", "requests")
FOLDER = Path("build/fuzz")
LENGTH_MAX = 1200
RSS_MIB_MAX = 512
"""Of one fuzzer. It has some 50 MiB; a finding is whatever takes much more."""
ROOT = Path(__file__).parents[2]

_RUNS = re.compile(r"^stat::number_of_executed_units: (\d+)$", re.MULTILINE)
_FINDING = re.compile(r"Test unit written to (\S+)")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.wire.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=positive, default=60, help="of each target")
    options = parser.parse_args(arguments)
    verdicts = []
    good = True
    for name in TARGETS:
        print(f"fuzzing {name} for {options.seconds} s", flush=True)
        status, output = fuzz(name, options.seconds)
        clean, text = verdict(name, status, output)
        good &= clean
        verdicts.append(text)
    print("", *verdicts, sep="\n")
    return 0 if good else 1


def command(name: str, seconds: int) -> list[str]:
    """libFuzzer on a target: what it learns goes to ``FOLDER``/name, what it finds beside it."""
    return [
        sys.executable, "-m", f"tests.wire.fuzz_{name}", f"-max_total_time={seconds}",
        f"-max_len={LENGTH_MAX}", f"-rss_limit_mb={RSS_MIB_MAX}", "-verbosity=0",
        "-print_final_stats=1", f"-artifact_prefix={FOLDER / name}-",
        str(FOLDER / name), f"tests/wire/corpus/{name}",
    ]  # fmt: skip


def fuzz(name: str, seconds: int) -> tuple[int, str]:
    """Run one target; (exit status, what it printed, which is printed as it comes)."""
    (ROOT / FOLDER / name).mkdir(parents=True, exist_ok=True)
    lines = []
    with subprocess.Popen(
        command(name, seconds),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def verdict(name: str, status: int, output: str) -> tuple[bool, str]:
    """(nothing was found, a sentence that says so or where the finding is)."""
    runs = _RUNS.search(output)
    count = f"{int(runs[1]):,}" if runs else "an unknown number of"
    finding = _FINDING.search(output)
    if finding:
        return False, (
            f"{name}: a finding after {count} runs: {finding[1]}\n"
            f"replay: .venv/bin/python -m tests.wire.fuzz_{name} {finding[1]}"
        )
    if status or not runs:
        return False, (
            f"{name}: no finding, and no clean end: the fuzzer's exit status is {status}; "
            "its own words are above"
        )
    return True, f"{name}: no finding in {count} runs"


if __name__ == "__main__":
    sys.exit(main())
