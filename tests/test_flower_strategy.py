"""A recipe in somebody else's Flower app: the example under `flwr run`, in Flower's own simulation (Ray)."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "flower-strategy"
LINE = re.compile(r"round (\d+): accuracy ([\d.]+), aggregation error (\S+)$", re.MULTILINE)


def flwr_run(app: Path, home: Path, config: str) -> str:
    """What `flwr run` prints with four virtual nodes; `home` is where Flower keeps its own things."""
    assert find_spec("ray") is not None, "the slow suite needs the ray extra: `make test-slow` installs it"
    home.mkdir()
    (home / "config.toml").write_text('[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\n')
    environment = {**os.environ, "FLWR_HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    command = [str(Path(sys.executable).with_name("flwr")), "run", str(app), "local", "--stream"]
    command += ["--federation-config", "num-supernodes=4 client-resources-num-cpus=1", "--run-config", config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, env=environment, check=False)
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "exact"), [("fedsvd", True), ("rolora", True), ("fedit", False)])
def test_the_example_learns_under_flwr_run(tmp_path: Path, recipe: str, exact: bool) -> None:
    """fedit, which is not exact, shows that the error is measured."""
    app = tmp_path / "app"
    shutil.copytree(EXAMPLE, app)
    log = flwr_run(app, tmp_path / "flwr", f'recipe="{recipe}"')
    rounds = [(int(n), float(accuracy), float(error)) for n, accuracy, error in LINE.findall(log)]
    assert [n for n, _, _ in rounds] == [1, 2, 3, 4, 5], log[-4000:]
    assert rounds[-1][1] > rounds[0][1], rounds
    assert all((error < 1e-6) == exact for _, _, error in rounds), rounds
    assert "is left out" not in log, log[-4000:]
