"""The demo as a newcomer sees it: wall time, peak memory, and how far held-out perplexity falls.

python benchmarks/demo.py
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FEDAPT = str(Path(sys.executable).with_name("fedapt"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [FEDAPT, "demo", "--json", "--out", str(Path(folder, "demo"))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{seconds:.0f} s, peak {peak:.2f} GiB")
    for recipe, rows in json.loads(done.stdout)["recipes"].items():
        before, after = (rows[i]["evaluation"]["perplexity"] for i in (0, -1))
        error = rows[-1]["aggregation_error"]
        print(
            f"{recipe}: perplexity {before:.2f} -> {after:.2f} ({after / before - 1:+.0%}), aggregation error {error:.1e}"
        )


if __name__ == "__main__":
    main()
