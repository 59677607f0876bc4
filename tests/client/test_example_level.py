"""Example-level privacy through the client's seam: charges, refusals, and what a node does not tell."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fedapt.client.accounts import Accounts
from fedapt.client.client import Client
from fedapt.privacy.events import GaussianEvent, Poisson, from_json
from fedapt.privacy.ledger import SiteLedger
from fedapt.protocols.errors import PrivacyError, SpecError
from fedapt.protocols.update import Update
from fedapt.server.admission import refusal

from .clients import RAGGED, assignments_of, change_of, client_of, state_of

PRIVATE = (
    "privacy.unit=example",
    "privacy.epsilon=30",
    "privacy.noise_multiplier=1.5",
    "privacy.clip=0.5",
    "recipe.weighting=uniform",
    "local.steps=2",
    "run.rounds=3",
    "run.evaluate_every=3",
)
NODES = [40, 50]


def private(*overrides: str) -> Client:
    return client_of("recipe.name=ffa", *PRIVATE, *overrides)


def rounds(client: Client, numbers: Sequence[int], nodes: Sequence[int] = NODES) -> list[list[Update]]:
    return [client.train(assignments_of(client, nodes, state_of(client), number)) for number in numbers]


@pytest.mark.parametrize("recipe", ["ffa", "fedsvd", "refresh", "fedit"])
def test_every_recipe_of_the_unit_trains_with_noise(recipe: str) -> None:
    client = private(f"recipe.name={recipe}")
    (updates,) = rounds(client, [1])
    for update in updates:
        change = change_of(client, update)
        assert update.kind == "delta"
        assert np.isfinite(change).all()
        assert np.count_nonzero(change) == len(change)
    assert not np.array_equal(
        change_of(client, updates[0]),
        change_of(client, client.train(assignments_of(client, NODES, state_of(client), 2))[0]),
    )


def test_each_round_is_charged_at_each_node(tmp_path: Path) -> None:
    client = private().keeping(Accounts(tmp_path))
    rounds(client, [1, 2])
    for node in NODES:
        entries = SiteLedger(tmp_path / f"{node}.sqlite").chain().entries
        events = [from_json(entry.event) for entry in entries]
        assert [entry.round for entry in entries] == [1, 2]
        assert all(isinstance(e, GaussianEvent) and e.count == 2 and e.unit == "example" and e.secret for e in events)
        assert {e.sampling for e in events if isinstance(e, GaussianEvent)} == {Poisson(min(1.0, 4 / RAGGED[node]))}


def test_more_nodes_are_charged_than_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedapt.client.accounts.OPEN_FILES", 1)
    client = private().keeping(Accounts(tmp_path))
    rounds(client, [1, 2, 3])
    assert len(client.accounts._files) == 1
    for node in NODES:
        assert [entry.round for entry in SiteLedger(tmp_path / f"{node}.sqlite").chain().entries] == [1, 2, 3]


@pytest.mark.parametrize("folder", [True, False])
def test_a_node_refuses_what_would_pass_its_cap_and_the_others_go_on(folder: bool, tmp_path: Path) -> None:
    """Node 50 has four examples, which all are in every batch: its cap is reached before that of node 40."""
    client = private("privacy.epsilon=9").keeping(Accounts(tmp_path if folder else None))
    kinds = [[u.kind for u in updates] for updates in rounds(client, range(1, 9))]
    assert kinds[0] == ["delta", "delta"]
    assert kinds[-1] == ["delta", "refused"] or kinds[-1] == ["refused", "refused"]
    assert ["delta", "refused"] in kinds
    *_, last = rounds(client, [9])
    refused = last[1]
    assert refused.payload == b""
    assert "epsilon" in refused.reason
    (asked,) = assignments_of(client, [50], state_of(client), 9)
    reason = refusal(refused, asked, None, client.shared.sent(9))  # type: ignore[arg-type]
    assert reason is not None
    assert reason.startswith(
        "the node refuses: one more round would bring epsilon above 9 at delta = 1e-05: the run's cap"
    )
    assert client.accounts.spent(asked, 1e-5).epsilon <= 9


def test_a_node_tells_neither_its_losses_nor_how_much_it_holds() -> None:
    client = private()
    (updates,) = rounds(client, [1])
    assert {u.weight for u in updates} == {1.0}
    assert all(u.metrics == {} for u in updates)


def test_at_evaluated_rounds_it_tells_what_it_has_spent() -> None:
    client = private()
    *_, last = rounds(client, [1, 2, 3])
    asked = assignments_of(client, NODES, state_of(client), 3)
    for update, own in zip(last, asked, strict=True):
        assert client.accounts.ledger(own.node, "run").spent(1e-5).epsilon <= update.metrics["epsilon"] <= 30
        assert update.metrics["epsilon"] == float(f"{update.metrics['epsilon']:.2g}")
        assert update.metrics["private"] == 1.0


def test_a_delta_that_promises_nothing_is_said_at_the_site_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Node 40 has twelve examples, and node 50 four."""
    client = private("privacy.delta=0.125", "privacy.epsilon=9")
    updates = rounds(client, [1, 2])
    (warning,) = [message for message in caplog.messages if "not below" in message]
    assert warning.startswith("privacy.delta = 0.125 is not below 1 / 12, one over the number of examples held here")
    assert all(update.reason == "" for one in updates for update in one)


def test_seeded_noise_repeats_and_is_marked() -> None:
    one, two = (private("privacy.noise=simulation") for _ in range(2))
    (first,), (second,) = rounds(one, [3]), rounds(two, [3])
    assert [u.payload for u in first] == [u.payload for u in second]
    assert {u.metrics["private"] for u in first} == {0.0}


def test_a_node_without_examples_is_not_charged() -> None:
    client = private()
    ((update,),) = rounds(client, [1], [20])
    assert update.kind == "empty"


def test_without_noise_nothing_is_promised() -> None:
    client = client_of("recipe.name=ffa", "local.steps=2")
    (updates,) = rounds(client, [1])
    assert all("epsilon" not in u.metrics for u in updates)


def test_exact_scores_on_private_data_are_not_given() -> None:
    with pytest.raises(PrivacyError, match="a release without noise"):
        private().evaluate(40)


def test_another_spec_must_be_legal_too() -> None:
    with pytest.raises(SpecError, match="illegal"):
        private().under(private().spec.set("recipe.aggregator=krum"))
