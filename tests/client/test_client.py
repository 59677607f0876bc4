"""The seam `client.train`: a whole cohort, one message after another, and what is refused."""

from itertools import pairwise

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapt.protocols.codecs import CODECS, codec_of
from fedapt.protocols.errors import DataError, PayloadError, SpecError
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.records import (
    DESCRIBE,
    EVALUATE,
    TRAIN,
    assignment_to_records,
    description_from_records,
    update_from_records,
)
from fedapt.protocols.update import Assignment

from .clients import RAGGED, asked, assert_same, assignments_of, change_of, client_of, farewell_of, sites_of, state_of


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
    client.load(farewell_of(client, 10, state_of(client)))
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
    assert answer["evaluated"] == ConfigRecord({"node": 40, "version": "version 1", "weight": float(RAGGED[40])})
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
