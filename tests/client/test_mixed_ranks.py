"""Nodes of different ranks in one model: each trains exactly what stock peft of its rank trains."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedapt.client.batches import plan_batches
from fedapt.client.client import Client
from fedapt.client.trainer import Trainer
from fedapt.protocols.errors import PayloadError
from fedapt.protocols.layout import AdapterLayout, Flat
from fedapt.protocols.legality import rank_of
from fedapt.protocols.recipes import RECIPES
from fedapt.protocols.update import Assignment

from .clients import assignments_of, change_of, client_of, model_of, state_of

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


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_a_node_trains_at_the_rank_it_is_asked_for(rank: int) -> None:
    """Any, where the run draws none: with the run's own scaling, as stock peft of that rank has it."""
    client = client_of("recipe.name=flexlora", "adapter.rank=4", "local.steps=3", sizes={7: 6}, rank=4)
    (assignment,) = assignments_of(client, [7], state_of(client, seed=4), rank=rank)
    (update,) = client.train([assignment])
    assert len(update.payload) == 4 * client.shared.sent(1, rank).size
    expected = trained_by_stock_peft(client, assignment, rank)
    assert np.linalg.norm(change_of(client, update, rank) - expected) <= 2e-5 * np.linalg.norm(expected)


def test_a_payload_of_another_rank_is_none() -> None:
    client = client_of("recipe.name=flexlora", "adapter.rank=4", sizes={7: 6}, rank=4)
    (assignment,) = assignments_of(client, [7], state_of(client, seed=4), rank=2)
    for other in (0, 1, 3):
        with pytest.raises(PayloadError):
            client.train([replace(assignment, rank=other)])


def test_what_a_node_cannot_afford_it_refuses() -> None:
    """Before it looks at the payload; the others of the cohort train as if it were not there."""
    client = client_of("recipe.name=flexlora", "adapter.rank=4", sizes={3: 4, 7: 6, 9: 5}, rank=4)
    state = state_of(client, seed=4)
    (small,) = assignments_of(client, [7], state, rank=2)
    whole, explicit = (assignments_of(client, [node], state, rank=rank)[0] for node, rank in ((3, 0), (9, 4)))
    able = client.affording(2)
    refused, taken, other = able.train([replace(whole, payload=b"nonsense"), small, explicit])
    assert [update.kind for update in (refused, taken, other)] == ["refused", "delta", "refused"]
    for update in (refused, other):
        assert (update.weight, update.payload, dict(update.metrics)) == (0.0, b"", {})
        assert update.reason == "asked to train at rank 4, and this node can afford 2 (most_rank)"
    assert taken == client.train([small])[0]
    assert able.affording(4).train([explicit]) == able.affording(0).train([explicit]) == client.train([explicit])
    assert able.under(client.spec).most_rank == able.at(client.sites).most_rank == 2


def test_a_method_without_a_rank_is_for_everybody() -> None:
    client = client_of("adapter.method=head").affording(1)
    (assignment,) = assignments_of(client, [10], state_of(client))
    assert client.train([assignment])[0].kind != "refused"
