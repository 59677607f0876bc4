"""The image's build context: what pip needs, and nothing of what lies beside it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_image_is_built_from_the_program_alone() -> None:
    """The build copies the whole context, so a name that is not let in cannot be in a layer."""
    lines = (ROOT / ".containerignore").read_text(encoding="utf-8").splitlines()
    first, *patterns = [line for line in lines if not line.startswith("#")]
    assert first == "*", "everything is left out but what follows"
    allowed = {pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")}
    assert {pattern for pattern in patterns if not pattern.startswith("!")} == {"**/__pycache__"}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert allowed == packages | {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
    assert all((ROOT / name).exists() for name in allowed)
    assert "COPY . .\n" in (ROOT / "examples/deploy/Containerfile").read_text(encoding="utf-8")
