"""Nodes of different ranks in one model: each trains exactly what stock peft of its rank trains."""

from typing import Any

import numpy as np
import pytest
import torch

from fedapt.client.batches import plan_batches
from fedapt.client.client import Client
from fedapt.client.trainer import Trainer
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
