"""Peak memory: 500 virtual clients, 50 a round, against one client, on the same encoder.

    python benchmarks/memory.py --model MODEL_FOLDER --data SST2_FOLDER

Each case is a process of its own; the figure is its largest resident set (`ru_maxrss`), imports and base included.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

SPEC = """
[run]
name = "memory"
rounds = 2
[model]
base = '{model}'
task = "sequence-classification"
labels = 2
max_length = 64
[adapter]
targets = ["query", "value"]
[recipe]
name = "fedsvd"
[local]
batch_size = 16
steps = 1
[participation]
sampling = "fixed"
rate = {rate}
[data]
source = '{data}/train.jsonl'
evaluation = '{data}/dev.jsonl'
evaluation_limit = 64
[data.partition]
clients = {clients}
"""


def peak(clients: int, rate: float, model: Path, data: Path) -> float:
    """MiB at the peak of a run in a process of its own."""
    spec = SPEC.format(clients=clients, rate=rate, model=model.resolve(), data=data.resolve())
    done = subprocess.run([sys.executable, __file__, "--child"], input=spec, text=True, capture_output=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def child() -> None:
    from fedapt.protocols.spec import RunSpec
    from fedapt.simulation import run

    run(RunSpec.parse(sys.stdin.read()))
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    if "--child" in sys.argv:
        child()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    one = peak(1, 1.0, options.model, options.data)
    many = peak(500, 0.1, options.model, options.data)
    print(f"1 client: {one:.0f} MiB; 500 clients, 50 a round: {many:.0f} MiB; ratio {many / one:.2f}")


if __name__ == "__main__":
    main()
