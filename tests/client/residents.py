"""Real residents: processes of their own, on a plaintext link of this machine, with the builtin base and a few lines."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedapt.protocols.spec import RunSpec
from fedapt.server.link.doors import OpenDoor, named
from fedapt.server.link.hub import Hub
from fedapt.server.link.limits import Limits

SPEC = """
[run]
name = "resident"
rounds = 3
seed = 5
[model]
base = "builtin:byte-llama"
task = "causal-lm"
max_length = 32
[adapter]
rank = 2
targets = ["q_proj", "v_proj"]
[recipe]
name = "fedit"
[local]
optimizer = "adamw"
learning_rate = 5e-3
batch_size = 2
steps = 2
[participation]
minimum = 2
deadline_seconds = 120
"""

LINES = {
    "north": [
        "def sail(boat): return boat.wind",
        "for wave in sea: wave.crest()",
        "import anchor",
        "with harbour: moor()",
    ],
    "south": ["class Orchard: trees = []", "while ripe: pick(apple)", "assert cider", "yield from press(apples)"],
}

LIMITS = Limits(beat=0.2, silence=20.0, absence=60.0)


def spec_of(*overrides: str) -> RunSpec:
    return RunSpec.parse(SPEC, overrides=overrides)


def node_of(name: str) -> int:
    return named(name).node


def make_site(folder: Path, name: str, port: int, extra: str = "", policy: str = "") -> Path:
    """A site's folder, ready to start."""
    folder.mkdir(exist_ok=True)
    rows = "".join(f'{{"text": "{line}", "site": "{name}"}}\n' for line in LINES[name])
    (folder / "own.jsonl").write_text(rows, encoding="utf-8")
    text = (
        f'[server]\naddress = "127.0.0.1:{port}"\nplaintext = "{name}"\n[data]\nsource = "own.jsonl"\n'
        f"[train]\nthreads = 1\ncheckpoint_seconds = 0\n{extra}\n[policy]\n{policy}\n"
    )
    (folder / "client.toml").write_text(text, encoding="utf-8")
    return folder


@contextmanager
def hub() -> Iterator[Hub]:
    with Hub("127.0.0.1:0", OpenDoor(), credentials=None, limits=LIMITS) as own:
        yield own


@contextmanager
def resident(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`fedapt client start` in a process; killed at the end, if it has not ended itself."""
    command = [str(Path(sys.executable).with_name("fedapt")), "client", "start", "--folder", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
