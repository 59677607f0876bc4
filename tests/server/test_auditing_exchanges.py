"""The audit of an exchange: the right one passes in every code, and each planted bug is caught by the test named."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from fedapt.auditing import audit
from fedapt.kernels.directions import Doubles
from fedapt.privacy.audit import Values
from fedapt.privacy.events import Event
from fedapt.privacy.randomness import SimulationRandomness
from fedapt.protocols.errors import SpecError
from fedapt.protocols.layout import Flat
from fedapt.protocols.scalars import Counts
from fedapt.protocols.spec import RunSpec
from fedapt.server import private
from fedapt.server.audited import AuditedExchange, audited_path
from fedapt.server.auditing import Finding, canary_trials, findings, mu, noise, secrecy, sensitivity
from fedapt.server.reduction import Reduction

SPEC = {
    "model": {"base": "nowhere", "task": "causal-lm"},
    "recipe": {"name": "dpzo", "weighting": "uniform"},
    "privacy": {"unit": "client", "epsilon": 8.0, "noise_multiplier": 1.0, "clip": 0.4, "population": 100},
}


pytestmark = pytest.mark.usefixtures("one_stream_of_secrets")


def spec_of(*overrides: str) -> RunSpec:
    return RunSpec.check(SPEC).set(*overrides)


def path_of(*overrides: str) -> AuditedExchange:
    path = audited_path(spec_of(*overrides), 100)
    assert isinstance(path, AuditedExchange)
    return path


@pytest.mark.parametrize("code", ["int8", "log8", "1-bit"])
def test_the_right_mechanism_passes_in_every_code(code: str) -> None:
    found = list(findings(path_of(f"zeroth.code={code}"), 2000))
    assert not [finding for finding in found if finding.contradicts]
    distance, told, *_ = found
    assert distance.measured == pytest.approx(distance.claimed, rel=1e-4), "the worst neighbours are as bad as charged"
    assert told.measured is not None
    assert told.measured > 0.4, "an audit that saw nothing would pass anything"


Released = tuple[Doubles, list[Event]]


def unclipped(self: Reduction, counts: Sequence[Counts], scale: int, number: int) -> Released:
    """What a node's codes say is believed."""
    noise_alone, events = RELEASED(self, [], scale, number)
    return noise_alone + np.sum([np.ldexp(own.astype(float), scale) for own in counts], axis=0, initial=0.0), events


def clipped_one_by_one(self: Reduction, counts: Sequence[Counts], scale: int, number: int) -> Released:
    """Each slope for itself, as papers that noise single scalars have it, and charged as one."""
    assert self.private is not None
    bound = self.private.mechanism.clip.bound
    noise_alone, events = RELEASED(self, [], scale, number)
    slopes = [np.clip(np.ldexp(own.astype(float), scale), -bound, bound) for own in counts]
    return noise_alone + np.sum(slopes, axis=0, initial=0.0), events


RELEASED = Reduction.released


@pytest.mark.parametrize(
    ("bug", "test"), [(unclipped, sensitivity), (clipped_one_by_one, sensitivity)], ids=lambda value: value.__name__
)
def test_a_clip_that_is_none_is_caught(
    bug: Callable[..., Released], test: Callable[[AuditedExchange], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reduction, "released", bug)
    assert test(path_of()).contradicts


def test_noise_that_is_too_small_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def quiet(self: AuditedExchange, changes: Sequence[Flat], number: int) -> Values:
        return 0.97 * RELEASE(self, changes, number)

    RELEASE = AuditedExchange.release  # noqa: N806
    monkeypatch.setattr(AuditedExchange, "release", quiet)
    assert noise(path_of(), 100_000).contradicts


def test_noise_from_the_seed_of_the_directions_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The released code of DPZero draws its noise from the generator that made the direction."""
    monkeypatch.setattr(private, "randomness_of", lambda _privacy, key: SimulationRandomness(key))
    assert secrecy(path_of()).contradicts


def test_the_command_names_the_code_and_refuses_what_it_has_no_path_for() -> None:
    found = audit(spec_of("zeroth.code=log8"), 2000)
    assert found.sound
    assert "dpzo over log8, 100 clients, noise multiplier 1" in found.text()
    with pytest.raises(SpecError, match=r"an audit has no path.* or ask for --membership"):
        audit(RunSpec.check({**SPEC, "privacy": {"unit": "example", "epsilon": 8.0}}), 2000)


def test_mu_is_not_small_because_nothing_is_seen() -> None:
    told = mu(path_of(), canary_trials(path_of(), 20_000))
    assert told.measured is not None
    assert 0.8 < told.measured <= told.claimed
