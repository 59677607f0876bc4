"""`flwr run` in a process of its own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil


def flwr_run(app: Path, home: Path, config: str) -> str:
    """What `flwr run` prints with four virtual nodes; `home` is where Flower keeps its own things."""
    assert find_spec("ray") is not None, "the slow suite needs the ray extra: `make test-slow` installs it"
    home.mkdir()
    (home / "config.toml").write_text('[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\n')
    environment = {**os.environ, "FLWR_HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    command = [str(Path(sys.executable).with_name("flwr")), "run", str(app), "local", "--stream"]
    command += ["--federation-config", "num-supernodes=4 client-resources-num-cpus=1", "--run-config", config]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=540, env=environment, check=False)
    finally:
        _stop_superlink(home)
    return done.stdout + done.stderr


def _stop_superlink(home: Path) -> None:
    """`flwr run` leaves the SuperLink that it starts for a local run."""
    for process in psutil.process_iter(["cmdline"]):
        if any(str(home) in word for word in process.info["cmdline"] or ()):
            process.terminate()
