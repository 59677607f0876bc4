"""The seam `client.train`: a whole cohort, one message after another, and what is refused."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from fedapt.client.adapted import AdaptedModel, adapt, orthonormalize_factors
from fedapt.client.app import client_app
from fedapt.client.batches import plan_batches
from fedapt.client.client import Client, Sites
from fedapt.client.frozen import add_frozen
from fedapt.client.tasks import Examples, SequenceClassification
from fedapt.client.trainer import Trainer
from fedapt.protocols.codecs import CODECS, codec_of
from fedapt.protocols.errors import DataError, PayloadError, SpecError
from fedapt.protocols.layout import AdapterLayout, Flat
from fedapt.protocols.legality import rank_of
from fedapt.protocols.recipes import RECIPES
from fedapt.protocols.records import (
    DESCRIBE,
    EVALUATE,
    TRAIN,
    assignment_to_records,
    description_from_records,
    message,
    update_from_records,
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


def assignments_of(client: Client, nodes: Sequence[int], state: Flat, round_: int = 1) -> list[Assignment]:
    """What a node of its own rank gets of the state."""
    whole, codec = client.shared.received(round_), CODECS[client.spec.wire.downlink]
    own = {node: client.shared.received(round_, rank_of(client.spec, node)) for node in nodes}
    payloads = {node: codec.encode(whole.cut(state, layout), layout, 0) for node, layout in own.items()}
    return [Assignment("run", round_, 2, node, f"version {round_}", payloads[node]) for node in nodes]


def sent(message_type: str, node: int, content: RecordDict) -> Message:
    """A message as our grids build it."""
    return message(content, Metadata(7, "1", 0, node, "", "", 0.0, 3600.0, message_type))


def asked(client: Client, message_type: str, node: int, content: RecordDict) -> RecordDict:
    """What the ClientApp answers."""
    context = Context(7, node, {}, RecordDict(), {})
    reply = client_app(lambda _: client)(sent(message_type, node, content), context)
    return reply.content


def change_of(client: Client, update: Update) -> Flat:
    layout = client.shared.sent(update.round, rank_of(client.spec, update.node))
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


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_cohort_is_one_message_after_another(recipe: str) -> None:
    client = client_of(f"recipe.name={recipe}")
    assignments = assignments_of(client, list(RAGGED), state_of(client, seed=3))
    together = client.train(assignments)
    assert [update.node for update in together] == list(RAGGED)
    for assignment, update in zip(assignments, together, strict=True):
        answer = asked(client, TRAIN, assignment.node, assignment_to_records(assignment))
        assert_same(client, update_from_records(answer), update)


@settings(max_examples=12)
@given(
    st.dictionaries(st.integers(0, 2**60), st.integers(0, 9), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.2]),
    st.data(),
)
def test_a_cohort_is_its_members_whatever_their_sizes(
    sizes: dict[int, int], dropout: float, data: st.DataObject
) -> None:
    client = client_of(sizes=sizes, dropout=dropout)
    nodes = data.draw(st.permutations(list(sizes)))
    assignments = assignments_of(client, nodes, state_of(client, seed=1))
    together = client.train(assignments)
    for assignment, update in zip(assignments, together, strict=True):
        (alone,) = client.train([assignment])
        assert_same(client, alone, update)
        assert update.kind == ("delta" if sizes[update.node] else "empty")
        assert update.weight == sizes[update.node]


def test_shuffled_nodes_would_be_caught() -> None:
    """The control of `assert_same`: no two nodes send the same."""
    client = client_of()
    updates = client.train(assignments_of(client, [10, 40, 50], state_of(client)))
    for update, other in pairwise(updates):
        first, second = change_of(client, update), change_of(client, other)
        assert np.linalg.norm(first - second) > 0.1 * np.linalg.norm(second)


def test_assignments_of_different_rounds_keep_their_own_start() -> None:
    client = client_of()
    early = assignments_of(client, [10, 40], state_of(client), round_=1)
    late = assignments_of(client, [40, 10], state_of(client, seed=5), round_=2)
    mixed = client.train([early[0], late[0], early[1], late[1]])
    apart = [*client.train(early), *client.train(late)]
    for one, two in zip([mixed[0], mixed[2], mixed[1], mixed[3]], apart, strict=True):
        assert_same(client, one, two)


def test_a_round_of_nodes_without_data() -> None:
    for sizes in (RAGGED, {20: 0, 21: 0}):
        client = client_of(sizes=sizes)
        (update,) = client.train(assignments_of(client, [20], state_of(client)))
        assert (update.kind, update.payload, update.weight, update.metrics) == ("empty", b"", 0.0, {})
    assert client.nodes() == []
    assert client.train([]) == []


def test_who_is_here() -> None:
    client = client_of()
    assert client.nodes() == [10, 30, 40, 50]
    assert client.at(sites_of({7: 2})).nodes() == [7]
    assert client.nodes() == [10, 30, 40, 50]


def test_description() -> None:
    client = client_of()
    description = client.describe()
    assert description.layout == client.adapted.layout
    assert np.array_equal(description.start, client.start)
    travelled = description_from_records(asked(client, DESCRIBE, 10, RecordDict()))
    assert travelled.version == description.version
    assert travelled.base == description.base
    assert travelled.config["r"] == 2
    client.train(assignments_of(client, [10], state_of(client, seed=1)))
    assert client.describe().version == description.version  # the start of the run, whatever is in the model


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_update_has_the_bytes_that_were_announced(recipe: str, codec: str) -> None:
    client = client_of(f"recipe.name={recipe}", f"wire.codec={codec}")
    (update,) = client.train(assignments_of(client, [10], state_of(client)))
    layout = client.shared.sent(1)
    assert len(update.payload) == codec_of(client.spec.wire).size(layout)
    change = codec_of(client.spec.wire).decode(update.payload, layout)
    lossless = client_of(f"recipe.name={recipe}")
    (reference,) = lossless.train(assignments_of(lossless, [10], state_of(lossless)))
    exact = CODECS["fp32"].decode(reference.payload, layout)
    tolerance = {"fp32": 1e-6, "bf16": 0.01, "int8": 0.05, "fp4": 0.5}[codec]
    assert np.linalg.norm(change - exact) <= tolerance * np.linalg.norm(exact)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_loading_the_first_state_gives_the_start(recipe: str, codec: str) -> None:
    client = client_of(f"recipe.name={recipe}", f"wire.downlink={codec}")
    client.adapted.write(np.ones(client.adapted.layout.size, np.float32))
    client.load(assignments_of(client, [10], state_of(client))[0])
    layout = client.adapted.layout
    loaded, start = layout.split(client.adapted.read()), layout.split(client.start)
    for tensor in layout.tensors:
        if tensor.role != "frozen":  # the frozen A's of `refresh` lie in another order, beside zeros
            tolerance = 0 if codec == "fp32" else 1e-2
            assert np.allclose(loaded[tensor.name], start[tensor.name], atol=tolerance)
        elif tensor.name.endswith(".frozen_B.weight"):
            assert not loaded[tensor.name].any()


def test_fedsvd_rotates_the_a_that_the_run_started_with() -> None:
    client = client_of("recipe.name=fedsvd")
    layout = client.adapted.layout
    downlink = client.shared.received(1)
    state = state_of(client)
    turned = np.array([[0, 1], [-1, 0]], np.float32)
    for pair in layout.pairs:
        downlink.split(state)[f"{pair.module}.rotation"][...] = turned
    for _ in range(2):  # from the start, not from what is in the model
        client.load(assignments_of(client, [10], state)[0])
    start, loaded = layout.split(client.start), layout.split(client.adapted.read())
    for pair in layout.pairs:
        assert np.allclose(loaded[pair.a.name], turned @ start[pair.a.name])


def test_evaluation_is_of_the_nodes_own_data() -> None:
    client = client_of()
    (assignment,) = assignments_of(client, [40], state_of(client, seed=2))
    answer = asked(client, EVALUATE, 40, assignment_to_records(assignment))
    client.load(assignment)
    scores = client.evaluate(40)
    assert len(scores.loss) == RAGGED[40]
    metrics = scores.metrics(client.adapted.task)
    assert 0 <= metrics["accuracy"] <= 1
    assert dict(answer["metrics"]) == pytest.approx(metrics)
    assert answer["evaluated"] == ConfigRecord({"node": 40, "version": "version 1"})
    batch = client.adapted.task.collate(client.sites.examples, [client.sites.indices[40]])
    loss = client.adapted.model(**batch.inputs, labels=batch.labels).loss
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert client.evaluate(20).metrics(client.adapted.task) == {"loss": 0.0, "accuracy": 0.0}


def test_training_learns() -> None:
    client = client_of("local.optimizer=adamw", "local.epochs=15", "local.learning_rate=0.01")
    (assignment,) = assignments_of(client, [40], state_of(client))
    client.load(assignment)
    before = client.evaluate(40).metrics(client.adapted.task)["loss"]
    (update,) = client.train([assignment])
    client.adapted.write((client.start + change_of(client, update)).astype(np.float32))
    after = client.evaluate(40).metrics(client.adapted.task)["loss"]
    assert after < 0.7 * before
    assert update.metrics["steps"] == 45


MIXED = ("adapter.ranks=[1, 2, 4]", "adapter.rank=4")


def trained_by_stock_peft(client: Client, assignment: Assignment, rank: int) -> Flat:
    """The change of a peft model of this rank and the same scaling, in a plain loop; over what the node sends."""
    client.load(assignment)
    adapted, local = model_of(rank=rank), client.spec.local
    adapted.write(client.adapted.layout.cut(client.adapted.read(), adapted.layout))
    sent = client.shared.sent(assignment.round, rank)
    before = sent.join(adapted.layout.split(adapted.read()))
    own = client.sites.indices[assignment.node]
    examples, key = client.sites.examples, (client.spec.run.seed, assignment.round, assignment.node)
    parameters = [adapted.parameters[t.name] for t in sent.tensors]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[local.optimizer]
    optimizer = kind(parameters, lr=local.learning_rate, weight_decay=local.weight_decay)
    for rows in plan_batches(examples.lengths[own], local, *key):
        batch = adapted.task.collate(examples, [own[rows]])
        optimizer.zero_grad()
        adapted.model(**batch.inputs, labels=batch.labels).loss.backward()
        optimizer.step()
    return np.asarray(sent.join(adapted.layout.split(adapted.read())) - before, np.float32)


@pytest.mark.parametrize(
    ("optimizer", "tolerance"),
    [
        (("local.optimizer=sgd", "local.weight_decay=0.01"), 2e-5),
        (("local.optimizer=adamw", "local.learning_rate=1e-3", "local.weight_decay=0.01"), 1e-3),
    ],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.mixes_ranks])
def test_a_node_of_a_small_rank_trains_what_stock_peft_trains(
    recipe: str, optimizer: tuple[str, ...], tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the model of the largest rank, whose further components stay zero to the last bit."""
    sizes = {node: 4 + node % 3 for node in range(12)}
    client = client_of(f"recipe.name={recipe}", *MIXED, *optimizer, "local.steps=3", sizes=sizes, rank=4)
    changes: list[Flat] = []
    train = Trainer.train

    def noted(trainer: Trainer, *given: Any) -> Any:
        results = train(trainer, *given)
        changes.extend(result.change for result in results)
        return results

    monkeypatch.setattr(Trainer, "train", noted)
    ranks = {rank_of(client.spec, node): node for node in sizes}
    assert set(ranks) == {1, 2, 4}
    assignments = assignments_of(client, list(ranks.values()), state_of(client, seed=4))
    updates, whole = client.train(assignments), client.shared.sent(1)
    for rank, assignment, update, change in zip(ranks, assignments, updates, changes, strict=True):
        own: AdapterLayout = client.shared.sent(1, rank)
        assert len(update.payload) == 4 * own.size
        assert np.array_equal(whole.pad(whole.cut(change, own), own), change)
        expected = trained_by_stock_peft(client, assignment, rank)
        assert np.linalg.norm(change_of(client, update) - expected) <= tolerance * np.linalg.norm(expected)


def test_another_scaling_would_be_caught() -> None:
    """The control: a node of rank 2 beside a stock model of rank 1."""
    client = client_of("recipe.name=flexlora", *MIXED, "local.steps=3", sizes=dict.fromkeys(range(12), 6), rank=4)
    node = next(node for node in range(12) if rank_of(client.spec, node) == 2)
    (assignment,) = assignments_of(client, [node], state_of(client, seed=4))
    (update,) = client.train([assignment])
    own, smaller = client.shared.sent(1, 2), client.shared.sent(1, 1)
    found, expected = own.cut(change_of(client, update), smaller), trained_by_stock_peft(client, assignment, 1)
    assert np.linalg.norm(found - expected) > 1e-3 * np.linalg.norm(expected)


def test_only_what_the_round_trains_moves() -> None:
    client = client_of("recipe.name=rolora")
    for round_, factor in ((1, "lora_B"), (2, "lora_A"), (3, "lora_B")):
        (update,) = client.train(assignments_of(client, [40], state_of(client, seed=2), round_))
        change = client.shared.sent(round_).split(change_of(client, update))
        assert all(factor in name or "classifier" in name for name in change)
        assert all(values.any() for values in change.values())


def test_after_a_fresh_start_b_trains_over_another_a() -> None:
    client = client_of("recipe.name=refresh", "recipe.period=1")
    changes = []
    for round_ in (1, 2):
        state = client.shared.received(round_).join(
            {t.name: np.zeros(t.shape) for t in client.shared.received(round_).tensors}
        )
        (update,) = client.train(assignments_of(client, [40], state, round_))
        changes.append(change_of(client, update))
    assert changes[0].shape == changes[1].shape
    assert np.linalg.norm(changes[0] - changes[1]) > 0.1 * np.linalg.norm(changes[0])


def test_frozen_factors_add_to_what_the_model_computes() -> None:
    client = client_of("recipe.name=fedex")
    state, tensors = state_of(client), client.shared.received(1)
    losses = []
    for scale in (0.0, 1.0):
        for name, values in tensors.split(state).items():
            if ".frozen_" in name:
                values[...] = scale * np.random.default_rng(1).standard_normal(values.shape)
        client.load(assignments_of(client, [40], state)[0])
        losses.append(client.evaluate(40).metrics(client.adapted.task)["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_foreign_node_is_refused() -> None:
    client = client_of()
    for ask in (lambda: client.train(assignments_of(client, [10, 11], state_of(client))), lambda: client.evaluate(11)):
        with pytest.raises(DataError, match="node 11"):
            ask()


def test_a_bad_payload_is_refused() -> None:
    client = client_of()
    (good,) = assignments_of(client, [10], state_of(client))
    nan = np.full(client.trained.size, np.nan, "<f4").tobytes()
    for payload in (b"", good.payload[:-1], good.payload + b"\0", nan):
        bad = Assignment(good.run, good.round, good.attempt, good.node, good.version, payload)
        with pytest.raises(PayloadError):
            client.train([bad])
    with pytest.raises(PayloadError):
        asked(client, TRAIN, 10, RecordDict())


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(SpecError, match="fedsvd"):
        client_of("recipe.name=fedsvt")


def test_another_spec_over_the_same_client() -> None:
    client = client_of()
    steps = client.under(client.spec.set("local.steps=2")).train(assignments_of(client, [40], state_of(client)))
    assert steps[0].metrics["steps"] == 2
    assert client.train(assignments_of(client, [40], state_of(client)))[0].metrics["steps"] == 3
