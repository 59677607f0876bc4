"""Memory that a step frees is there for the next one, without a page fault."""

import subprocess
import sys

import pytest

STEPS = """
import resource, sys
from fedapt.sim.memory import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("unknown")
before = 0
for step in range(20):
    if step == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    done = subprocess.run([sys.executable, "-P", "-c", STEPS, way], capture_output=True, text=True, check=False)
    if "unknown" in done.stderr:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_step_takes_the_memory_of_the_one_before() -> None:
    assert faults("kept") < 2**10
    assert faults("as it comes") > 2**12, "the negative control: each step asks the kernel anew"
