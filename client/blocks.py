"""The transformer blocks of a base, numbered as `peft` numbers them: by the first number inside a module's name."""

import re
from collections.abc import Collection, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..protocols.errors import ModelError

BLOCK = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""The start of a name in a block, up to its own part: the rule by which `peft` reads `layers_to_transform`."""


def block_of(name: str) -> int | None:
    """The number of the block that holds a parameter or a module of the base; None outside of all blocks."""
    found = BLOCK.match(name.removeprefix("base_model.model."))
    return int(found[1]) if found else None


def refuse_beyond(base: nn.Module, layers: Sequence[int]) -> None:
    """Raise ModelError where the base has no block of such a number."""
    depth = max((block for name, _ in base.named_parameters() if (block := block_of(name)) is not None), default=-1) + 1
    if layers and not depth:
        raise ModelError(f"adapter.layers = {list(layers)}: this base has no numbered blocks. Nearest legal: [].")
    if layers and max(layers) >= depth:
        nearest = sorted({min(layer, depth - 1) for layer in layers})
        raise ModelError(
            f"adapter.layers = {list(layers)}: this base has {depth} blocks, numbered from 0. Nearest legal: {nearest}."
        )


def linear_within(base: nn.Module, layers: Collection[int]) -> list[str]:
    """What the linear layers of these blocks are called inside their block, sorted."""
    return sorted(
        {BLOCK.sub("", name, count=1) for name, module in base.named_modules() if _is_linear(module, name, layers)}
    )


def modules_of(base: nn.Module, targets: str | Sequence[str], layers: Collection[int]) -> list[str]:
    """The modules of these blocks whose names end on one of `targets`; with "all-linear", their linear layers."""
    if isinstance(targets, str):
        return [name for name, module in base.named_modules() if _is_linear(module, name, layers)]
    ends = tuple(f".{target}" for target in targets)
    return [name for name, _ in base.named_modules() if block_of(name) in layers and name.endswith(ends)]


def _is_linear(module: nn.Module, name: str, layers: Collection[int]) -> bool:
    return isinstance(module, nn.Linear | Conv1D) and block_of(name) in layers
