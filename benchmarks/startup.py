"""How long a command takes before it does anything: `fedapt --help`, whole processes, median of eleven.

python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

FEDAPT = str(Path(sys.executable).with_name("fedapt"))


def seconds() -> float:
    started = time.perf_counter()
    subprocess.run([FEDAPT, "--help"], capture_output=True, check=True)
    return time.perf_counter() - started


def main() -> None:
    seconds()  # the first reads the files from disk
    times = sorted(seconds() for _ in range(11))
    print(f"fedapt --help: median {statistics.median(times):.3f} s ({times[0]:.3f} to {times[-1]:.3f})")


if __name__ == "__main__":
    main()
