"""Stock Flower: our ServerApp and ClientApp under `flwr run`, in Flower's own simulation (Ray)."""

import shutil
from pathlib import Path

import pytest

from .flwr_run import flwr_run

EXAMPLE = Path(__file__).parents[1] / "examples" / "flower-simulation"


@pytest.mark.slow
def test_the_example_runs_under_flwr_run(tmp_path: Path) -> None:
    app, out = tmp_path / "app", tmp_path / "adapter"
    shutil.copytree(EXAMPLE, app)
    log = flwr_run(app, tmp_path / "flwr", f'out="{out}"')
    assert "fedapt round 2" in log, log[-4000:]
    assert (out / "adapter_model.safetensors").is_file(), log[-4000:]
