"""A federation that trains in a second: the builtin base on a few files of the standard library."""

from pathlib import Path

import pytest

TINY = """
[run]
name = "tiny"
rounds = 2
seed = 5
[model]
base = "builtin:byte-llama"
task = "causal-lm"
max_length = 32
[adapter]
rank = 2
targets = ["q_proj", "v_proj"]
[recipe]
name = "fedsvd"
[local]
learning_rate = 5e-3
batch_size = 2
steps = 1
[wire]
codec = "int8"
[data]
source = "builtin:stdlib"
limit = 12
evaluation_limit = 6
[data.partition]
clients = 3
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The path of a spec that runs in about a second."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path
