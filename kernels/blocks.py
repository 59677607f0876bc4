"""The transformer blocks of a model, whatever it is called."""

from torch import nn


def stacked_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's stack of like blocks: of all module lists, the one with the most parameters."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(block) for block in m}) == 1]
    return list(max(stacks, key=lambda m: sum(p.numel() for p in m.parameters()), default=[]))
