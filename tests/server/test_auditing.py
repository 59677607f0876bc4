"""The audit of the real path: the right one passes in every form, and each planted bug is caught by the test named."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from fedapt.privacy import mechanism
from fedapt.privacy.audit import Values
from fedapt.privacy.clipping import BIT_NOISE, clip
from fedapt.privacy.events import Event
from fedapt.privacy.mechanism import Mechanism
from fedapt.privacy.noise import Grid, total
from fedapt.privacy.randomness import Integers, Randomness, SimulationRandomness
from fedapt.privacy.sampling import fixed_size
from fedapt.protocols.codecs import Codec, codec_of
from fedapt.protocols.keys import derive
from fedapt.protocols.layout import AdapterLayout, Flat
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.spec import RunSpec, Wire
from fedapt.server import audited
from fedapt.server.audited import AuditedClip, AuditedPath
from fedapt.server.auditing import (
    Finding,
    canary_trials,
    clip_findings,
    findings,
    mu,
    noise,
    one_run,
    sampling,
    secrecy,
    sensitivity,
)
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


def clip_of(*overrides: str) -> AuditedClip:
    return AuditedClip(RunSpec.check(SPEC).set("privacy.clipping=adaptive", *overrides), POPULATION)


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


@pytest.mark.parametrize("draw", ["poisson", "fixed"])
@pytest.mark.parametrize("noise_multiplier", [1.0, 20.0])
def test_the_right_adaptive_clip_passes(draw: str, noise_multiplier: float) -> None:
    path = clip_of(f"participation.sampling={draw}", f"privacy.noise_multiplier={noise_multiplier}")
    found = list(clip_findings(path))
    assert not refuted(found), found
    assert [finding.name for finding in found] == ["clip's sensitivity", "clip's noise", "clip's secrecy"]
    distance, spread, _ = found
    assert distance.measured == pytest.approx(distance.claimed, rel=1e-3), "the worst neighbours are as bad as charged"
    expected, changed = POPULATION / 10, 2 if draw == "fixed" else 1
    assert distance.claimed == pytest.approx(changed / 2, rel=1e-3)
    assert spread.claimed == pytest.approx(max(BIT_NOISE * expected, noise_multiplier * changed))


def test_the_bits_of_an_adaptive_clip_add_up() -> None:
    path = clip_of("privacy.noise_multiplier=0.01")
    within, beyond = np.zeros(1, np.float32), np.full(1, 3.0, np.float32)
    released = [path.release(changes, 1) for changes in ([], [within] * 3, [within, beyond], [beyond] * 2)]
    quiet = path.again(noise="simulation")
    start = quiet.release([], 1)
    sums = [quiet.release(changes, 1) - start for changes in ([], [within] * 3, [within, beyond], [beyond] * 2)]
    assert np.concatenate(sums) == pytest.approx([0, 1.5, 0, -1], abs=1e-4)
    assert all(own.shape == (1,) for own in released)


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


@pytest.mark.parametrize("draw", ["poisson", "fixed"])
@pytest.mark.parametrize("rate", [0.005, 0.1, 0.9])
def test_cohorts_from_the_public_seed(monkeypatch: pytest.MonkeyPatch, draw: str, rate: float) -> None:
    """Noise stays secret; but who can draw the cohorts again knows who took part, and nothing is amplified."""
    path = path_of(f"participation.sampling={draw}", f"participation.rate={rate}")
    assert not secrecy(path).contradicts
    honest = ClientLevel._source

    def seeded(self: ClientLevel, purpose: str, round_: int) -> Randomness:
        if purpose == "noise":
            return honest(self, purpose, round_)
        return SimulationRandomness(derive(self.spec.run.seed, "privacy", purpose, round_))

    monkeypatch.setattr(ClientLevel, "_source", seeded)
    assert not sampling(path).contradicts, "they are drawn with the right probabilities"
    found = secrecy(path)
    assert found.contradicts
    assert found.measured == pytest.approx(1)
    assert "cohorts" in found.detail
    assert "knows who takes part" in found.detail


def test_where_all_take_part_no_draw_is_secret() -> None:
    found = secrecy(path_of("participation.sampling=all", "participation.rate=1.0"))
    assert not found.contradicts
    assert "noise" in found.detail


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


def next_clip(self: Mechanism, fraction: float) -> Mechanism:
    return replace(self, clip=self.clip.after(fraction))


def of_the_survivors(self: Mechanism, within: Sequence[bool], source: Randomness) -> Mechanism:
    """The part of those that answered, as it is: no noise, and a denominator that tells how many there were."""
    return next_clip(self, sum(within) / max(1, len(within)))


def without_bit_noise(self: Mechanism, within: Sequence[bool], source: Randomness) -> Mechanism:
    return next_clip(self, sum(bit - 0.5 for bit in within) / self.expected + 0.5)


def with_less_bit_noise(self: Mechanism, within: Sequence[bool], source: Randomness) -> Mechanism:
    grid, std = Grid.fitting(self._bit_noise, 0.5, 1), 0.9 * self._bit_noise
    halves = np.array([sum(1 if bit else -1 for bit in within) * round(0.5 / grid.step)])
    return next_clip(self, float(grid.values(grid.noised(halves, std, source))[0]) / self.expected + 0.5)


def with_whole_bits(self: Mechanism, within: Sequence[bool], source: Randomness) -> Mechanism:
    """Bits that are 0 or 1 change the sum by 1, and ½ is charged."""
    return adapted(self, [*within, *[True for bit in within if bit]], source)


def with_public_bit_noise(self: Mechanism, within: Sequence[bool], source: Randomness) -> Mechanism:
    return adapted(self, within, SimulationRandomness(1))


adapted = Mechanism._adapted


@pytest.mark.parametrize("draw", ["poisson", "fixed"])
@pytest.mark.parametrize(
    ("bug", "tests"),
    [
        (of_the_survivors, {"sensitivity", "noise", "secrecy"}),
        (without_bit_noise, {"noise", "secrecy"}),
        (with_less_bit_noise, {"noise"}),
        (with_whole_bits, {"sensitivity"}),
        (with_public_bit_noise, {"secrecy"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_adaptive_clip_that_tells_more_than_is_charged(
    monkeypatch: pytest.MonkeyPatch,
    bug: Callable[[Mechanism, Sequence[bool], Randomness], Mechanism],
    tests: set[str],
    draw: str,
) -> None:
    monkeypatch.setattr(Mechanism, "_adapted", bug)
    overrides = "privacy.clipping=adaptive", f"participation.sampling={draw}"
    assert not refuted([sensitivity(path_of(*overrides)), secrecy(path_of(*overrides))]), "the changes show nothing"
    assert refuted(clip_findings(clip_of(*overrides))) >= {f"clip's {test}" for test in tests}


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
