"""A federation that is real and small: a random BERT of two layers, and six clients with a few sentences each."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from fedapt.protocols.spec import RunSpec

WORDS = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(60))]

TEMPLATE = """
[run]
rounds = 2
seed = 3
[model]
base = "base"
task = "sequence-classification"
labels = 3
max_length = 12
[adapter]
rank = 4
targets = ["query", "value"]
[local]
optimizer = "sgd"
learning_rate = 0.2
batch_size = 4
steps = 3
[data]
source = "train.jsonl"
evaluation = "test.jsonl"
[data.partition]
kind = "dirichlet"
clients = 6
alpha = 1.0
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds base/, train.jsonl and test.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "base"
    )
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder / "base")
    chance = random.Random(0)
    for name, count in (("train", 60), ("test", 24)):
        lines = []
        for row in range(count):
            label = chance.randrange(3)
            words = [f"w{20 * label + chance.randrange(20)}" for _ in range(chance.randint(2, 9))]
            lines.append(json.dumps({"text": " ".join(words), "label": label, "site": f"s{row % 4}"}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def spec_of(folder: Path) -> Callable[..., RunSpec]:
    """The tiny federation's spec, with overrides."""

    def spec_of(*overrides: str) -> RunSpec:
        return RunSpec.parse(TEMPLATE, folder=folder, overrides=overrides)

    return spec_of
