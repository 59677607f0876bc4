"""A recipe in somebody else's Flower app: the example under `flwr run`, in Flower's own simulation (Ray)."""

import re
import shutil
from pathlib import Path

import pytest

from .flwr_run import flwr_run

EXAMPLE = Path(__file__).parents[1] / "examples" / "flower-strategy"
LINE = re.compile(r"round (\d+): accuracy ([\d.]+), aggregation error (\S+)$", re.MULTILINE)


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
