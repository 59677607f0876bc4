"""Shadow runs: a run that learns its data by heart is found out, and one whose noise drowns it is not."""

from collections.abc import Callable

import numpy as np
import pytest

from fedapt.protocols.errors import SpecError
from fedapt.protocols.spec import RunSpec
from fedapt.sim.federation import build
from fedapt.sim.membership import _canaries, membership

SpecOf = Callable[..., RunSpec]

BY_HEART = (
    "run.rounds=1",
    "adapter.rank=8",
    "recipe.name=fedit",
    "recipe.weighting=uniform",
    "local.optimizer=adamw",
    "local.learning_rate=3e-2",
    "local.batch_size=8",
    "local.steps=30",
    "data.partition.kind=iid",
    "data.partition.clients=2",
)
PRIVATE = (
    "privacy.unit=example",
    "privacy.epsilon=8",
    "privacy.noise_multiplier=6.0",
    "local.batch_size=64",  # all examples in each step: ε is in closed form, where each number of them has its own
    "local.steps=5",
)


def test_a_run_that_knows_its_data_by_heart_is_found_out(spec_of: SpecOf) -> None:
    found = membership(build(spec_of(*BY_HEART)), 6, 1e-3)
    assert (found.runs, found.canaries) == (6, 60)
    assert found.interval[0] > 0.55
    assert found.interval[0] <= found.area <= found.interval[1]
    assert found.claimed is None
    assert not found.contradicts


def test_a_run_that_noise_drowns_is_not_found_out(spec_of: SpecOf) -> None:
    found = membership(build(spec_of(*BY_HEART, *PRIVATE)), 6, 1e-3)
    assert found.interval[0] < 0.55
    assert found.area < 0.6
    assert found.claimed is not None
    assert 0 < found.claimed < 5
    assert found.delta == 1e-8
    assert found.epsilon <= found.claimed
    assert not found.contradicts


@pytest.mark.parametrize("mechanism", ["gaussian", "banded"])
def test_clients_are_the_canaries_of_client_level_privacy(spec_of: SpecOf, mechanism: str) -> None:
    spec = spec_of(
        *BY_HEART,
        "data.partition.clients=20",
        "local.steps=1",
        "run.rounds=2",
        "privacy.unit=client",
        "privacy.epsilon=4",
        f"privacy.mechanism={mechanism}",
        *(["privacy.separation=2"] if mechanism == "banded" else []),
    )
    federation = build(spec)
    canaries = _canaries(federation)
    assert len(canaries) == 20
    assert sum(len(canary.own) for canary in canaries) == 60
    heard: list[int] = []
    found = membership(federation, 4, 1e-3, heard.append)
    assert heard == [1, 2, 3, 4]
    assert found.claimed is not None
    assert 4 < found.claimed < 10, "at a δ below that of the spec"
    assert not found.contradicts


def test_an_example_that_is_out_is_in_no_node(spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fits are of all canaries, in or out; those that are out are trained on by nobody."""
    from fedapt.client.client import Client

    seen: list[np.ndarray] = []
    honest = Client.at

    def at(self: Client, sites: object) -> Client:
        client = honest(self, sites)  # type: ignore[arg-type]
        seen.append(np.sort(np.concatenate(list(client.sites.indices.values()))))
        return client

    monkeypatch.setattr(Client, "at", at)
    membership(build(spec_of(*BY_HEART, "local.steps=1")), 4, 1e-3)
    sizes = [len(own) for own in seen]
    assert all(10 < size < 50 for size in sizes), "about a half, by coins"
    assert len({own.tobytes() for own in seen}) == 4


@pytest.mark.parametrize(
    ("overrides", "runs", "message"),
    [
        ((), 3, "at least 4"),
        (("data.limit=10",), 4, "canaries: an attack on fewer than 16"),
        (
            ("privacy.unit=client", "privacy.epsilon=4", "participation.sampling=fixed", "participation.rate=0.5"),
            4,
            "leave some out",
        ),
    ],
)
def test_what_cannot_be_attacked(spec_of: SpecOf, overrides: tuple[str, ...], runs: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        membership(build(spec_of(*BY_HEART, *overrides)), runs, 1e-3)
