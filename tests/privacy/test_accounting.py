import ast
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedapt.privacy.accounting import Account, spent
from fedapt.privacy.events import Event, Everyone, FixedSize, GaussianEvent, MatrixEvent, Poisson, Sampling
from fedapt.protocols.errors import PrivacyError

from ..test_imports import loaded_by

# σ, sampled, population, T, δ: ε by PLD of Poisson draws; ε by RDP of fixed-size draws
KNOWN = [
    (1.0, 1, 1, 1, 1e-5, 4.3772, None),
    (2.0, 1, 1, 10, 1e-5, 7.5113, None),
    (4.0, 1, 1, 100, 1e-6, 14.4508, None),
    (1.0, 1, 100, 1000, 1e-5, 1.8282, 3.5761),
    (1.1, 256, 60000, 14000, 1e-5, 2.3759, 5.2301),
    (0.8, 1, 100, 1000, 1e-5, 3.1410, 5.3566),
    (0.5, 2, 100, 200, 1e-5, 12.2040, 18.6769),
    (1.0, 1, 10, 100, 1e-5, 7.0466, 14.0538),
    (1.0, 1, 10, 1000, 1e-6, 27.5505, 65.3685),
    (2.0, 1, 2, 50, 1e-5, 9.4736, 22.6266),
    (0.7, 1, 1000, 5000, 1e-6, 1.3806, 2.5259),
    (5.0, 1, 5, 500, 1e-6, 4.4147, 10.5910),
    (1.5, 5, 100, 300, 1e-7, 3.6682, 8.1654),
    (0.3, 5, 100, 20, 1e-5, 33.5691, 126.4422),
]
FIXED_SIZE = [row for row in KNOWN if row[-1] is not None and row[0] != 2.0]
"""Without the row at rate ½: there the bound of a draw is worse than that of no draw."""


def event(multiplier: float, sampling: Sampling, count: int = 1) -> GaussianEvent:
    """A release of that multiplier, under the relation in which its sampling is accounted."""
    return GaussianEvent(
        unit="client",
        relation="replace-one" if isinstance(sampling, FixedSize) else "add-remove",
        noise_std=multiplier,
        sensitivity=1.0,
        secret=True,
        sampling=sampling,
        count=count,
    )


def epsilon(multiplier: float, sampling: Sampling, count: int, delta: float = 1e-5) -> float:
    return spent([event(multiplier, sampling, count)], delta).epsilon


def matrix(multiplier: float, secret: bool = True) -> MatrixEvent:
    return MatrixEvent(
        unit="client",
        relation="add-remove",
        noise_std=multiplier,
        sensitivity=1.0,
        secret=secret,
        rounds=50,
        separation=10,
        participations=5,
    )


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The exact ε of the Gaussian mechanism: δ = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) (Balle & Wang 2018, Theorem 8)."""

    def excess(epsilon: float) -> float:
        tail = math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
        return float(norm.cdf(mu / 2 - epsilon / mu) - tail - delta)

    return float(brentq(excess, 0, mu**2 + 20 * mu)) if excess(0) > 0 else 0.0


# Known answers


@pytest.mark.parametrize("row", KNOWN)
def test_the_known_answers(row: tuple[float, int, int, int, float, float, float | None]) -> None:
    sigma, size, population, count, delta, pld, _ = row
    account = spent([event(sigma, Poisson(size / population), count)], delta, crosschecks=["PRV", "RDP"])
    assert account.method == "PLD"
    assert account.private
    assert pld - 1e-4 <= account.epsilon <= pld + 0.015
    assert 0 <= account.crosschecks["PRV"] - account.epsilon <= 0.015
    assert account.crosschecks["RDP"] > account.epsilon
    assert account.consistent


@pytest.mark.parametrize(("sigma", "count", "delta"), [(r[0], r[3], r[4]) for r in KNOWN if r[1] == r[2]])
@pytest.mark.parametrize("sampling", [Poisson(1.0), Everyone(), FixedSize(7, 7)])
def test_without_a_draw_it_is_the_gaussian_mechanism(
    sigma: float, count: int, delta: float, sampling: Sampling
) -> None:
    exact = gaussian_epsilon(math.sqrt(count) / sigma, delta)
    account = spent([event(sigma, sampling, count)], delta)
    assert abs(account.epsilon - exact) <= 1e-3
    assert account.method == "PLD"


@pytest.mark.parametrize(("sigma", "count", "delta"), [(r[0], r[3], r[4]) for r in KNOWN if r[1] == r[2]])
def test_the_grid_gives_the_gaussian_mechanism(sigma: float, count: int, delta: float) -> None:
    """One nearly free draw brings the rest onto the PLD's grid; they cost there what they cost without it."""
    account = spent([event(sigma, Everyone(), count), event(100.0, Poisson(1e-9))], delta)
    assert abs(account.epsilon - gaussian_epsilon(math.sqrt(count) / sigma, delta)) <= 1e-3


def fixed_size_misses(accountant: Callable[[list[Event], float], Account]) -> list[int]:
    """The known fixed-size answers that an accountant does not give."""
    found = []
    for i, (sigma, size, population, count, delta, _, rdp) in enumerate(FIXED_SIZE):
        account = accountant([event(sigma, FixedSize(size, population), count)], delta)
        if not math.isclose(account.epsilon, rdp or math.nan, rel_tol=1e-4):
            found.append(i)
    return found


@pytest.mark.slow
def test_a_fixed_size_draw_is_charged_by_rdp() -> None:
    assert fixed_size_misses(spent) == []
    assert spent([event(1.0, FixedSize(1, 100), 10)], 1e-5).method == "RDP"


@pytest.mark.slow
def test_an_accountant_that_takes_fixed_size_for_poisson_is_told_apart() -> None:
    def planted(events: list[Event], delta: float) -> Account:
        (drawn,) = events
        assert isinstance(drawn, GaussianEvent)
        assert isinstance(drawn.sampling, FixedSize)
        rate = drawn.sampling.size / drawn.sampling.population
        return spent([replace(drawn, sampling=Poisson(rate), relation="add-remove")], delta)

    assert fixed_size_misses(planted) == list(range(len(FIXED_SIZE)))


# Replace-one


def clipped_to_one(sensitivity: float, sampling: Sampling, count: int) -> GaussianEvent:
    return replace(event(1.0, sampling, count), relation="replace-one", sensitivity=sensitivity)


@pytest.mark.parametrize("sampling", [Everyone(), FixedSize(5, 5)])
def test_the_replace_one_trap(sampling: Sampling) -> None:
    """Noise of 1·C on a sum clipped to C, T = 10: the sensitivity is 2C, and nothing halves or doubles behind it."""
    stated = spent([clipped_to_one(2.0, sampling, 10)], 1e-5, crosschecks=["RDP"])
    assert stated.epsilon == pytest.approx(46.211, abs=1e-3)
    assert stated.crosschecks["RDP"] == pytest.approx(48.802, abs=1e-3)
    assert spent([clipped_to_one(1.0, sampling, 10)], 1e-5).epsilon == pytest.approx(17.857, abs=1e-3)


def test_the_fixed_size_bound_takes_the_multiplier_as_it_stands() -> None:
    """At a rate near 1 it is the RDP of the Gaussian or worse: at the stated multiplier, and not at its half."""
    z, count = 2.0, 10
    whole = spent([event(z, FixedSize(1, 1), count)], 1e-5, crosschecks=["RDP"]).crosschecks["RDP"]
    assert whole == pytest.approx(8.0794, abs=1e-3)
    halved = spent([event(z / 2, FixedSize(1, 1), count)], 1e-5, crosschecks=["RDP"]).crosschecks["RDP"]
    for size in (1, 10, 50, 100):
        drawn = spent([event(z, FixedSize(size, 1000), count)], 1e-5).epsilon
        assert drawn < whole < halved


def test_a_large_draw_is_not_charged_more_than_no_draw() -> None:
    account = spent([event(2.0, FixedSize(1, 2), 50)], 1e-5, crosschecks=["RDP"])
    assert account.method == "PLD without amplification"
    assert account.epsilon == pytest.approx(gaussian_epsilon(math.sqrt(50) / 2, 1e-5), abs=1e-3)
    assert account.crosschecks["RDP"] == pytest.approx(22.6266, abs=1e-3)


# Composition


def test_no_events_cost_nothing() -> None:
    for events in ([], [event(1.0, Poisson(0.1), 0)], [replace(event(0.0, Everyone(), 0), secret=False)]):
        account = spent(events, 1e-5, crosschecks=["PRV", "RDP"])
        assert account.epsilon == 0
        assert account.private
        assert account.consistent


@pytest.mark.slow
def test_composition_knows_neither_order_nor_grouping() -> None:
    parts: list[Event] = [
        event(1.0, Poisson(0.1), 3),
        event(2.0, Poisson(0.1), 5),
        event(3.0, Everyone(), 2),
        matrix(5.0),
    ]
    split: list[Event] = [*parts[2:], *(event(1.0, Poisson(0.1)) for _ in range(3))]
    split += [event(2.0, Poisson(0.1), 4), event(2.0, Poisson(0.1))]
    whole = spent(parts, 1e-5).epsilon
    for seed in range(2):
        shuffled = Random(seed).sample(split, len(split))
        assert spent(shuffled, 1e-5).epsilon == pytest.approx(whole, rel=1e-6)
    assert whole > spent(parts[1:], 1e-5).epsilon


def test_different_multipliers_compose_as_gaussians_do() -> None:
    """Without draws μ² = Σ z⁻² is exact, and two lists that state the same μ cost the same."""
    events: list[Event] = [event(1.0, Everyone(), 2), event(2.0, Poisson(1.0), 3), matrix(4.0)]
    account = spent(events, 1e-6)
    assert account.epsilon == pytest.approx(gaussian_epsilon(math.sqrt(2 + 3 / 4 + 1 / 16), 1e-6), abs=1e-3)
    assert account.method == "matrix bound"


def test_an_adaptive_clip_costs_one_self_composition() -> None:
    """z·C / C differs in its last bits with C; a thousand rounds are still the one event that they are."""
    clips = [1.1**i for i in range(-150, 150)]
    events = [replace(event(0.8, Poisson(0.01)), noise_std=0.8 * c, sensitivity=c) for c in clips]
    assert len({e.noise_multiplier for e in events}) > 1
    assert spent(events, 1e-5).epsilon == pytest.approx(epsilon(0.8, Poisson(0.01), len(clips)), rel=1e-6)


def test_fixed_size_composes_with_everyone() -> None:
    drawn, everyone = event(1.0, FixedSize(1, 100), 100), replace(event(8.0, Everyone(), 3), relation="replace-one")
    account = spent([drawn, everyone], 1e-5)
    assert account.method == "RDP"
    assert account.epsilon > spent([drawn], 1e-5).epsilon


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(event(1.0, Everyone()), unit="example"), "unit client and example"),
        (replace(event(1.0, Everyone()), relation="replace-one"), "relation add-remove and replace-one"),
    ],
)
def test_what_does_not_compose_is_refused(other: Event, message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        spent([event(1.0, Poisson(0.1)), other], 1e-5)


@pytest.mark.parametrize("delta", [0.0, -1e-5, 1.0, 1e-13, math.nan])
def test_an_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta = "):
        spent([event(1.0, Everyone())], delta)


# Monotonicity


slack = 1e-3
multipliers = st.floats(0.7, 6)
rates = st.floats(1e-4, 0.5)
rounds = st.integers(1, 200)
more = st.floats(1.05, 3)


@settings(max_examples=5)
@given(multipliers, rates, rounds, more)
def test_more_noise_costs_less(z: float, rate: float, count: int, factor: float) -> None:
    assert epsilon(factor * z, Poisson(rate), count) <= epsilon(z, Poisson(rate), count) + slack


@pytest.mark.slow
@settings(max_examples=5)
@given(multipliers, rates, rounds, more)
def test_a_larger_rate_costs_more(z: float, rate: float, count: int, factor: float) -> None:
    assert epsilon(z, Poisson(min(1.0, factor * rate)), count) >= epsilon(z, Poisson(rate), count) - slack


@pytest.mark.slow
@settings(max_examples=5)
@given(multipliers, rates, rounds, st.integers(1, 100))
def test_more_rounds_cost_more(z: float, rate: float, count: int, further: int) -> None:
    assert epsilon(z, Poisson(rate), count + further) >= epsilon(z, Poisson(rate), count) - slack


@pytest.mark.slow
@settings(max_examples=5)
@given(multipliers, st.integers(1, 50), rounds, st.integers(0, 50))
def test_a_larger_fixed_size_costs_more(z: float, size: int, count: int, further: int) -> None:
    larger = epsilon(z, FixedSize(min(50, size + further), 50), count)
    assert larger >= epsilon(z, FixedSize(size, 50), count) - slack


@pytest.mark.slow
@settings(max_examples=5)
@given(multipliers, st.floats(0.001, 0.3), rounds)
def test_the_bounds_stand_in_their_order(z: float, rate: float, count: int) -> None:
    account = spent([event(z, Poisson(rate), count)], 1e-5, crosschecks=["PRV", "RDP"])
    assert account.consistent, account
    assert account.epsilon <= gaussian_epsilon(math.sqrt(count) / z, 1e-5) + slack


def test_a_disagreement_would_be_seen() -> None:
    account = spent([event(1.0, Poisson(0.01), 1000)], 1e-5, crosschecks=["PRV", "RDP"])
    for off in (account.epsilon * 0.9, account.epsilon * 1.05):
        assert not replace(account, epsilon=off).consistent
    assert not replace(account, crosschecks={"RDP": account.epsilon - 0.1}).consistent


# Extremes


@pytest.mark.parametrize("multiplier", [1e-300, 1e-12, 1e-4])
@pytest.mark.parametrize("sampling", [Poisson(1e-6), Everyone(), FixedSize(1, 10)])
def test_next_to_no_noise_is_none(multiplier: float, sampling: Sampling) -> None:
    assert epsilon(multiplier, sampling, 1) == math.inf


def test_no_noise_is_no_privacy() -> None:
    account = spent([event(1.0, Everyone()), event(0.0, Poisson(1e-6))], 1e-5, crosschecks=["PRV", "RDP"])
    assert account.epsilon == math.inf
    assert not account.private


@pytest.mark.parametrize(("multiplier", "count"), [(0.1, 1), (0.02, 1), (0.05, 10), (1.0, 5000)])
def test_a_large_epsilon_is_still_close_to_the_closed_form(multiplier: float, count: int) -> None:
    exact = gaussian_epsilon(math.sqrt(count) / multiplier, 1e-5)
    assert exact * (1 - 1e-9) <= epsilon(multiplier, Everyone(), count) <= exact * 1.01


@pytest.mark.parametrize(
    ("multiplier", "sampling", "count"),
    [
        (5.0, Poisson(1e-9), 1000),
        (1e6, Poisson(0.5), 10),
        (1e12, Everyone(), 1),
        (1e12, FixedSize(1, 10), 10),
        (0.01, Poisson(1e-7), 1),
        (50.0, Poisson(1e-5), 10**6),
    ],
)
def test_next_to_no_loss_is_small_and_never_negative(multiplier: float, sampling: Sampling, count: int) -> None:
    assert 0 <= epsilon(multiplier, sampling, count) < 0.1


def test_many_tiny_losses_are_not_rounded_away_from_the_truth() -> None:
    account = spent([event(20.0, Poisson(1e-3), 10**5)], 1e-5, crosschecks=["PRV", "RDP"])
    assert account.consistent, account


def test_a_billion_releases_are_refused() -> None:
    with pytest.raises(PrivacyError, match="1000000000 releases in one account"):
        spent([event(50.0, Poisson(1e-5), 10**9)], 1e-5)


def test_the_least_delta_is_resolved() -> None:
    assert epsilon(2.0, Everyone(), 10, delta=1e-12) == pytest.approx(gaussian_epsilon(math.sqrt(10) / 2, 1e-12), 1e-4)


# What is no promise


def test_seeded_noise_is_computed_and_not_private() -> None:
    simulated = replace(event(1.0, Poisson(0.01), 100), secret=False)
    honest, mixed = spent([event(1.0, Poisson(0.01), 100)], 1e-5), spent([simulated, event(9.0, Poisson(0.01))], 1e-5)
    assert spent([simulated], 1e-5) == replace(honest, private=False)
    assert not mixed.private
    assert not spent([matrix(1.0, secret=False)], 1e-5).private


# What is loaded, and what never is


@pytest.mark.slow
def test_no_accounting_but_the_prv_loads_torch() -> None:
    setup = (
        "from fedapt.privacy.accounting import spent\nfrom fedapt.privacy.events import *\n"
        "event = GaussianEvent(unit='client', relation='add-remove', noise_std=1.0, sensitivity=1.0, secret=True,"
        " sampling=Poisson(0.1))\n"
    )
    assert not loaded_by(setup) & {"torch", "opacus", "dp_accounting", "scipy", "flwr"}
    account = "spent([event], 1e-5, ('RDP',))"
    assert not loaded_by(setup + account) & {"torch", "opacus", "flwr"}
    assert {"torch", "opacus"} <= loaded_by(setup + account.replace("RDP", "PRV"))


def words_of(source: str) -> Iterator[str]:
    """Every name, attribute, imported name and short text of a source; prose is left out."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.alias(name=word) | ast.ImportFrom(module=str(word)):
                yield word
            case ast.Constant(value=str(word)) if " " not in word:
                yield word


def reaches_gdp(source: str) -> bool:
    return any("gdp" in word.lower() or "gaussianaccountant" in word.lower() for word in words_of(source))


def test_opacus_gdp_is_reached_from_nowhere() -> None:
    files = sorted((Path(__file__).parents[2] / "privacy").rglob("*.py"))
    assert files
    assert [file.name for file in files if reaches_gdp(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    from opacus.accountants import GaussianAccountant as A",
        "import opacus\nopacus.accountants.gdp",
        "from opacus.accountants.analysis.gdp import compute_eps_poisson",
        "create_accountant('gdp')",
    ],
)
def test_a_planted_gdp_is_found(source: str) -> None:
    assert reaches_gdp(source)
