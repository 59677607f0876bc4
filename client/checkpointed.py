"""Gradient checkpointing for a cohort: blocks keep their inputs alone, and run a second time in the backward.

The stock way runs a block again as the model has it, and only in training mode. Here the base is always in evaluation
mode, and a forward of `kernels/cohort.py` puts the members' own tensors into the modules for as long as it runs, so the
second run has to put them there again: whatever is in a block when it first runs is what it is run with later.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..kernels.blocks import stacked_blocks


def checkpoint_blocks(model: nn.Module) -> int:
    """Let the model's transformer blocks keep no activations; how many there are. The numbers stay the same."""
    blocks = stacked_blocks(model)
    for block in blocks:
        block.forward = _Recomputed(block)
    return len(blocks)


class _Recomputed:
    """A block's forward as an object, because a copy of a model copies objects with it, and closures not."""

    def __init__(self, block: nn.Module) -> None:
        self.own = _Own(block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.own(*args, **kwargs)
        return checkpoint(_as_now(self.own), *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class _Own(nn.Module):
    """A block without its hooks, which have run by then, and without what stands in for its forward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


def _as_now(own: _Own) -> Callable[..., Any]:
    """The block's own forward, with the tensors and the patched modules that are in it at this moment."""
    tensors: dict[str, Tensor] = dict(own.named_parameters())
    patched = {m: vars(m)["forward"] for m in own.modules() if m is not own.block and "forward" in vars(m)}

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _patched(patched):
            return functional_call(own, tensors, args, kwargs)

    return forward


@contextmanager
def _patched(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    """The modules with these forwards, which they may have at this moment anyway."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
