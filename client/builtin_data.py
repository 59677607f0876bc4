"""Data that every installation already has: the source of Python's standard library, and scikit-learn's digits."""

import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from .table import Table

# `pydoc_data` is what the bundled base was pre-trained on; the rest is not source that somebody wrote to be read.
EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "pydoc_data", "__pycache__"})


def stdlib() -> Table:
    """One row for each .py file of the running Python's standard library, sorted by module and path.

    Columns: `module` (its top-level module or package), `path` (relative to the library's folder, with `/`) and
    `text`. Tests, empty files and files that are not UTF-8 are left out.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    rows = [
        (module, path.relative_to(folder).as_posix(), text)
        for module in sorted(sys.stdlib_module_names)
        for path in _files(folder, module)
        if (text := _text(path)) is not None
    ]
    return Table(dict(zip(("module", "path", "text"), zip(*rows, strict=True), strict=True)))


def _files(folder: Path, module: str) -> Iterator[Path]:
    candidates = [folder / f"{module}.py", *sorted((folder / module).rglob("*.py"))]
    return (p for p in candidates if p.is_file() and EXCLUDED.isdisjoint(p.relative_to(folder).parts))


def _text(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return text if text.strip() else None


def stdlib_prose() -> str:
    """The prose of Python's language reference as Python ships it: `pydoc_data.topics`, in the order of its topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def digits() -> Table:
    """scikit-learn's 1797 handwritten digits. Columns: `image` (8×8 RGB, grey levels 0..255) and `label` (0..9)."""
    # Both take a second, which no other data waits for.
    import datasets
    from sklearn.datasets import load_digits

    bunch = load_digits()
    greys = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    columns = {
        "image": [Image.fromarray(grey).convert("RGB") for grey in greys],
        "label": bunch.target.tolist(),
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table: Table = datasets.Dataset.from_dict(columns, features=features)
    return table


BUILTIN: dict[str, Callable[[], Table]] = {"builtin:digits": digits, "builtin:stdlib": stdlib}
