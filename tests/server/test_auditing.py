"""The audit of the real path: the right one passes in every form, and each planted bug is caught by the test named."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from fedapt.privacy import mechanism
from fedapt.privacy.audit import Values
from fedapt.privacy.clipping import clip
from fedapt.privacy.events import Event
from fedapt.privacy.mechanism import Mechanism
from fedapt.privacy.noise import total
from fedapt.privacy.randomness import Integers, Randomness, SimulationRandomness
from fedapt.privacy.sampling import fixed_size
from fedapt.protocols.codecs import Codec, codec_of
from fedapt.protocols.keys import derive
from fedapt.protocols.layout import AdapterLayout, Flat
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.spec import RunSpec, Wire
from fedapt.server import audited
from fedapt.server.audited import AuditedPath
from fedapt.server.auditing import Finding, canary_trials, findings, mu, noise, one_run, sampling, secrecy, sensitivity
from fedapt.server.optimizers import Buffers
from fedapt.server.private import ClientLevel

RECIPES_UNDER_TEST = [name for name, recipe in RECIPES.items() if "client" in recipe.units]
CODECS = ["fp32", "bf16", "int8", "fp4", "top-k", "seed-projection"]
CLIP = 0.5
SPEC = {
    "model": {"base": "nowhere", "task": "causal-lm"},
    "recipe": {"name": "ffa", "weighting": "uniform"},
    "participation": {"sampling": "poisson", "rate": 0.1, "minimum": 0},
    "privacy": {"unit": "client", "epsilon": 8.0, "noise_multiplier": 1.0, "clip": CLIP},
    "wire": {"codec": "int8"},
}
POPULATION = 200


pytestmark = pytest.mark.usefixtures("one_stream_of_secrets")


def path_of(*overrides: str) -> AuditedPath:
    return AuditedPath(RunSpec.check(SPEC).set(*overrides), POPULATION)


def refuted(found: Iterable[Finding]) -> set[str]:
    return {finding.name for finding in found if finding.contradicts}


@pytest.mark.parametrize("recipe", RECIPES_UNDER_TEST)
@pytest.mark.parametrize("draw", ["poisson", "fixed", "all"])
def test_the_right_mechanism_passes(recipe: str, draw: str) -> None:
    rate = 1.0 if draw == "all" else 0.1
    path = path_of(f"recipe.name={recipe}", f"participation.sampling={draw}", f"participation.rate={rate}")
    found = list(findings(path, 4000))
    assert not refuted(found), found
    assert [finding.name for finding in found] == ["sensitivity", "μ", "one run", "noise", "sampling", "secrecy"]
    distance, told, *_ = found
    assert distance.measured == pytest.approx(distance.claimed, rel=1e-5), "the worst neighbours are as bad as charged"
    assert told.claimed == pytest.approx(1)
    assert told.measured is not None
    assert told.measured > 0.75, "an audit that saw nothing would pass anything"


@pytest.mark.parametrize("codec", CODECS)
def test_the_right_mechanism_passes_over_any_codec(codec: str) -> None:
    path = path_of(f"wire.codec={codec}")
    distance = sensitivity(path)
    assert not distance.contradicts
    assert distance.measured == pytest.approx(distance.claimed, rel=1e-5)
    told = mu(path, canary_trials(path, 2000))
    assert not told.contradicts
    assert told.measured is not None
    assert told.measured > 0.4


@pytest.mark.parametrize(
    "overrides",
    [
        ["privacy.clipping=adaptive"],
        ["privacy.clipping=adaptive", "participation.sampling=all", "participation.rate=1.0"],
        ["privacy.noise_multiplier=20.0"],
        ["privacy.noise_multiplier=0.3", "privacy.clip=1e-6"],
        ["privacy.clip=1e6", "recipe.optimizer=nesterov", "recipe.learning_rate=0.1"],
        ["adapter.rank=16", "recipe.name=refresh", "recipe.period=1", "recipe.budget=32"],
        ["adapter.rank=16", "recipe.name=fedsvd", "recipe.period=3"],
        ["recipe.name=fedit", "adapter.method=dora"],
    ],
    ids=" ".join,
)
def test_the_right_mechanism_passes_with(overrides: list[str]) -> None:
    found = list(findings(path_of(*overrides), 4000))
    assert not refuted(found), found


def test_mu_is_tight_in_what_a_run_would_do() -> None:
    told = mu(path_of(), canary_trials(path_of(), 50_000))
    assert told.measured is not None
    assert 0.9 < told.measured <= told.claimed


def test_the_noise_test_resolves_a_hundredth(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not noise(path_of(), 1_000_000).contradicts
    for factor in (0.99, 1.01):
        weaken(monkeypatch, factor)
        assert noise(path_of(), 1_000_000).contradicts


def test_one_run_says_what_it_would_need() -> None:
    path = path_of("privacy.noise_multiplier=0.9")
    found = one_run(path, canary_trials(path, 4000))
    assert found.measured is None
    assert not found.contradicts
    assert "this ε needs" in found.detail
    hopeless = path_of("privacy.noise_multiplier=0.1")
    assert "more guesses than can be made" in one_run(hopeless, canary_trials(hopeless, 1000)).detail


def test_simulation_noise_is_known_and_said_to_be() -> None:
    found = secrecy(path_of("privacy.noise=simulation"))
    assert found.measured == pytest.approx(1)
    assert found.claimed == 1
    assert not found.contradicts
    assert "as the event says" in found.detail


# The planted bugs. Each is one change of the code that a run uses.


def weaken(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    def weak(self: Mechanism, rounded: Iterable[Integers], source: Randomness) -> Integers:
        return self.grid.noised(total(rounded, self.dimensions), factor * self.noise_std, source)

    monkeypatch.setattr(Mechanism, "_noised", weak)


def without_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "clip", lambda change, bound: (change, False))


def test_a_tenth_less_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    weaken(monkeypatch, 0.9)
    path = path_of()
    assert mu(path, canary_trials(path, 60_000)).contradicts
    assert noise(path, 100_000).contradicts
    adaptive = path_of("privacy.clipping=adaptive")
    assert noise(adaptive, 100_000).contradicts


def test_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mechanism, "_noised", lambda self, rounded, source: total(rounded, self.dimensions))
    path = path_of("privacy.noise_multiplier=2.0")
    trials = canary_trials(path, 4000)
    assert one_run(path, trials).contradicts
    assert refuted(findings(path, 4000)) >= {"μ", "one run", "noise", "secrecy"}


def test_noise_from_the_public_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    path = path_of("run.seed=7")
    change = path.arrived(np.linspace(-1, 1, path.size).astype(np.float32), "change")
    clipped, _ = clip(change, CLIP)

    def leftover(released: Values, round_: int) -> float:
        """What is left beside the update after the noise of the seed is taken away, in standard deviations."""
        source = SimulationRandomness(derive(7, "privacy", "noise", round_))
        private = path.private.mechanism
        zeros = np.zeros(path.size, np.int64)
        guess = private.grid.values(private.grid.noised(zeros, private.noise_std, source))
        return float(np.std(released - guess - clipped)) / private.noise_std

    assert leftover(path.release([change], 3), 3) > 1.3, "secret noise cannot be taken away: two noises are left"
    assert not secrecy(path).contradicts

    def seeded(self: ClientLevel, purpose: str, round_: int) -> Randomness:
        return SimulationRandomness(derive(self.spec.run.seed, "privacy", purpose, round_))

    monkeypatch.setattr(ClientLevel, "_source", seeded)
    assert leftover(path.release([change], 3), 3) < 1e-5, "the update lies bare"
    assert refuted([secrecy(path)]) == {"secrecy"}


def test_noise_from_another_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody guesses this key, but a restart draws the same noise again."""
    monkeypatch.setattr(
        ClientLevel, "_source", lambda self, purpose, round_: SimulationRandomness(derive(1, "x", round_))
    )
    found = secrecy(path_of())
    assert found.contradicts
    assert "made again" in found.detail


@pytest.mark.parametrize("draw", ["poisson", "fixed"])
def test_clip_off(monkeypatch: pytest.MonkeyPatch, draw: str) -> None:
    without_clip(monkeypatch)
    path = path_of(f"participation.sampling={draw}")
    assert sensitivity(path).contradicts
    assert mu(path, canary_trials(path, 2000)).contradicts


def test_a_clip_that_is_a_little_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "clip", lambda change, bound: clip(change, 1.001 * bound))
    assert sensitivity(path_of()).contradicts


Release = Callable[[Mechanism, Iterable[Flat], Randomness], tuple[Flat, Mechanism]]
released: Release = Mechanism.release


def test_denominator_from_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(self: Mechanism, changes: Sequence[Flat], source: Randomness) -> tuple[Flat, Mechanism]:
        return released(replace(self, expected=float(max(1, len(changes)))), changes, source)

    monkeypatch.setattr(Mechanism, "release", release)
    found = sensitivity(path_of())
    assert found.contradicts
    assert found.measured is not None
    assert found.measured > 2 * found.claimed


def test_a_skipped_empty_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ClientLevel.release

    def release(
        self: ClientLevel, changes: Sequence[Flat], buffers: Buffers, round_: int
    ) -> tuple[Flat, Buffers, Sequence[Event]]:
        mean, buffers, events = honest(self, changes, buffers, round_)
        return (mean if changes else np.zeros_like(mean)), buffers, events

    monkeypatch.setattr(ClientLevel, "release", release)
    path = path_of()
    assert sensitivity(path).contradicts
    assert noise(path, 100_000).contradicts


def test_a_fixed_size_accounted_as_poisson(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sampling(path_of()).contradicts
    monkeypatch.setattr(Mechanism, "draw", lambda self, nodes, source: fixed_size(nodes, len(nodes) // 10, source))
    assert sampling(path_of()).contradicts


@pytest.mark.parametrize("draw", ["poisson", "fixed"])
def test_always_the_same_cohort(monkeypatch: pytest.MonkeyPatch, draw: str) -> None:
    honest = Mechanism.draw

    def first(self: Mechanism, nodes: Sequence[int], source: Randomness) -> tuple[int, ...]:
        return tuple(nodes)[: len(honest(self, nodes, source))]

    monkeypatch.setattr(Mechanism, "draw", first)
    assert sampling(path_of(f"participation.sampling={draw}")).contradicts


def test_clip_of_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(self: Mechanism, changes: Iterable[Flat], source: Randomness) -> tuple[Flat, Mechanism]:
        zeros = np.zeros(self.dimensions, np.float32)
        clipped, _ = clip(np.sum([zeros, *changes], axis=0, dtype=np.float32), self.clip.bound)
        return released(self, [clipped], source)

    monkeypatch.setattr(Mechanism, "release", release)
    found = sensitivity(path_of())
    assert found.contradicts
    assert found.measured == pytest.approx(2 * CLIP, rel=1e-4)
    assert "against another" in found.detail


class ClipsFirst:
    """A node that clips what it sends, for a server that trusts it."""

    def __init__(self, codec: Codec) -> None:
        self.name, self.codec = codec.name, codec

    def size(self, layout: AdapterLayout) -> int:
        return self.codec.size(layout)

    def encode(self, flat: Flat, layout: AdapterLayout, key: int) -> bytes:
        return self.codec.encode(clip(flat, CLIP)[0], layout, key)

    def decode(self, payload: bytes, layout: AdapterLayout) -> Flat:
        return self.codec.decode(payload, layout)


@pytest.mark.parametrize("codec", ["bf16", "int8", "fp4", "seed-projection"])
@pytest.mark.parametrize("noise_multiplier", [0.5, 5.0])
def test_clip_before_the_codec_rounds(monkeypatch: pytest.MonkeyPatch, codec: str, noise_multiplier: float) -> None:
    def clipping(wire: Wire) -> Codec:
        return ClipsFirst(codec_of(wire))

    monkeypatch.setattr(audited, "codec_of", clipping)
    overrides = f"wire.codec={codec}", f"privacy.noise_multiplier={noise_multiplier}"
    assert not sensitivity(path_of(*overrides)).contradicts, "the server clips too"
    without_clip(monkeypatch)
    found = sensitivity(path_of(*overrides))
    assert found.contradicts
    assert "all coordinates" in found.detail
