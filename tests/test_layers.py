"""The import rule: protocols ← {kernels, privacy} ← {client, server} ← sim ← fedapt, without cycles (DESIGN §3)."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANK = {"protocols": 0, "kernels": 1, "privacy": 1, "client": 2, "server": 2, "sim": 3, "fedapt": 4}
LEARNING = {"torch", "transformers", "peft"}
FORBIDDEN = {"protocols": LEARNING, "server": LEARNING, "privacy": LEARNING | {"flwr"}, "kernels": {"flwr"}}


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name ⇒ file, as installed: the facade is `fedapt`, each other layer `fedapt.<layer>`."""
    modules = {}
    for layer in RANK:
        for file in sorted((root / layer).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            parts = parts if layer == "fedapt" else ("fedapt", *parts)
            modules[".".join(parts).removesuffix(".__init__")] = file
    return modules


def imports_of(module: str, file: Path) -> Iterator[str]:
    """Every dotted name that a module imports, wherever in it; `from x import y` gives `x.y`."""
    package = module.split(".") if file.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*above, *([node.module] if node.module else []), a.name]) for a in node.names)


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in RANK else "fedapt"


def problems(root: Path) -> list[str]:
    """Every broken rule, in words."""
    modules, found = modules_of(root), []
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        layer, graph[module] = layer_of(module), set()
        for name in imports_of(module, file):
            top = name.split(".")[0]
            if top in FORBIDDEN.get(layer, ()):
                found.append(f"{module} imports {name}: {layer} must not know {top}")
            if top in RANK and top != "fedapt":
                found.append(f"{module} imports {name}: a layer is imported as fedapt.{top}")
            if top != "fedapt":
                continue
            target = name
            while target not in modules and "." in target:
                target = target.rpartition(".")[0]
            graph[module].add(target)
            if layer_of(target) != layer and RANK[layer_of(target)] >= RANK[layer]:
                found.append(f"{module} imports {name}: {layer} stands below {layer_of(target)}, or beside it")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("a cycle of imports: " + " → ".join(reversed(error.args[1])))
    return found


def test_imports_go_one_way() -> None:
    assert problems(ROOT) == []


def test_the_layers_are_there() -> None:
    """An empty tree would pass every rule."""
    assert {layer_of(module) for module in modules_of(ROOT)} == set(RANK)
    assert "fedapt.protocols.errors" in set(imports_of_all(ROOT))


def imports_of_all(root: Path) -> Iterator[str]:
    for module, file in modules_of(root).items():
        for name in imports_of(module, file):
            yield from (name, name.rpartition(".")[0])


def plant(root: Path, files: dict[str, str]) -> Path:
    for layer in RANK:
        (root / layer).mkdir()
        (root / layer / "__init__.py").touch()
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


VIOLATIONS = {
    "a back edge": ({"protocols/a.py": "from fedapt.server import x"}, "protocols stands below server"),
    "a relative back edge": ({"kernels/a.py": "from ..client import x"}, "kernels stands below client"),
    "a back edge to the facade": ({"sim/a.py": "import fedapt.cli"}, "sim stands below fedapt"),
    "a back edge by the bare facade": ({"sim/a.py": "from .. import demo"}, "sim stands below fedapt"),
    "a back edge from a subpackage": ({"privacy/deep/a.py": "from ...sim import x"}, "privacy stands below sim"),
    "a back edge from a package": ({"privacy/deep/__init__.py": "from ... import server"}, "privacy stands below serv"),
    "client to server": ({"client/a.py": "from ..server import x"}, "client stands below server, or beside it"),
    "server to client": ({"server/a.py": "import fedapt.client as c"}, "server stands below client, or beside it"),
    "an import inside a function": (
        {"protocols/a.py": "def f():\n    if True:\n        from ..sim import x"},
        "protocols stands below sim",
    ),
    "a cycle": (
        {"server/a.py": "from .b import x", "server/b.py": "from . import c", "server/c.py": "import fedapt.server.a"},
        "a cycle of imports",
    ),
    "a module that imports its package's names": (
        {"client/__init__.py": "from .a import x", "client/a.py": "from . import y"},
        "a cycle of imports",
    ),
    "torch in the server": ({"server/a.py": "import torch.nn"}, "server must not know torch"),
    "torch in a function of the server": ({"server/a.py": "def f():\n    import torch"}, "server must not know torch"),
    "peft in protocols": ({"protocols/a.py": "from peft import LoraConfig"}, "protocols must not know peft"),
    "transformers in privacy": ({"privacy/a.py": "import transformers"}, "privacy must not know transformers"),
    "Flower in kernels": ({"kernels/a.py": "from flwr.app import Array"}, "kernels must not know flwr"),
    "Flower in privacy": ({"privacy/a.py": "import flwr"}, "privacy must not know flwr"),
    "a layer by its folder's name": ({"client/a.py": "from kernels import x"}, "imported as fedapt.kernels"),
}


@pytest.mark.parametrize(("files", "expected"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_a_planted_violation_is_found(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    found = problems(plant(tmp_path, files))
    assert any(expected in problem for problem in found), found


def test_a_legal_tree_passes(tmp_path: Path) -> None:
    files = {
        "kernels/a.py": "import torch\nfrom ..protocols import x",
        "server/deep/a.py": "from ...privacy.noise import x\nfrom .. import b\nfrom flwr.app import Message",
        "server/b.py": "import fedapt.kernels.a",
        "client/a.py": "import torch, peft\nfrom ..kernels.a import x\nfrom .b import y",
        "client/b.py": "",
        "sim/a.py": "from ..client import a\nfrom ..server import b",
        "fedapt/cli.py": "from . import sim\nfrom .client.a import x\nfrom .demo import y",
        "fedapt/demo.py": "from fedapt.sim.a import x",
    }
    assert problems(plant(tmp_path, files)) == []
