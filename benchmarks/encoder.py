"""MiniLM as sentence encoders are published, made ready for a classifier."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

TEXTS, TOKENS = 300, 14
"""Of random words, by which a state's mean is known without a text of anybody's."""


@cache
def with_open_pooler(folder: Path) -> Path:
    """The model with a pooler that gives the first token's state, centred, in a folder of its own.

    The checkpoint's pooler was never trained: it is a random matrix of norm 0.35, which shrinks that state beside the
    head's bias. And five sixths of a state's norm are the same for all texts: gradients along it cancel in the mean, and
    take a share of every clip. Sites that noise gradients, or see them in one direction at a time, cannot afford either.
    """
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    dense = model.pooler.dense
    with torch.no_grad():
        dense.weight.copy_(torch.eye(model.config.hidden_size))
        dense.bias.copy_(-_mean_state(model, tokenizer.cls_token_id, tokenizer.sep_token_id))
    into = Path(mkdtemp(prefix="encoder-"))
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    return into


def _mean_state(model: PreTrainedModel, first: int, last: int) -> torch.Tensor:
    """The first token's state in the last block, (width,), averaged over texts of random words."""
    words = torch.Generator().manual_seed(0)
    ids = torch.randint(2000, model.config.vocab_size, (TEXTS, TOKENS), generator=words)
    ids[:, 0], ids[:, -1] = first, last
    states: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
    return states.mean(0)
