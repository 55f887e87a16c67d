"""Settings of the process: buffers come back from the heap."""

import subprocess
import sys

PROGRAM = """
import resource, sys
from fleecenbd.cli.process import keep_buffers_on_the_heap
if sys.argv[1] == "tuned":
    keep_buffers_on_the_heap()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def replies(count):
    for _ in range(count):
        held = [b"x" * (256 << 10) for _ in range(8)]
replies(10)
before = faults()
replies(100)
print(faults() - before)
"""


def _page_faults(how: str) -> int:
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_buffers_of_replies_are_reused_and_not_paged_in_anew() -> None:
    untuned = _page_faults("untuned")
    tuned = _page_faults("tuned")
    assert untuned > 1000
    assert tuned < untuned / 20
