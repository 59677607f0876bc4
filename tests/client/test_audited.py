"""The audit of a node's private training: the right one passes, and each planted bug is caught by the test named.

The tests of an audit are the server's layer; here they are run over the client's path, as `fedapt audit` does.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from fedapt.auditing import step_findings
from fedapt.client.audited import AuditedStep
from fedapt.client.private import PrivateTrainer
from fedapt.client.trainer import Member
from fedapt.privacy.clipping import clip
from fedapt.privacy.example_level import ExampleLevel, Sums
from fedapt.privacy.noise import Floats, Values, total
from fedapt.privacy.randomness import Integers, Randomness, SimulationRandomness
from fedapt.privacy.sampling import fixed_size
from fedapt.protocols.spec import RunSpec
from fedapt.server.auditing import Finding, noise, sampling, secrecy, sensitivity

SPEC = {
    "model": {"base": "nowhere", "task": "causal-lm"},
    "recipe": {"name": "fedit", "weighting": "uniform"},
    "local": {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "batch_size": 8},
    "privacy": {"unit": "example", "epsilon": 8.0, "noise_multiplier": 1.0, "clip": 0.5},
}


pytestmark = pytest.mark.usefixtures("one_stream_of_secrets")


def spec_of(*overrides: str) -> RunSpec:
    return RunSpec.check(SPEC).set(*overrides)


def crowded() -> AuditedStep:
    return AuditedStep(spec_of(), 12, 6)


def sparse() -> AuditedStep:
    return AuditedStep(spec_of(), 2, 1)


def refuted(found: Iterable[Finding]) -> set[str]:
    return {finding.name for finding in found if finding.contradicts}


@pytest.mark.parametrize("overrides", [(), ("recipe.name=fedsvd", "privacy.noise_multiplier=0.3", "privacy.clip=1e-4")])
def test_the_right_training_passes(overrides: tuple[str, ...]) -> None:
    found = list(step_findings(spec_of(*overrides), 4000))
    assert not refuted(found), found
    assert [f.name for f in found] == ["sensitivity", "μ", "one run", "noise", "sampling", "secrecy"]
    distance, told, *_ = found
    assert distance.measured == pytest.approx(distance.claimed, rel=1e-5), "the worst neighbours are as bad as charged"
    assert told.measured is not None
    assert told.measured > 0.75 * told.claimed, "an audit that saw nothing would pass anything"


def test_an_example_of_the_audit_is_its_gradient() -> None:
    """Without noise and clip the change is the sum of what was given: nothing else is between."""
    path, random = (
        AuditedStep(spec_of("privacy.clip=1e3", "privacy.noise_multiplier=1e-6"), 3, 3),
        np.random.default_rng(0),
    )
    given = random.standard_normal((2, path.size)).astype(np.float32)
    assert path.release(list(given), 1) == pytest.approx(given.sum(0), abs=0.02)


# The planted bugs.


def without_clip_of_one_tensor(self: ExampleLevel, gradients: Floats) -> Sums:
    assert self.grid is not None
    head = slice(0, 64)
    clipped = [clip(np.where(np.arange(len(row)) < 64, 0, row).astype(row.dtype), self.clip)[0] for row in gradients]
    for row, gradient in zip(clipped, gradients, strict=True):
        row[head] = gradient[head]
    return total(map(self.grid.rounded, clipped), self.dimensions)


def test_a_tensor_that_is_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExampleLevel, "bounded", without_clip_of_one_tensor)
    assert sensitivity(crowded()).contradicts


def test_a_tensor_that_is_clipped_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def bounded(self: ExampleLevel, gradients: Floats) -> Sums:
        assert self.grid is not None
        parts = [np.concatenate([clip(p, self.clip)[0] for p in np.split(row, [64])]) for row in gradients]
        return total(map(self.grid.rounded, parts), self.dimensions)

    monkeypatch.setattr(ExampleLevel, "bounded", bounded)
    found = sensitivity(crowded())
    assert found.contradicts
    assert "all coordinates" in found.detail


def test_no_noise_on_an_empty_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ExampleLevel.release

    def release(self: ExampleLevel, sums: Iterable[Sums], source: Randomness) -> Values:
        parts = list(sums)
        return honest(self, parts, source) if parts else np.zeros(self.dimensions)

    monkeypatch.setattr(ExampleLevel, "release", release)
    assert noise(sparse(), 20_000).contradicts


def test_denominator_by_the_size_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, drawn = ExampleLevel.release, [0]
    draw = ExampleLevel.draw

    def drawing(self: ExampleLevel, source: Randomness) -> Integers:
        batch = draw(self, source)
        drawn[0] = len(batch)
        return batch

    def release(self: ExampleLevel, sums: Iterable[Sums], source: Randomness) -> Values:
        return honest(self, sums, source) * self.expected / max(1, drawn[0])

    monkeypatch.setattr(ExampleLevel, "draw", drawing)
    monkeypatch.setattr(ExampleLevel, "release", release)
    assert "sensitivity" in refuted([sensitivity(crowded())])


def test_a_tenth_less_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(self: ExampleLevel, sums: Iterable[Sums], source: Randomness) -> Values:
        assert self.grid is not None
        counts = self.grid.noised(total(sums, self.dimensions), 0.9 * self.noise_std, source)
        return self.grid.values(counts) / self.expected

    monkeypatch.setattr(ExampleLevel, "release", release)
    assert noise(sparse(), 20_000).contradicts


def test_batches_of_a_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    path = AuditedStep(spec_of(), 100, 10)
    assert not sampling(path).contradicts
    monkeypatch.setattr(
        ExampleLevel, "draw", lambda self, source: np.array(fixed_size(range(self.examples), self.batch_size, source))
    )
    assert sampling(path).contradicts


def test_noise_from_the_public_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not secrecy(crowded()).contradicts
    honest = PrivateTrainer._alone

    def seeded(self: PrivateTrainer, examples: object, member: Member) -> object:
        known = replace(self, source=lambda own: SimulationRandomness(own.dropout_key))
        return honest(known, examples, member)  # type: ignore[arg-type]

    monkeypatch.setattr(PrivateTrainer, "_alone", seeded)
    assert secrecy(crowded()).contradicts
