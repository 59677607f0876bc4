"""The wheel holds every file of every layer: the folders stand at the root, and setup.py maps them."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["protocols", "kernels", "privacy", "client", "server", "sim"]

pytestmark = pytest.mark.slow
ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in: a build folder left from before would hide a file that setup.py forgets."""
    copy = tmp_path_factory.mktemp("source")
    for folder in ["fedapt", *LAYERS]:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> set[str]:
    """The names in the wheel, built by the backend itself: no network, and no pip needed."""

    folder = source / "dist"
    script = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    ran = subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    with zipfile.ZipFile(next(folder.glob("fedapt-*.whl"))) as archive:
        return set(archive.namelist())


def files_of(source: Path) -> set[str]:
    """Every file of the layers, by its name once installed."""
    facade = {str(f.relative_to(source)) for f in (source / "fedapt").rglob("*") if f.is_file()}
    below = {f"fedapt/{f.relative_to(source)}" for d in LAYERS for f in (source / d).rglob("*") if f.is_file()}
    return facade | below


def test_every_file_is_in_the_wheel(source: Path, wheel: set[str]) -> None:
    assert files_of(source) - wheel == set()
    assert {"fedapt/py.typed", "fedapt/protocols/spec.py", "fedapt/kernels/lowrank.py"} <= wheel


def test_nothing_else_is_in_the_wheel(source: Path, wheel: set[str]) -> None:
    """Above all no top-level `kernels`, which belongs to Hugging Face."""
    rest = wheel - files_of(source)
    assert {name.partition("/")[0] for name in rest} == {"fedapt-0.1.0.dist-info"}
