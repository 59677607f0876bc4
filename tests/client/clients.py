"""Tiny clients of every recipe, and what a node of theirs is asked and answers."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, Metadata, RecordDict
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from fedapt.client.adapted import AdaptedModel, adapt, orthonormalize_factors
from fedapt.client.app import client_app
from fedapt.client.client import Client, Sites
from fedapt.client.frozen import add_frozen
from fedapt.client.tasks import Examples, SequenceClassification
from fedapt.protocols.codecs import CODECS
from fedapt.protocols.layout import Flat
from fedapt.protocols.legality import rank_of
from fedapt.protocols.recipes import RECIPES
from fedapt.protocols.records import (
    message,
)
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Assignment, Update

RAGGED = {10: 5, 20: 0, 30: 1, 40: 12, 50: 4}
"""Node ⇒ examples that it holds."""


@cache
def model_of(dropout: float = 0.0, frozen: str = "", rank: int = 2) -> AdaptedModel:
    """The base is the same in all of them; `frozen` names a recipe that has frozen factors."""
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=3,
        initializer_range=0.1,
    )
    lora = LoraConfig(
        r=rank,
        lora_alpha=4 * rank,
        target_modules=["query", "dense"],
        modules_to_save=["classifier"],
        lora_dropout=dropout,
    )
    torch.manual_seed(0)
    adapted = adapt(get_peft_model(BertForSequenceClassification(config), lora), SequenceClassification(None, 16))
    orthonormalize_factors(adapted)
    return add_frozen(adapted, RECIPES[frozen], spec_of(f"recipe.name={frozen}")) if frozen else adapted


def sites_of(sizes: dict[int, int]) -> Sites:
    random, ends = np.random.default_rng(0), np.cumsum(list(sizes.values()))
    count = int(ends[-1])
    texts = [random.integers(1, 100, random.integers(2, 13)) for _ in range(count)]
    examples = Examples(texts, [np.array(label) for label in random.integers(0, 3, count)], np.arange(count))
    parts = np.split(np.arange(count), ends[:-1])
    return Sites(examples, dict(zip(sizes, parts, strict=True)))


def spec_of(*overrides: str) -> RunSpec:
    raw: dict[str, Any] = {
        "model": {"base": "tiny", "task": "sequence-classification", "labels": 3},
        "recipe": {"name": "fedit"},
        "local": {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 4},
    }
    return RunSpec.check(raw).set(*overrides)


def client_of(*overrides: str, sizes: dict[int, int] = RAGGED, dropout: float = 0.0, rank: int = 2) -> Client:
    spec = spec_of(*overrides)
    recipe = RECIPES.get(spec.recipe.name)
    model = dropout, spec.recipe.name if recipe is not None and recipe.has_frozen else "", rank
    adapted, start = model_of(*model), start_of(*model)
    adapted.write(start)
    return Client(spec, adapted, sites_of(sizes))


@cache
def start_of(dropout: float, frozen: str, rank: int) -> Flat:
    return model_of(dropout, frozen, rank).read()


def state_of(client: Client, seed: int | None = None) -> Flat:
    """The state of round 1; with a seed, some later one of the same form."""
    state = client.shared.initial_state()
    if seed is None:
        return state
    noise = np.random.default_rng(seed).standard_normal(len(state)).astype(np.float32)
    return (state + np.float32(0.1) * noise).astype(np.float32)


def assignments_of(
    client: Client, nodes: Sequence[int], state: Flat, round_: int = 1, rank: int | None = None
) -> list[Assignment]:
    """What each node gets of the state at this rank, or at the one that is drawn for it."""
    whole, codec = client.shared.received(round_), CODECS[client.spec.wire.downlink]
    ranks = {node: rank_of(client.spec, node) if rank is None else rank for node in nodes}
    own = {node: client.shared.delivered(round_, rank) for node, rank in ranks.items()}
    payloads = {node: codec.encode(whole.cut(state, layout), layout, 0) for node, layout in own.items()}
    return [Assignment("run", round_, 2, node, f"version {round_}", payloads[node], ranks[node]) for node in nodes]


def farewell_of(client: Client, node: int, state: Flat) -> Assignment:
    """The whole state of round 1, as it is handed over or scored."""
    (asked,) = assignments_of(client, [node], state)
    whole, own = client.shared.received(1), client.shared.received(1, asked.rank)
    payload = CODECS[client.spec.wire.downlink].encode(whole.cut(state, own), own, 0)
    return replace(asked, payload=payload)


def sent(message_type: str, node: int, content: RecordDict) -> Message:
    """A message as our grids build it."""
    return message(content, Metadata(7, "1", 0, node, "", "", 0.0, 3600.0, message_type))


def asked(client: Client, message_type: str, node: int, content: RecordDict) -> RecordDict:
    """What the ClientApp answers."""
    context = Context(7, node, {}, RecordDict(), {})
    reply = client_app(lambda _: client)(sent(message_type, node, content), context)
    return reply.content


def change_of(client: Client, update: Update, rank: int | None = None) -> Flat:
    layout = client.shared.sent(update.round, rank_of(client.spec, update.node) if rank is None else rank)
    return CODECS[client.spec.wire.codec].decode(update.payload, layout)


def assert_same(client: Client, one: Update, two: Update, tolerance: float = 1e-5) -> None:
    ours = [(u.run, u.round, u.attempt, u.node, u.version, u.kind, u.weight) for u in (one, two)]
    assert ours[0] == ours[1]
    assert set(one.metrics) == set(two.metrics)
    for name, value in one.metrics.items():
        assert value == pytest.approx(two.metrics[name], rel=1e-4)
    if one.kind == "empty":
        assert one.payload == two.payload == b""
        return
    first, second = change_of(client, one), change_of(client, two)
    assert np.linalg.norm(first - second) <= tolerance * np.linalg.norm(second)
