"""The README's Python runs, and its spec is one."""

import re
import subprocess
import sys
from pathlib import Path

from fedapt.protocols.recipes import RECIPES
from fedapt.protocols.spec import RunSpec

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_runs(tmp_path: Path) -> None:
    (code,) = snippets("python")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_spec_is_legal() -> None:
    (text,) = snippets("toml")
    RunSpec.parse(text)


def test_every_recipe_is_in_the_table() -> None:
    for name in RECIPES:
        assert f"| `{name}` |" in README
