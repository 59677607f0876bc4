"""Streaming DiLoCo at its nodes: identities with the plain inner optimizer, the outer gradient's sign, late joiners."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from fedapt.client.batches import plan_batches
from fedapt.client.client import Client
from fedapt.client.replicas import Replica
from fedapt.client.tasks import Indices
from fedapt.client.trainer import Member, Moments
from fedapt.protocols.codecs import CODECS
from fedapt.protocols.errors import SpecError
from fedapt.protocols.keys import derive
from fedapt.protocols.layout import Flat
from fedapt.protocols.update import Assignment, Update
from fedapt.server.advance import advance
from fedapt.server.optimizers import Buffers
from fedapt.server.rounds import Contribution

from .clients import RAGGED, change_of, client_of

ADAMW = ("local.optimizer=adamw", "local.learning_rate=0.01", "local.weight_decay=0.1")


def diloco(*overrides: str, sizes: dict[int, int] = RAGGED) -> Client:
    return client_of("recipe.name=diloco", *overrides, sizes=sizes)


class Federation:
    """The server's side of it, around one client that holds all nodes."""

    def __init__(self, client: Client, nodes: Sequence[int]) -> None:
        self.client, self.nodes, self.round = client, nodes, 0
        self.state = client.shared.initial_state()
        self.buffers: Buffers = {}

    def assignment(self, node: int) -> Assignment:
        shared, round_ = self.client.shared, self.round
        own = shared.delivered(round_)
        payload = CODECS["fp32"].encode(shared.received(round_).cut(self.state, own), own, 0)
        return Assignment("run", round_, 1, node, f"version {round_}", payload)

    def step(self, nodes: Sequence[int] | None = None) -> list[Update]:
        """One round; the nodes without an update to give do not count."""
        self.round += 1
        updates = self.client.train([self.assignment(node) for node in nodes or self.nodes])
        useful = [u for u in updates if u.kind == "delta"]
        given = [Contribution(1 / len(useful), change_of(self.client, u)) for u in useful]
        self.state, self.buffers, _ = advance(
            self.client.shared, self.state, self.state, self.buffers, given, number=self.round
        )
        return updates

    def own(self, node: int) -> Flat:
        return standing(self.client, node).own


def standing(client: Client, node: int) -> Replica:
    """How the node stands after its last round."""
    assert client.replicas is not None
    return client.replicas.before(asked_of(node, 1000))


def asked_of(node: int, round_: int) -> Assignment:
    return Assignment("run", round_, 1, node, "", b"")


def plain(client: Client, node: int, rounds: int) -> Flat:
    """One AdamW through all rounds, without any federation."""
    start = client.shared.initial_state()
    moments = Moments(np.zeros_like(start), np.zeros_like(start))
    own = start
    for round_ in range(1, rounds + 1):
        batches = [client.sites.indices[node][b] for b in plan(client, node, round_)]
        member = Member(batches, derive(0, "x"), own, moments)
        trainer = client._trainer(client.spec.local, round_)
        (trained,) = trainer.train(client.sites.examples, [member])
        own = own + trained.change
        assert trained.moments is not None
        moments = trained.moments
    return own


def plan(client: Client, node: int, round_: int) -> list[Indices]:
    lengths = client.sites.examples.lengths[client.sites.indices[node]]
    return plan_batches(lengths, client.spec.local, client.spec.run.seed, round_, node)


@pytest.mark.parametrize("local", [("local.steps=1",), ("local.steps=1", *ADAMW), ("local.steps=3", *ADAMW)])
def test_one_worker_with_a_plain_outer_step_is_the_inner_optimizer(local: tuple[str, ...]) -> None:
    federation = Federation(diloco(*local), [40])
    for _ in range(5):
        federation.step()
    expected = plain(diloco(*local), 40, 5)
    start = federation.client.shared.initial_state()
    assert np.linalg.norm(federation.state - expected) <= 1e-5 * np.linalg.norm(expected - start)


def test_an_inner_optimizer_that_forgets_would_be_caught() -> None:
    local = ("local.steps=1", *ADAMW)
    federation = Federation(diloco(*local), [40])
    for _ in range(5):
        federation.step()
        forgetful = federation.client.replicas
        assert forgetful is not None
        now = standing(federation.client, 40)
        nothing = np.zeros_like(now.own)
        forgetful.keep(asked_of(40, now.round), replace(now, moments=Moments(nothing, nothing)))
    expected = plain(diloco(*local), 40, 5)
    start = federation.client.shared.initial_state()
    assert np.linalg.norm(federation.state - expected) > 1e-2 * np.linalg.norm(expected - start)


def test_the_outer_step_goes_towards_the_nodes() -> None:
    federation = Federation(diloco("local.epochs=1", "recipe.optimizer=sgd", "recipe.learning_rate=0.5"), [10, 40])
    before = federation.state.copy()
    federation.step()
    mean = (federation.own(10) + federation.own(40)) / 2
    assert np.allclose(federation.state - before, 0.5 * (mean - before), atol=1e-6)


@pytest.mark.parametrize(("mixing", "kept"), [(1.0, True), (0.0, False), (0.25, None)])
def test_mixing_1_keeps_what_is_local_and_0_takes_the_federations(mixing: float, kept: bool | None) -> None:
    client = diloco("local.epochs=1", f"recipe.mixing={mixing}")
    federation = Federation(client, [10, 40])
    federation.step()
    own = federation.own(10)
    federation.round += 1
    asked = federation.assignment(10)
    assert client.replicas is not None
    state = CODECS["fp32"].decode(asked.payload, client.shared.delivered(2))
    replica = client.replicas.arrive(asked, state)
    mixed = client.replicas._mixed(asked, replica).own
    if kept is not None:
        assert np.array_equal(mixed, own if kept else federation.state)
    assert np.allclose(mixed, mixing * own + (1 - mixing) * federation.state, atol=1e-6)
    assert not np.allclose(own, federation.state, atol=1e-4)


def test_fragments_take_turns_and_only_they_travel() -> None:
    client = diloco("local.epochs=1", "recipe.fragments=3", "recipe.optimizer=nesterov")
    federation, sent, whole = Federation(client, [10, 40]), [], client.shared.trained(1)
    for _ in range(4):
        before = federation.state.copy()
        updates = federation.step()
        layout = client.shared.sent(federation.round)
        sent.append(set(layout.offsets))
        moved = whole.split(federation.state - before)
        assert {name for name, values in moved.items() if values.any()} == sent[-1]
        assert all(len(u.payload) == 4 * layout.size for u in updates)
    assert sent[0] | sent[1] | sent[2] == set(whole.offsets)
    assert sent[0] == sent[3]
    assert sent[0].isdisjoint(sent[1])
    assert client.shared.delivered(1).size == 0
    assert set(client.shared.delivered(3).offsets) == sent[1]


def test_momentum_of_a_fragment_waits_for_its_turn() -> None:
    client = diloco("local.epochs=1", "recipe.fragments=2", "recipe.optimizer=nesterov")
    federation = Federation(client, [40])
    federation.step()
    first = client.shared.trained(1).cut(federation.buffers["momentum"], client.shared.sent(1))
    federation.step()
    again = client.shared.trained(1).cut(federation.buffers["momentum"], client.shared.sent(1))
    assert first.any()
    assert np.array_equal(first, again)


@pytest.mark.parametrize("fragments", [1, 3])
def test_who_joins_late_is_silent_until_it_has_seen_every_fragment(fragments: int) -> None:
    client = diloco("local.epochs=1", f"recipe.fragments={fragments}")
    federation = Federation(client, [10, 40])
    for _ in range(4):
        federation.step()
    kinds = []
    for _ in range(4):
        kinds.append({u.node: u.kind for u in federation.step([10, 40, 50])}[50])
    assert kinds == ["empty"] * (fragments - 1) + ["delta"] * (5 - fragments)
    assert np.array_equal(standing(client, 50).outer, standing(client, 10).outer)


def test_who_misses_a_round_is_silent_until_what_it_missed_comes_again() -> None:
    client = diloco("local.epochs=1", "recipe.fragments=3")
    federation = Federation(client, [10, 40])
    federation.step()
    federation.step([10])
    kinds = [{u.node: u.kind for u in federation.step()}[40] for _ in range(4)]
    # Round 2 brought what round 1 had moved, which moves again in round 4 and comes in round 5.
    assert kinds == ["empty", "empty", "delta", "delta"]
    assert np.array_equal(standing(client, 40).outer, standing(client, 10).outer)


def test_a_round_that_is_asked_for_again_starts_from_where_it_did() -> None:
    client = diloco("local.epochs=1", "recipe.fragments=2", "recipe.delay=1", "recipe.mixing=0.5", *ADAMW)
    federation = Federation(client, [10, 40])
    for _ in range(2):
        federation.step()
    federation.round += 1
    asked = [federation.assignment(node) for node in (10, 40)]
    first, again = client.train(asked), client.train(asked)
    assert [u.payload for u in first] == [u.payload for u in again]
    assert first[0].payload != first[1].payload


def test_the_steps_before_the_delay_are_of_the_nodes_own_tensors() -> None:
    """With mixing 0, a delay of all but no steps throws the local steps away; no delay keeps them."""
    changes = []
    for delay in (0, 2):
        client = diloco("local.steps=3", f"recipe.delay={delay}")
        federation = Federation(client, [40])
        federation.step()
        federation.round += 1
        (update,) = client.train([federation.assignment(40)])
        changes.append(np.linalg.norm(change_of(client, update)))
    assert changes[1] < 0.6 * changes[0]


def test_an_adapter_is_loaded_as_it_is_whatever_the_nodes_know() -> None:
    """What is handed over at the end is of the best round, and nodes know the fragments of later ones."""
    client = diloco("local.epochs=1", "recipe.fragments=3")
    federation = Federation(client, [10, 40])
    for _ in range(3):
        federation.step()
    best = federation.state.copy()
    for _ in range(3):
        federation.step()
    whole = client.shared.received(4)
    asked = replace(federation.assignment(10), round=4, payload=CODECS["fp32"].encode(best, whole, 0))
    client.load(asked)
    assert np.array_equal(client.adapted.read(), client.shared.whole(best, 4))
    assert not np.array_equal(best, federation.state)


def test_more_fragments_than_modules_are_refused() -> None:
    with pytest.raises(SpecError, match=r"recipe.fragments = 99: the adapter has \d+ modules"):
        diloco("recipe.fragments=99")
