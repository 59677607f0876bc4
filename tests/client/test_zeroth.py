"""Slopes of a cohort of probes against probes made one by one, and what a private site sends."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedapt.client.client import Client
from fedapt.client.exchanger import Probe
from fedapt.client.policy import UNTOLD, RefusalError
from fedapt.client.slopes import ClientProber, exchanger_of
from fedapt.client.tasks import member_losses
from fedapt.client.zeroth import Ask, Probing
from fedapt.kernels.cohort import Batched, Looped
from fedapt.kernels.directions import Directions, signs_reference
from fedapt.protocols.errors import PrivacyError
from fedapt.protocols.exchange import Exchange, terms_of

from .clients import client_of

RADIUS = 1e-2


def zeroth_client(*overrides: str, recipe: str = "dpzo") -> Client:
    return client_of(f"recipe.name={recipe}", "recipe.weighting=uniform", "zeroth.directions=16", *overrides)


def probing_of(client: Client, make: Callable[..., object] = Looped, sides: int = 2) -> Probing:
    names = [client.adapted.parameter_names[t.name] for t in client.trained.tensors]
    forward = Batched(client.adapted.model, names) if make is Batched else make(client.adapted.model)
    return Probing(client.adapted, forward, client.trained, sides)  # type: ignore[arg-type]


def mezo_slopes(client: Client, rows: np.ndarray, directions: Directions, sides: int) -> list[float]:
    """MeZO, algorithm 1, but for the restore: perturb the model's own parameters, run it, one direction at a time."""
    layout, examples, model = client.trained, client.sites.examples, client.adapted.model
    start = layout.cut(client.start, layout)

    @torch.no_grad()
    def loss(weights: np.ndarray) -> float:
        client.adapted.write(weights.astype(np.float32))
        batch = client.adapted.task.collate(examples, [rows])
        logits = model(**batch.inputs).logits.float()
        return float(member_losses(client.adapted.task, logits, batch.labels, 1)[0])

    slopes = []
    for z in signs_reference(directions, start.size):
        up, down = loss(start + np.float32(RADIUS) * z), loss(start - np.float32(RADIUS) * z if sides == 2 else start)
        slopes.append((up - down) / (sides * RADIUS))
    client.adapted.write(client.start)
    return slopes


@pytest.mark.parametrize("make", [Batched, Looped])
@pytest.mark.parametrize("sides", [1, 2])
def test_a_cohort_of_probes_is_as_many_probes_one_by_one(make: Callable[..., object], sides: int) -> None:
    client = zeroth_client()
    asks = [
        Ask(client.sites.indices[40][:7], Directions(5, 1, np.arange(16))),
        Ask(client.sites.indices[10], Directions(5, 1, np.arange(16, 20))),
        Ask(client.sites.indices[30], Directions(5, 1, np.arange(3))),
    ]
    together = probing_of(client, make, sides).slopes(client.sites.examples, client.start, asks, RADIUS)
    for ask, ours in zip(asks, together, strict=True):
        theirs = np.array(mezo_slopes(client, ask.rows, ask.directions, sides))
        assert np.abs(ours - theirs).max() <= 2e-3 * np.abs(theirs).max() + 1e-4


def test_slopes_are_those_of_the_gradient() -> None:
    client = zeroth_client()
    rows, directions = client.sites.indices[40], Directions(5, 1, np.arange(16))
    batch = client.adapted.task.collate(client.sites.examples, [rows])
    loss = member_losses(client.adapted.task, client.adapted.model(**batch.inputs).logits, batch.labels, 1)[0]
    parameters = [client.adapted.parameters[t.name] for t in client.trained.tensors]
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    gradient = torch.cat([g.flatten() for g in gradients]).numpy()
    (slopes,) = probing_of(client).slopes(client.sites.examples, client.start, [Ask(rows, directions)], 1e-3)
    expected = signs_reference(directions, len(gradient)) @ gradient
    assert np.corrcoef(slopes, expected)[0, 1] > 0.99


def test_the_slopes_of_examples_have_the_batch_as_their_mean() -> None:
    client = zeroth_client()
    ask = Ask(client.sites.indices[40], Directions(5, 1, np.arange(16)))
    probing = probing_of(client, Batched)
    each = probing.slopes_of_examples(client.sites.examples, client.start, ask, RADIUS)
    (mean,) = probing.slopes(client.sites.examples, client.start, [ask], RADIUS)
    assert each.shape == (12, 16)
    assert np.allclose(each.mean(axis=0), mean, atol=1e-4)


def probe(node: int, number: int = 3, count: int = 16) -> Probe:
    return Probe(node, number, Directions(5, number, np.arange(count)), RADIUS)


def test_a_node_without_data_says_so_and_one_that_is_not_here_too() -> None:
    first, empty, nowhere = ClientProber(zeroth_client())(client_of().start, [probe(10), probe(20), probe(99)])
    assert first.values is not None
    assert first.values.shape == (16,)
    assert empty.values is nowhere.values is None


PRIVATE = ("privacy.unit=example", "privacy.epsilon=8", "privacy.clip=0.5", "run.rounds=20")


def test_noise_is_no_function_of_anything_that_travels() -> None:
    """The attack on DPZero's released code, against our messages: ask twice for the same, with every seed the same."""
    twice = [exchanger_of(zeroth_client(*PRIVATE, "local.batch_size=16")) for _ in range(2)]
    request = Exchange("run", 40, 1, 0, -12, RADIUS)
    (one,), (two,) = (list(node.answer([request])) for node in twice)
    assert one.kind == two.kind == "codes"
    assert one.codes != two.codes


@pytest.mark.parametrize("planted", [False, True])
def test_seeded_noise_can_be_taken_off_and_ours_cannot(planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever knows all seeds of the run repeats the site's draws. A planted fault, noise from the direction's own seed
    as in DPZero's release, gives the exact sum away; the same attack on our noise leaves it as uncertain as it was."""
    from fedapt.client import slopes as module
    from fedapt.privacy.noise import Grid
    from fedapt.privacy.randomness import SecretRandomness, SimulationRandomness
    from fedapt.protocols.keys import derive

    def seeded(_: object, key: int) -> object:
        return SimulationRandomness(key) if planted else SecretRandomness()

    monkeypatch.setattr(module, "randomness_of", seeded)
    client = zeroth_client(*PRIVATE, "local.batch_size=16")
    prober = ClientProber(client)
    mechanism = prober._mechanism(12, 16)
    (sent,) = prober(client.start, [probe(40)])
    exact = np.sum(
        [
            mechanism.grid.values(mechanism.bounded(row[None]))  # type: ignore[union-attr]
            for row in prober._each(client.start, probe(40), client.sites.indices[40])
        ],
        axis=0,
    )
    source = SimulationRandomness(derive(client.spec.run.seed, "private slopes", 3, 40))
    mechanism.draw(source)
    grid = mechanism.grid
    assert isinstance(grid, Grid)
    noise = grid.values(grid.noised(np.zeros(16, np.int64), mechanism.noise_std, source))
    assert sent.values is not None
    left = sent.values * mechanism.expected - noise - exact
    if planted:
        assert np.abs(left).max() < 1e-3 * mechanism.noise_std
    else:
        assert left.std() > 0.5 * mechanism.noise_std


def test_one_example_moves_what_is_summed_by_the_clip_at_most() -> None:
    client = zeroth_client(*PRIVATE, "privacy.clip=0.001")
    prober = ClientProber(client)
    mechanism, rows = prober._mechanism(12, 16), client.sites.indices[40]
    each = prober._each(client.start, probe(40), rows)
    assert np.linalg.norm(each, axis=1).min() > 0.001, "the clip is at work"
    whole, without = mechanism.bounded(each), mechanism.bounded(each[1:])
    assert mechanism.grid is not None
    assert np.linalg.norm(mechanism.grid.values(whole - without)) <= mechanism.sensitivity


@pytest.mark.slow
def test_a_private_site_keeps_an_account_and_stops_at_its_cap() -> None:
    client = zeroth_client("privacy.unit=example", "privacy.epsilon=8", "privacy.noise_multiplier=1.0", "run.rounds=50")
    prober, answers = ClientProber(client), []
    for number in range(1, 30):
        answers += prober(client.start, [probe(40, number)])
    kinds = [bool(answer.refusal) for answer in answers]
    assert kinds == sorted(kinds)
    assert 0 < sum(kinds) < len(kinds)
    assert "would bring epsilon above 8 at" in answers[-1].refusal
    told = [answer.epsilon for answer in answers if answer.epsilon is not None]
    assert told == sorted(told)
    assert 0 < told[0] <= told[-1] <= 8


def test_a_vector_of_a_client_is_clipped_before_it_leaves() -> None:
    client = zeroth_client("privacy.unit=client", "privacy.epsilon=2", "privacy.clip=0.01")
    (own,) = ClientProber(client)(client.start, [probe(40)])
    assert own.values is not None
    assert np.linalg.norm(own.values) == pytest.approx(0.01, rel=1e-5)


def test_an_exchanger_refuses_what_makes_no_sense() -> None:
    node = exchanger_of(zeroth_client())
    good = Exchange("run", 40, 1, 0, -6, RADIUS)
    answers = list(
        node.answer(
            [
                good,
                Exchange("other", 40, 1, 0, -6, RADIUS),
                Exchange("run", 40, 1, 0, 99, RADIUS),
                Exchange("run", 40, 5, 0, -6, RADIUS),
                Exchange("run", 40, 1, 0, -6, RADIUS, proof=bytes(32)),
                Exchange("run", 40, 1, 0, -6, RADIUS, snapshot=b"nonsense"),
            ]
        )
    )
    assert [answer.kind for answer in answers] == ["refused", "refused", "lost", "lost", "codes", "codes"]
    assert len(answers[-1].codes) == terms_of(zeroth_client().spec).code.size(16)


@pytest.mark.parametrize(
    ("error", "told"), [(RefusalError("from 2.7 to 3.1", told="above 3"), "above 3"), (PrivacyError("12 rows"), UNTOLD)]
)
def test_a_refused_exchange_tells_nothing_of_what_was_spent(
    error: PrivacyError, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def charge(*_: object, **__: object) -> None:
        raise error

    client = zeroth_client(*PRIVATE, "privacy.noise_multiplier=2")
    monkeypatch.setattr(client.accounts, "charge", charge)
    (answer,) = ClientProber(client)(client.start, [probe(40)])
    assert answer.refusal == told
    assert str(error) in caplog.text
