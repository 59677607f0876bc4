"""The tests of an audit: each runs a real path and sets what it sees against what its event claims.

A path is the server's (`audited.py`: a release, or a whole run where noise is correlated over rounds) or a node's
(`client/audited.py`: a step of private training). All that is asked of one is in `Audited`.

| test        | what it does                                                         | refutes the claim where                |
|-------------|----------------------------------------------------------------------|----------------------------------------|
| sensitivity | two neighbouring worlds with the same noise: the difference is exact | one client changes more than is charged|
| μ           | canaries beyond the clip, each there or not by a coin, and guessed   | the lower bound of μ is above 1 / z    |
| one run     | the same guesses, judged without taking trials to be independent     | the lower bound of ε is above the ε    |
| noise       | rounds without updates: all that is released is noise                | its variance is another one            |
| sampling    | cohorts drawn as a run draws them                                    | sizes or nodes do not follow the event |
| turns       | the same, where clients have turns instead of a draw                 | two turns of one are too close         |
| secrecy     | the round again, and with what the public seed gives                 | noise or cohorts go with either        |

Where the clip is adaptive, the bits that it follows are a release too (`audited.AuditedClip`), with tests of its own.

A canary is a worst case: it sends many times the clip in a direction of its own. A right mechanism fails a test with
probability `FALSE_ALARM` at most; the sensitivity test has no false alarms.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, inf, isfinite
from typing import Any, Protocol, Self

import numpy as np

from ..privacy import audit
from ..privacy.accounting import spent
from ..privacy.audit import Values
from ..privacy.events import Event, Everyone, FixedSize, GaussianEvent, MatrixEvent, Poisson
from ..protocols.keys import derive, generator
from ..protocols.layout import Flat
from ..protocols.spec import RunSpec

FALSE_ALARM = 1e-3
"""The probability with which a right mechanism fails one of the tests."""

OVER = 8.0
"""How many clips long a canary is: the server has to cut it."""

CANARIES_A_GUESS = 4
ONE_RUN_DELTA = 1e-8
"""δ·e^ε must be far below `FALSE_ALARM`, or the guesses cannot refute any ε; a claim holds at every δ."""

DENSE = 8
CROWD = 10
ROUNDING = 2.0**-24
"""What reading a release off an fp32 adapter may miss of its norm."""

DRAWN_NODES, DRAWS, DRAWN = 1000, 2000, 10_000_000
"""Nodes of a Poisson draw and draws of a sampling test; fewer where there would be more nodes than DRAWN in all."""

REPEATED = 20
"""Releases that the secrecy test looks at; and of so many nodes it guesses, at least, that they are drawn."""

CLIPS = 2000
"""Releases of an adaptive clip in the noise test, each of one number."""


class Audited(Protocol):
    """A mechanism as a run uses it, to be released again and again."""

    @property
    def spec(self) -> RunSpec: ...

    @property
    def population(self) -> int:
        """How many clients, or examples, there are."""

    @property
    def size(self) -> int:
        """Coordinates of a change."""

    @property
    def event(self) -> Event:
        """What a release charges."""

    @property
    def noise_std(self) -> float:
        """The noise that the event says to be in each number of a release."""

    def again(self, **privacy: Any) -> Self:
        """The same mechanism built anew, with these settings of privacy."""

    def arrived(self, change: Flat, *parts: int | str) -> Flat:
        """A change as the mechanism gets it; `parts` key what is drawn on the way."""

    def release(self, changes: Sequence[Flat], number: int) -> Values:
        """What anybody can have of these changes, float64, 1-D; `number` keys simulated noise."""

    def scores(self, directions: Values, released: Values) -> Values:
        """How much each of `directions` (float64 (K, size), of norm 1) is in a release: float64 (K,)."""

    def draw(self, nodes: Sequence[int], number: int) -> tuple[int, ...]:
        """The cohort of a round, or the batch of a step."""


@dataclass(frozen=True)
class Finding:
    """One test: what was `claimed` and `measured`, in words what these are, and whether they contradict each other.

    `measured` is None where the test could not be made; `detail` says why.
    """

    name: str
    quantity: str
    claimed: float
    measured: float | None
    contradicts: bool
    detail: str


@dataclass(frozen=True)
class Trials:
    """Scores of canaries (float64 (n,)), the higher the more they seem to be there, and who was (bool (n,))."""

    scores: Values
    present: np.ndarray[Any, np.dtype[np.bool_]]


def findings(path: Audited, trials: int) -> Iterator[Finding]:
    """All tests, one after the other; `trials` are those of μ, and the noise test reads five times as many numbers."""
    yield sensitivity(path)
    outcomes = canary_trials(path, trials)
    yield mu(path, outcomes)
    yield one_run(path, outcomes)
    yield noise(path, 5 * trials)
    yield sampling(path)
    yield secrecy(path)


def clip_findings(path: Audited) -> Iterator[Finding]:
    """The tests of an adaptive clip. It is charged with the changes that it clips, so it has no μ and ε of its own."""
    within, beyond = (np.full(path.size, factor * path.spec.privacy.clip, np.float32) for factor in (0.0, OVER))
    for found in (sensitivity(path), noise(path, CLIPS, [within, beyond]), secrecy(path)):
        yield replace(found, name=f"clip's {found.name}")


def sensitivity(path: Audited) -> Finding:
    """The largest distance between the sums of two neighbouring worlds, with the same (simulated) noise in both."""
    path = path.again(noise="simulation")
    names, distances, lengths = [], [], []
    for number, (name, one, other) in enumerate(_neighbours(path)):
        first, second = path.release(one, number), path.release(other, number)
        names.append(name)
        distances.append(float(np.linalg.norm(first - second)))
        lengths.append(float(np.linalg.norm(first) + np.linalg.norm(second)))
    worst = int(np.argmax(distances))  # NaN, if there is one
    claimed, largest = path.event.sensitivity, distances[worst]
    contradicts = not largest <= claimed + ROUNDING * max(lengths)
    return Finding("sensitivity", "L2 distance", claimed, largest, contradicts, f"most: {names[worst]}")


def canary_trials(path: Audited, trials: int) -> Trials:
    """At least `trials` canaries in as many releases as it takes, each in a direction that no other one touches.

    Under add-remove a canary is there or not, under replace-one it or its opposite. Those of one release share nothing
    but the denominator: every coordinate has noise of its own.
    """
    canaries = _canaries(path)
    directions = np.stack([c.astype(np.float64) / np.linalg.norm(c.astype(np.float64)) for c in canaries])
    replaced = path.event.relation == "replace-one"
    coins = generator(derive(path.spec.run.seed, "audit", "worlds"))
    scores, present = [], []
    for number in range(ceil(trials / len(canaries))):
        there = coins.random(len(canaries)) < 0.5
        changes = [c if up else -c for c, up in zip(canaries, there, strict=True) if up or replaced]
        scores.append(path.scores(directions, path.release(changes, number)))
        present.append(there)
    return Trials(np.concatenate(scores)[:trials], np.concatenate(present)[:trials])


def mu(path: Audited, trials: Trials) -> Finding:
    """The lower bound of μ against sensitivity / noise_std of one release.

    It takes the trials of one release to be independent, as they are under the claim; `one_run` does not.
    """
    claimed = 1 / path.event.noise_multiplier
    split = trials.scores[trials.present], trials.scores[~trials.present]
    bound, usual = (audit.mu_lower_bound(*split, level) for level in (FALSE_ALARM, 0.05))
    detail = f"{len(trials.scores):,} trials; with 95 % confidence {usual:.4f}"
    return Finding("μ", f"μ ≥, {1 - FALSE_ALARM:.1%} confidence", claimed, bound, bound > claimed, detail)


def one_run(path: Audited, trials: Trials) -> Finding:
    """The lower bound of ε from guesses of which canaries were there, against the ε of one release without sampling."""
    delta = min(path.spec.privacy.delta, ONE_RUN_DELTA)
    event = path.event
    alone = replace(event, sampling=Everyone()) if isinstance(event, GaussianEvent) else event
    epsilon = spent([alone], delta).epsilon
    quantity = f"ε ≥ at δ = {delta:g}, {1 - FALSE_ALARM:.1%} confidence"
    guesses = audit.guesses_needed(epsilon, delta, CANARIES_A_GUESS, FALSE_ALARM)
    if CANARIES_A_GUESS * guesses > len(trials.scores):
        needs = f"{CANARIES_A_GUESS * guesses:,} trials" if isfinite(guesses) else "more guesses than can be made"
        why = f"not made: with fewer guesses than 3·e^ε it would pass without any noise; this ε needs {needs}"
        return Finding("one run", quantity, epsilon, None, False, why)
    count, canaries = int(guesses), CANARIES_A_GUESS * int(guesses)
    right = audit.right_guesses(trials.scores[:canaries], trials.present[:canaries], count)
    bound = audit.one_run_bound(right, 2 * (count // 2), canaries, delta, FALSE_ALARM)
    detail = f"{right:,} of {count:,} guesses right, for {canaries:,} canaries"
    return Finding("one run", quantity, epsilon, bound, bound > epsilon, detail)


def noise(path: Audited, coordinates: int, nothing: Sequence[Flat] | None = None) -> Finding:
    """The standard deviation of releases to which nobody, or somebody with `nothing`, contributes.

    `nothing` are changes of which nothing is left in a release; by default, one of zeros.
    """
    claimed, squares, count, number = path.noise_std, 0.0, 0, 0
    if nothing is None:
        nothing = [np.zeros(path.size, np.float32)]
    while count < coordinates:
        released = path.release(nothing if number % 2 else [], number)
        squares, count, number = squares + float(released @ released), count + len(released), number + 1
    p_value = audit.variance_p_value(squares, count, claimed)
    detail = f"{count:,} released numbers, p = {p_value:.2g}"
    return Finding("noise", "standard deviation", claimed, (squares / count) ** 0.5, p_value < FALSE_ALARM, detail)


def sampling(path: Audited) -> Finding:
    """The mean part of the nodes that is drawn, judged by the sizes of the cohorts and by how often each one is in."""
    if isinstance(path.event, MatrixEvent):
        return turns(path, path.event)
    stated = path.event.sampling
    count = path.population if isinstance(stated, FixedSize) else min(path.population, DRAWN_NODES)
    nodes, draws = list(range(1, count + 1)), max(100, min(DRAWS, DRAWN // count))
    cohorts = [path.draw(nodes, number) for number in range(draws)]
    sizes = np.array([len(cohort) for cohort in cohorts])
    drawn = np.bincount(np.concatenate([np.array(cohort, np.int64) for cohort in cohorts]), minlength=count + 1)[1:]
    match stated:
        case Poisson(rate):
            p_values = [
                audit.sizes_p_value(sizes, count, rate),
                audit.inclusion_p_value(drawn, draws, rate, fixed=False),
            ]
        case FixedSize(size, population):
            rate = size / population
            p_values = [float((sizes == size).all()), audit.inclusion_p_value(drawn, draws, rate, fixed=True)]
        case Everyone():
            rate, p_values = 1.0, [float((drawn == draws).all())]
    p_value = min(1.0, len(p_values) * min(p_values))
    detail = f"{draws:,} draws from {count:,} nodes, sizes {sizes.min()} to {sizes.max()}, p = {p_value:.2g}"
    return Finding("sampling", "mean part drawn", rate, float(sizes.mean()) / count, p_value < FALSE_ALARM, detail)


def turns(path: Audited, event: MatrixEvent) -> Finding:
    """The fewest rounds from one turn of a client to its next, in the rounds of the event."""
    nodes = list(range(1, min(path.population, DRAWN_NODES) + 1))
    had: dict[int, list[int]] = {node: [] for node in nodes}
    for round_ in range(1, event.rounds + 1):
        for node in path.draw(nodes, round_):
            had[node].append(round_)
    apart = [later - earlier for own in had.values() for earlier, later in pairwise(own)]
    most, least = max(map(len, had.values())), float(min(apart, default=inf))
    contradicts = least < event.separation or most > event.participations
    detail = f"{len(nodes):,} clients in {event.rounds} rounds: {most} turns at most, {event.participations} stated"
    measured = least if apart else None
    return Finding("turns", "rounds between turns", float(event.separation), measured, contradicts, detail)


def secrecy(path: Audited) -> Finding:
    """The correlation of what is secret with what somebody who has the spec, and its seed, can compute of it.

    Secret is the noise, and who is drawn where the event counts on that. Reported is the one with the smallest p-value.
    """
    guesses = {"made again": path.again(), "from the seed": path.again(noise="simulation")}
    released = np.concatenate([path.release([], number) for number in range(REPEATED)])
    rate = _secret_rate(path.event)
    found = {}
    for name, guess in guesses.items():
        guessed = np.concatenate([guess.release([], number) for number in range(REPEATED)])
        found[f"noise {name}"] = audit.dependence_p_value(released, guessed)
        if rate is not None:
            found[f"cohorts {name}"] = _overlap(path, guess, rate)
    worst = min(found, key=lambda name: (found[name][1], -abs(found[name][0])))
    correlation, p_value = found[worst]
    known = len(found) * p_value < FALSE_ALARM
    detail = f"with the {worst}"
    if known:
        knows = "can subtract it" if worst.startswith("noise") else "knows who takes part, and nothing is amplified"
        detail += f": whoever has the spec {knows}" + ("" if path.event.secret else ", as the event says")
    return Finding(
        "secrecy", "correlation", float(not path.event.secret), correlation, known and path.event.secret, detail
    )


def _secret_rate(event: Event) -> float | None:
    """How likely one is drawn; None where that is no secret: all are, or they have turns."""
    match event:
        case GaussianEvent(sampling=Poisson(rate)) if 0 < rate < 1:
            return rate
        case GaussianEvent(sampling=FixedSize(size, population)) if 0 < size < population:
            return size / population
    return None


def _overlap(path: Audited, guess: Audited, rate: float) -> tuple[float, float]:
    """The correlation of the cohorts with those of a guess, and its p-value if they have no relation."""
    fixed = isinstance(path.event, GaussianEvent) and isinstance(path.event.sampling, FixedSize)
    nodes = range(1, 1 + (path.population if fixed else min(path.population, DRAWN_NODES)))
    draws = min(DRAWS, ceil(REPEATED * max(1.0, 1 / (rate * len(nodes)))))
    common = guessed = 0
    for number in range(draws):
        own = set(guess.draw(nodes, number))
        common, guessed = common + len(own.intersection(path.draw(nodes, number))), guessed + len(own)
    return audit.overlap_p_value(common, guessed, rate)


def _canaries(path: Audited) -> list[Flat]:
    """Updates of OVER clips in one coordinate each, as they arrive; those that would touch another's are left out."""
    touched, canaries = np.zeros(path.size, np.bool_), []
    for coordinate in range(path.size):
        if touched[coordinate]:
            continue
        change = np.zeros(path.size, np.float32)
        change[coordinate] = OVER * path.spec.privacy.clip
        arrived = path.arrived(change, "canary", coordinate)
        if not arrived.any() or touched[arrived != 0].any():
            continue
        touched |= arrived != 0
        canaries.append(arrived)
    return canaries


def _neighbours(path: Audited) -> Iterator[tuple[str, list[Flat], list[Flat]]]:
    """Pairs of worlds (decoded updates) that differ in one client, with a name: the worst that are known.

    A canary that outweighs everybody else turns the whole sum around; one in all coordinates is what a codec's rounding
    makes longer; beside a crowd it changes a number of answers that must not matter. One with nothing is within every
    clip: it comes alone, or in the place of a canary, and makes most of an adaptive clip's bits.
    """
    random = generator(derive(path.spec.run.seed, "audit", "directions"))
    length = OVER * path.spec.privacy.clip
    units = {"one coordinate": np.eye(1, path.size)[0]}
    for number in range(DENSE):
        dense = random.standard_normal(path.size)
        units[f"all coordinates ({number + 1})"] = dense / np.linalg.norm(dense)
    for shape, unit in units.items():
        canary, opponent, nothing = (
            path.arrived((factor * length * unit).astype(np.float32), shape, name)
            for name, factor in (("canary", 2.0), ("opponent", -1.0), ("nothing", 0.0))
        )
        others: dict[str, Sequence[Flat]] = {
            "alone": [],
            "against another": [opponent],
            f"among {CROWD} others": [nothing] * CROWD,
        }
        for company, rest in others.items():
            if path.event.relation == "replace-one":
                yield f"{shape}, {company}", [*rest, canary], [*rest, -canary]
                yield f"{shape} or nothing, {company}", [*rest, canary], [*rest, nothing]
            else:
                yield f"{shape}, {company}", [*rest, canary], [*rest]
                yield f"nothing, {company}", [*rest, nothing], [*rest]
