"""Packed rows: inside a model's blocks a padded batch is one long row of the tokens that are there.

Texts of a batch differ in length, and the members of a cohort more than one member's texts do, so with padding a cohort
computes half as much again as it needs to. Linear layers and norms take a token as it comes; attention alone has to know
which tokens are one text, and gets its padded rows back.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .blocks import stacked_blocks

IMPLEMENTATION = "fedapt-packed"
"""What attention over packed rows is called among transformers' implementations."""


class Packing:
    """Where the tokens of a padded batch are. It takes the place of the attention mask that the blocks hand on.

    `mask` (rows, length) is 1 where a token is, and at the start of every row; rows are those of `count` members,
    member-major. `sizes` are the members' tokens, `tokens` all of them.
    """

    def __init__(self, mask: Tensor, count: int) -> None:
        self.rows, self.length = mask.shape
        self.mask = mask.bool()
        self.places = self.mask.flatten().nonzero().squeeze(1)
        self.sizes: list[int] = self.mask.view(count, -1).sum(1).tolist()
        self.tokens = len(self.places)
        ends = self.mask.sum(1).cumsum(0)
        self.starts = torch.cat([ends.new_zeros(1), ends[:-1]])

    def pack(self, padded: Tensor) -> Tensor:
        """(rows, length, …) ⇒ (1, tokens, …); what is packed stays so."""
        if padded.shape[:2] == (1, self.tokens):
            return padded
        packed: Tensor = _Taken.apply(padded.flatten(0, 1), self.places)  # type: ignore[no-untyped-call]
        return packed[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, tokens, …) ⇒ (rows, length, …), zero where it is padding. One token a row: (1, rows, …) ⇒ (rows, 1, …)."""
        if packed.shape[1] == self.rows:
            return packed.transpose(0, 1)
        padded: Tensor = _Put.apply(packed[0], self.places, self.rows * self.length)  # type: ignore[no-untyped-call]
        return padded.view(self.rows, self.length, *padded.shape[1:])

    def first(self, packed: Tensor) -> Tensor:
        """The first token of each row, (1, rows, …)."""
        return packed[:, self.starts]


class _Taken(torch.autograd.Function):
    """`x[places]`, whose gradient is put back in one go: no place is taken twice, so nothing has to be summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.count, *gradient.shape[1:]).index_copy_(0, places, gradient), None


class _Put(torch.autograd.Function):
    """The inverse: zeros with `x` at `places`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Packing, **settings: Any
) -> tuple[Tensor, None]:
    """Attention within each text, in transformers' signature: query, key and value (1, heads, tokens, width).

    The query may be the first token of each row alone, (1, heads, rows, width). Gives (1, tokens or rows, heads, width).
    """
    packing = attention_mask
    padded = (packing.unpack(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value))
    output, _ = sdpa_attention_forward(module, *padded, packing.mask[:, None, None], **settings)
    if output.shape[1] == 1:  # of the first tokens alone; nothing is packed where all texts have one token
        return output.transpose(0, 1), None
    return packing.pack(output), None


AttentionInterface.register(IMPLEMENTATION, packed_attention)


class PackedBlocks:
    """A model's blocks, as they run within `packed`. Raises ValueError where attention is not transformers' own SDPA."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = stacked_blocks(model)
        inside = [module for block in self.blocks for module in block.modules()]
        self.configs = list({id(c): c for m in inside if (c := getattr(m, "config", None)) is not None}.values())
        if not self.configs or any(config._attn_implementation != "sdpa" for config in self.configs):
            raise ValueError("the blocks' attention is not transformers' SDPA: it cannot be given packed rows")

    def __contains__(self, module: nn.Module) -> bool:
        return any(module is own for block in self.blocks for own in block.modules())

    @contextmanager
    def packed(self, packing: Packing) -> Iterator[None]:
        """Within it the first block packs what it is given, and the last one unpacks what it gives."""
        own = [vars(block).get("forward") for block in self.blocks]
        try:
            for config in self.configs:
                config._attn_implementation = IMPLEMENTATION
            for block in self.blocks:
                block.forward = _packed_forward(block.forward, packing, block is self.blocks[-1])
            yield
        finally:
            for config in self.configs:
                config._attn_implementation = "sdpa"
            for block, forward in zip(self.blocks, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


def _packed_forward(own: Callable[..., Any], packing: Packing, last: bool) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, attention_mask: None = None, *args: Any, **kwargs: Any) -> Any:
        output = own(packing.pack(hidden_states), packing, *args, **kwargs)
        return packing.unpack(output) if last else output

    return forward


def packed_inputs(inputs: Mapping[str, Tensor], packing: Packing) -> dict[str, Tensor]:
    """A model's inputs without their mask, and what is given in place of states (rows, length, width) packed."""
    return {
        key: packing.pack(value) if value.dim() == 3 else value
        for key, value in inputs.items()
        if key != "attention_mask"
    }
