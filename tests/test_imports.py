"""What an import costs: the server needs no torch, and the facade loads its layers only when they are used."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

WALK = """
import importlib, pkgutil, fedapt.{layer} as package
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("migrations.env"):  # Alembic runs it, and nobody imports it
        importlib.import_module(module.name)
"""


def loaded_by(code: str) -> set[str]:
    """The top-level packages in a fresh interpreter after it ran `code`."""
    script = f"{code}\nimport sys\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    ran = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


@pytest.mark.parametrize("layer", ["server", "client", "protocols", "privacy", "sim"])
def test_the_repository_root_is_not_importable(layer: str) -> None:
    """Hugging Face owns an import package `kernels`: with the root on sys.path, ours would stand in for it."""
    assert find_spec(layer) is None


def test_the_facade_loads_nothing_heavy() -> None:
    assert not loaded_by("import fedapt") & {"torch", "flwr", "sqlalchemy", "transformers", "peft", "numpy"}


@pytest.mark.parametrize("layer", ["server", "protocols", "privacy"])
def test_a_layer_without_torch(layer: str) -> None:
    assert not loaded_by(WALK.format(layer=layer)) & {"torch", "transformers", "peft"}


def test_the_check_would_see_torch() -> None:
    assert "torch" in loaded_by("import fedapt.protocols.keys, torch")
