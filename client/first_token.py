"""The last block of an encoder, computed for the one token that its classifier reads.

A BERT-like classifier looks at the first token of the last block and at nothing else of it. Keys and values there are
needed of all tokens; queries, feed-forward layers and norms of the others are computed for nothing, forward and
backward: nearly half of all arithmetic in a model of two blocks, or with the blocks below the last two kept as a prefix.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertCrossAttention

from ..kernels.blocks import stacked_blocks
from ..kernels.cohort import agree, with_gradients
from ..kernels.packing import Packing


class FirstTokenAttention:
    """The forward of an attention module with a block's output for the first token alone, (rows, 1, width).

    It is transformers' own cross-attention, from the first token to all of them, over the module's own projections.
    An object, because a copy of a model copies objects with it, and closures not.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor | Packing | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        first, mask = _first(hidden_states, attention_mask)
        projections: Any = self.attention.self
        context, weights = BertCrossAttention.forward(projections, first, hidden_states, mask)
        output: Any = self.attention.output
        return output(context, first), weights


def _first(states: Tensor, mask: Tensor | Packing | None) -> tuple[Tensor, Tensor | Packing | None]:
    """The first token of each row, and the mask of what it attends to."""
    if isinstance(mask, Packing):
        return mask.first(states), mask
    return states[:, :1], None if mask is None else mask[:, :, :1]  # (rows, 1, queries, keys)


def read_first_token(model: nn.Module) -> bool:
    """Compute the last block for the first token alone, if that changes neither logits nor gradients; whether it does so.

    No rule about classes tells what reads a block's output, so it is tried, on random tokens of two lengths. Where no
    block trains nothing is changed: their outputs are then kept as a prefix.
    """
    blocks = stacked_blocks(model)
    attention = getattr(blocks[-1], "attention", None) if blocks else None
    projections = getattr(attention, "self", None)
    known = all(isinstance(getattr(projections, name, None), nn.Module) for name in ("query", "key", "value"))
    if attention is None or not known or not any(p.requires_grad for block in blocks for p in block.parameters()):
        return False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = _probe(model)
    expected = with_gradients(model(**inputs).logits, trained)
    attention.forward = FirstTokenAttention(attention)
    try:
        actual = with_gradients(model(**inputs).logits, trained)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        actual = []
    if agree(actual, expected):
        return True
    del attention.forward
    return False


def _probe(model: nn.Module) -> dict[str, Tensor]:
    """Two texts of random tokens, the second one padded."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(embeddings.num_embeddings, (2, 6), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    device = embeddings.weight.device
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
