"""How many tokens a cohort computes at once: enough to amortize Python and small kernels, few enough for the memory.

Tiny models gain most: with 32 hidden units a round at 16,384 tokens takes four fifths of what it takes at 4,096, and at
2,048 it takes a third more. Wide ones are as fast with a few hundred, and their activations are what fills a machine.
"""

from typing import Any

import torch
from torch import nn

ACTIVATIONS = 34
"""Values that a backward needs of one token and block, in hidden widths (Korthikanti et al., arXiv 2205.05198, eq. 2)."""

CHUNK_BYTES = 2**29
"""Activations of one chunk in main memory. On a GPU they may take an eighth of its memory."""

LEAST_TOKENS, MOST_TOKENS = 2**10, 2**14


def activation_bytes(model: nn.Module) -> int:
    """About what a backward through all blocks needs of one token, in fp32; of a model that does not tell its sizes, one value."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return 4 * ACTIVATIONS * int(getattr(config, "num_hidden_layers", 1)) * int(getattr(config, "hidden_size", 1))


def chunk_tokens(model: nn.Module) -> int:
    """Rows × length of one step of a chunk."""
    device = next(model.parameters()).device
    budget = CHUNK_BYTES
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory // 8
    return min(MOST_TOKENS, max(LEAST_TOKENS, budget // max(1, activation_bytes(model))))
