"""What has to be waited for before a command does anything: `fedapt --help`, and `fedapt simulate` to its first step.

python benchmarks/startup.py

Of --help, the wall clock of whole processes. Of simulate, the CPU time of one core between the end of the imports that
any script of torch, transformers and peft makes and the first training step: fedapt's own imports, the data (1,600 short
texts in a .jsonl file), the base, the adapter, the store and the draw of the first cohort. Medians of eleven.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FEDAPT = str(Path(sys.executable).with_name("fedapt"))

FIRST_STEP = """
import os, time
import torch, transformers, peft
from transformers import AutoModelForSequenceClassification, AutoTokenizer
before = time.process_time()
from fedapt.cli import main
from fedapt.client.trainer import Trainer
def train(*_, **__):
    print(time.process_time() - before, flush=True)
    os._exit(0)
Trainer.train = train
main()
"""

SPEC = """
run = { name = "startup", rounds = 1 }
model = { base = "builtin:byte-llama", task = "sequence-classification", labels = 2, max_length = 32 }
adapter = { rank = 8, targets = ["q_proj", "v_proj"] }
recipe = { name = "fedit" }
data = { source = "train.jsonl", evaluation_limit = 8, partition = { clients = 50 } }
"""


def help_seconds() -> float:
    started = time.perf_counter()
    subprocess.run([FEDAPT, "--help"], capture_output=True, check=True)
    return time.perf_counter() - started


def simulate_seconds(folder: Path, number: int) -> float:
    command = [sys.executable, "-P", "-c", FIRST_STEP, "simulate", "spec.toml", "--out", f"out{number}"]
    one_core = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=one_core).stdout)


def report(name: str, times: list[float]) -> None:
    times = sorted(times[1:])  # the first reads the files from disk
    print(f"{name}: median {statistics.median(times):.3f} s ({times[0]:.3f} to {times[-1]:.3f})")


def main() -> None:
    report("fedapt --help", [help_seconds() for _ in range(12)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = ({"text": f"a text of number {row}, as short as a sentence is", "label": row % 2} for row in range(1600))
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "spec.toml").write_text(SPEC)
        report(
            "fedapt simulate, CPU to the first step beyond imports", [simulate_seconds(folder, i) for i in range(12)]
        )


if __name__ == "__main__":
    main()
