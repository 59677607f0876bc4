"""`fedapt audit`: a table and an exit code."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedapt.privacy import mechanism
from fedapt.privacy.mechanism import Mechanism
from fedapt.privacy.randomness import Randomness
from fedapt.server.exchanges import ZerothCoordinator
from fedapt.server.store import Row

from .running import in_process

SPEC = """
[model]
base = "nowhere"
task = "causal-lm"
[recipe]
name = "fedsvd"
weighting = "uniform"
[participation]
sampling = "poisson"
rate = 0.1
minimum = 0
[privacy]
unit = "client"
epsilon = 8.0
noise_multiplier = 2.0
population = 100
[wire]
codec = "int8"
"""


pytestmark = pytest.mark.usefixtures("one_stream_of_secrets")


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.toml"
    path.write_text(SPEC)
    return path


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = in_process(capsys, "audit", "--help")
    assert code == 0
    assert "Example: fedapt audit" in out


def test_a_sound_mechanism(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    code, out, _ = in_process(capsys, "audit", spec, "--trials", 4000)
    assert code == 0
    assert "fedsvd over int8, 100 clients, noise multiplier 2" in out
    verdicts = {line.split("  ")[0]: line.split()[-1] for line in out.splitlines() if line.endswith(("holds", "made"))}
    assert set(verdicts) == {"sensitivity", "μ", "one run", "noise", "sampling", "secrecy"}
    assert set(verdicts.values()) == {"holds"}
    assert "Nothing contradicts the claim, which is no proof of it." in out
    assert "NOT private" not in out


def test_for_machines(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    overrides = ("--set", "privacy.noise=simulation", "--set", "privacy.noise_multiplier=0.5")
    code, out, _ = in_process(capsys, "audit", spec, "--trials", 1000, "--json", *overrides)
    assert code == 0
    document = json.loads(out)
    assert document["sound"]
    assert not document["private"]
    rows = {row["name"]: row for row in document["findings"]}
    assert rows["μ"]["claimed"] == 2
    assert rows["one run"]["measured"] is None
    assert rows["secrecy"]["measured"] == pytest.approx(1)


def test_a_bug_is_told_and_exits_with_1(
    capsys: pytest.CaptureFixture[str], spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechanism, "clip", lambda change, bound: (change, False))
    code, out, _ = in_process(capsys, "audit", spec, "--trials", 1000)
    assert code == 1
    assert "CONTRADICTED by sensitivity, μ" in out
    assert "do not rely on the ε" in out
    code, out, _ = in_process(capsys, "audit", spec, "--trials", 1000, "--json")
    assert code == 1
    assert not json.loads(out)["sound"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("minimum = 0", "minimum = 3"), "participation.minimum = 3 is illegal"),
        (
            ('unit = "client"\nepsilon = 8.0\nnoise_multiplier = 2.0\npopulation = 100', 'unit = "none"'),
            "nothing is claimed",
        ),
        (("population = 100", ""), "privacy.population: missing"),
    ],
)
def test_what_cannot_be_audited(
    capsys: pytest.CaptureFixture[str], spec: Path, change: tuple[str, str], message: str
) -> None:
    spec.write_text(SPEC.replace(*change))
    code, _, errors = in_process(capsys, "audit", spec)
    assert code == 2
    assert message in errors


def test_too_few_trials(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    code, _, errors = in_process(capsys, "audit", spec, "--trials", 999)
    assert code == 2
    assert "1000" in errors


def test_the_population_of_a_simulation(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    data = '[data]\nsource = "x"\n[data.partition]\nclients = 60\n'
    spec.write_text(SPEC.replace("population = 100", "") + data)
    code, out, _ = in_process(capsys, "audit", spec, "--trials", 1000)
    assert code == 0
    assert "60 clients" in out
    spec.write_text(spec.read_text() + 'kind = "natural"\ncolumn = "who"\n')
    assert in_process(capsys, "audit", spec)[0] == 2


EXAMPLE = """
[model]
base = "nowhere"
task = "causal-lm"
[recipe]
name = "ffa"
weighting = "uniform"
[privacy]
unit = "example"
epsilon = 8.0
noise_multiplier = 2.0
"""


def test_private_training_at_a_node(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    spec.write_text(EXAMPLE)
    code, out, _ = in_process(capsys, "audit", spec, "--trials", 2000)
    assert code == 0
    assert "Example-level privacy of ffa, noise multiplier 2" in out
    assert "Nothing contradicts the claim" in out


def test_a_node_with_large_batches(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    spec.write_text(EXAMPLE)
    code, out, _ = in_process(capsys, "audit", spec, "--trials", 1000, "--set", "local.batch_size=64")
    assert code == 0
    assert "draws from 1,000 nodes" in out


def test_an_adaptive_clip_has_tests_of_its_own(
    capsys: pytest.CaptureFixture[str], spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_the_survivors(self: Mechanism, within: Sequence[bool], source: Randomness) -> Mechanism:
        return replace(self, clip=self.clip.after(sum(within) / max(1, len(within))))

    monkeypatch.setattr(Mechanism, "_adapted", of_the_survivors)
    code, out, _ = in_process(capsys, "audit", spec, "--trials", 1000, "--set", "privacy.clipping=adaptive")
    assert code == 1
    assert "CONTRADICTED by clip's sensitivity, clip's noise, clip's secrecy" in out


@pytest.mark.slow
def test_zeroth_order_runs_are_attacked_as_such(
    capsys: pytest.CaptureFixture[str], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mechanism of a node's slopes has no tests, so the attack is all: of exchanges, each charged at the nodes."""
    exchanges = []
    honest = ZerothCoordinator.rounds

    def rounds(self: ZerothCoordinator) -> Iterator[Row]:
        exchanges.append(self.run)
        return honest(self)

    monkeypatch.setattr(ZerothCoordinator, "rounds", rounds)
    text = tiny.read_text().replace('"fedsvd"', '"dpzo"\nweighting = "uniform"').replace("steps = 1\n", "")
    text = text.replace('[wire]\ncodec = "int8"\n', "").replace("limit = 12\n", 'evaluation = "texts.jsonl"\n')
    text = text.replace('"builtin:stdlib"', '"texts.jsonl"') + 'kind = "iid"\n'
    lines = [json.dumps({"text": f"text {number}"}) for number in range(40)]
    (tiny.parent / "texts.jsonl").write_text("\n".join(lines))
    text += '[privacy]\nunit = "example"\nepsilon = 1000\nnoise_multiplier = 5.0\ndelta = 1e-3\n'
    tiny.write_text(text)
    code, out, errors = in_process(capsys, "audit", tiny, "--membership", 4, "--set", "zeroth.directions=2")
    assert code == 0, errors
    assert exchanges == ["tiny"] * 4
    assert "told from the adapters of 4 runs (LiRA)" in out
    assert "; claimed " in out
    assert "The mechanism was not tested" in out


def test_noise_that_is_correlated_over_rounds(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    text = SPEC.replace('"fedsvd"', '"ffa"').replace('sampling = "poisson"\nrate = 0.1\nminimum = 0', "")
    spec.write_text(text.replace("epsilon = 8.0", 'epsilon = 8.0\nmechanism = "banded"\nseparation = 2'))
    code, out, _ = in_process(capsys, "audit", spec, "--trials", 1000, "--set", "run.rounds=4")
    assert code == 0
    assert "turns: 100 clients in 4 rounds: 2 turns at most, 2 stated" in out


@pytest.mark.slow
def test_membership_in_adapters_that_promise_nothing(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    overrides = ("--set", "data.limit=4", "--set", "recipe.name=ffa")
    code, out, _ = in_process(capsys, "audit", tiny, "--membership", 4, *overrides)
    assert code == 0
    assert "told from the adapters of 4 runs (LiRA)" in out
    assert "No privacy is claimed" in out
