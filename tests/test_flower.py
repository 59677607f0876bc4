"""Stock Flower: our ServerApp and ClientApp under `flwr run`, in Flower's own simulation (Ray)."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "flower-simulation"


@pytest.mark.slow
def test_the_example_runs_under_flwr_run(tmp_path: Path) -> None:
    assert find_spec("ray") is not None, "the slow suite needs the ray extra: `make test-slow` installs it"
    app, out, home = tmp_path / "app", tmp_path / "adapter", tmp_path / "flwr"
    shutil.copytree(EXAMPLE, app)
    manifest = app / "pyproject.toml"
    manifest.write_text(re.sub(r'^out = ""', f'out = "{out}"', manifest.read_text(), flags=re.MULTILINE))
    home.mkdir()
    (home / "config.toml").write_text('[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\n')
    environment = {**os.environ, "FLWR_HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    federation = "num-supernodes=4 client-resources-num-cpus=1"
    command = [str(Path(sys.executable).with_name("flwr")), "run", str(app), "local", "--stream"]
    done = subprocess.run(
        [*command, "--federation-config", federation],
        capture_output=True,
        text=True,
        timeout=540,
        env=environment,
        check=False,
    )
    log = done.stdout + done.stderr
    assert "fedapt round 2" in log, log[-4000:]
    assert (out / "adapter_model.safetensors").is_file(), log[-4000:]
