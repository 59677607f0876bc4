"""The audit of noise that is correlated over rounds: the right one passes, and each planted bug is caught."""

from collections.abc import Collection

import numpy as np
import pytest

from fedapt.privacy import banded
from fedapt.privacy.banded import Banded, correlated
from fedapt.privacy.clipping import clip
from fedapt.privacy.events import MatrixEvent
from fedapt.privacy.noise import Values
from fedapt.privacy.randomness import Integers, Randomness, SimulationRandomness
from fedapt.privacy.sampling import in_turn
from fedapt.protocols.spec import RunSpec
from fedapt.server.audited import AuditedPath, AuditedRun, audited_path
from fedapt.server.auditing import Finding, canary_trials, findings, mu, noise, sampling, secrecy, sensitivity
from fedapt.server.private import BandedLevel

SPEC = {
    "run": {"rounds": 6},
    "model": {"base": "nowhere", "task": "causal-lm"},
    "recipe": {"name": "ffa", "weighting": "uniform"},
    "privacy": {
        "unit": "client",
        "epsilon": 8.0,
        "mechanism": "banded",
        "separation": 3,
        "noise_multiplier": 1.0,
        "clip": 0.5,
    },
    "wire": {"codec": "int8"},
}


pytestmark = pytest.mark.usefixtures("one_stream_of_secrets")


def path_of(*overrides: str) -> AuditedPath:
    path = audited_path(RunSpec.check(SPEC).set(*overrides), 200)
    assert isinstance(path, AuditedRun)
    return path


def refuted(*found: Finding) -> set[str]:
    return {finding.name for finding in found if finding.contradicts}


def all_findings(path: AuditedPath, trials: int = 2000) -> list[Finding]:
    return list(findings(path, trials))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        pytest.param(("recipe.name=fedit", "wire.codec=fp32"), marks=pytest.mark.slow),
        ("run.rounds=2", "privacy.separation=5"),
        pytest.param(("privacy.separation=1",), marks=pytest.mark.slow),
        pytest.param(("privacy.noise=simulation",), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_the_right_mechanism_passes(overrides: tuple[str, ...]) -> None:
    path = path_of(*overrides)
    found = all_findings(path)
    assert not refuted(*found), found
    assert [f.name for f in found] == ["sensitivity", "μ", "one run", "noise", "turns", "secrecy"]
    distance, told, *_ = found
    assert distance.measured == pytest.approx(distance.claimed, rel=1e-4), "the worst run is as bad as charged"
    assert told.measured is not None
    assert told.measured > 0.5, "an audit that saw nothing would pass anything"


def test_the_sensitivity_of_independent_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise for one round's sum, as if a run were one release and nothing correlated."""
    monkeypatch.setattr(banded, "encoded_norm", lambda rounds, separation, bands: 1.0)
    path = path_of()
    assert refuted(sensitivity(path), mu(path, canary_trials(path, 2000))) == {"sensitivity", "μ"}


@pytest.mark.slow
def test_a_long_run_is_audited_as_a_shorter_one() -> None:
    path = path_of("run.rounds=500", "privacy.separation=50")
    assert isinstance(path.event, MatrixEvent)
    assert (path.event.rounds, path.event.participations) == (100, 2)
    distance = sensitivity(path)
    assert not distance.contradicts
    assert distance.measured == pytest.approx(distance.claimed, rel=1e-3)


def test_turns_that_nobody_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    def everybody(nodes: Collection[int], separation: int, round_: int) -> tuple[int, ...]:
        return tuple(sorted(nodes))

    monkeypatch.setattr(banded, "in_turn", everybody)
    path = path_of()
    turns = sampling(path)
    assert refuted(sensitivity(path), turns) == {"sensitivity", "turns"}
    assert (turns.claimed, turns.measured) == (3, 1)


def test_turns_a_round_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "in_turn", lambda nodes, separation, round_: in_turn(nodes, separation - 1, round_))
    assert sampling(path_of()).contradicts


def test_noise_that_is_not_correlated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "correlated", lambda fresh, past, column: fresh)
    assert noise(path_of(), 20_000).contradicts


def test_noise_that_is_taken_back_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(fresh: Integers, past: Integers, column: Values) -> Integers:
        return correlated(fresh, past, np.concatenate([column[:1], 2 * column[1:]]))

    monkeypatch.setattr(banded, "correlated", twice)
    assert noise(path_of(), 20_000).contradicts


def test_a_tenth_less_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(self: Banded, past: Integers, source: Randomness) -> Integers:
        fresh = self.grid.noised(np.zeros(self.dimensions, np.int64), 0.9 * self.noise_std, source)
        return correlated(fresh, past, self.coefficients)

    monkeypatch.setattr(Banded, "_noise", weak)
    path = path_of()
    assert noise(path, 100_000).contradicts


def test_clip_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "clip", lambda change, bound: (change, False))
    assert sensitivity(path_of()).contradicts


def test_a_clip_that_is_a_little_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "clip", lambda change, bound: clip(change, 1.001 * bound))
    assert sensitivity(path_of()).contradicts


def test_noise_from_the_public_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeded(self: BandedLevel, purpose: str, round_: int) -> Randomness:
        return SimulationRandomness(round_)

    assert not secrecy(path_of()).contradicts
    monkeypatch.setattr(BandedLevel, "_source", seeded)
    assert secrecy(path_of()).contradicts
