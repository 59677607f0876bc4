"""The ledger: what has been spent, and whether a cap leaves room for one more release.

Who asks gets a `Ledger`, the account as it stands; rows are written by the server's store, together with the release,
and by a site's own `SiteLedger`. How they are kept is `privacy/chain.py`.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from math import isclose
from pathlib import Path

from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from ..protocols.errors import OutputError, PrivacyError
from .accounting import MOST_MULTIPLIER, MOST_RELEASES, Account, Crosscheck, headline, spent
from .chain import Chain, Entry, append, charged, locked, opened
from .events import Event, MatrixEvent, from_json, to_json

NO_ROOM = "one more round would bring epsilon above"
"""How a node's refusal begins whose cap leaves no room: by these words a server knows that asking again is of no use."""

COARSE = 10.0
"""The grid on which a cap is first compared: three times faster, and its ε is never smaller."""

Releases = Counter[Event]
"""Events of one release each ⇒ how often."""


class Ledger:
    """One account: all that one run, one node of it, or one site over all its runs has been charged with.

    `charged` has canonical events ⇒ the number of their rows; PayloadError where a text is no event. The account does
    not grow with the ledger: ask for a new one after each release.
    """

    def __init__(self, charged: Mapping[str, int]) -> None:
        self._releases: Releases = Counter()
        for text, rows in charged.items():
            release, count = _parsed(text)
            self._releases[release] += rows * count

    def spent(self, delta: float, crosschecks: Collection[Crosscheck] = ()) -> Account:
        """The ε of all rows at `delta` (`accounting.spent`): about a second for a new content, and some for PRV.

        Raises PrivacyError as `accounting.spent`.
        """
        return _spent(frozenset(self._releases.items()), delta, frozenset(crosschecks))

    def allows(self, event: Event, epsilon: float, delta: float) -> bool:
        """Whether one more `event` keeps the account within (epsilon, delta).

        Raises PrivacyError for ε ≤ 0, and as `accounting.spent`, for an event that does not compose with the rows too.

        Formal guarantees: where it is True, all that was charged and `event` are together (epsilon, delta)-DP.
        """
        if not epsilon > 0:
            raise PrivacyError(f"epsilon = {epsilon}: a cap must be above 0; 1 to 10 is common")
        return _fit(self._with(event), epsilon, delta)

    def require(self, event: Event, epsilon: float, delta: float) -> None:
        """Raises PrivacyError where `allows` says no: to be called before a round starts."""
        if self.allows(event, epsilon, delta):
            return
        before, after = (_epsilon(frozenset(r.items()), delta) for r in (self._releases, self._with(event)))
        raise PrivacyError(
            f"one more release would bring epsilon from {before:.4f} to {after:.4f} at delta = {delta:g}, and the cap "
            f"is {epsilon:g}. Stop here, and what was released keeps its promise; or allow "
            "a larger epsilon, and from the start more noise or fewer rounds"
        )

    @property
    def empty(self) -> bool:
        """Whether nothing was charged."""
        return not self._releases

    def is_of(self, event: MatrixEvent) -> bool:
        """Whether this one event is all that was charged: its noise to nine digits, for it may be solved for anew."""
        held = list(self._releases.items())
        if len(held) != 1 or held[0][1] != 1:
            return False
        own = replace(event, noise_std=event.noise_multiplier, sensitivity=1.0)
        (other, _) = held[0]
        return isclose(other.noise_multiplier, own.noise_multiplier, rel_tol=1e-9) and own == replace(
            other, noise_std=own.noise_std, sensitivity=1.0
        )

    def after(self, events: Iterable[Event]) -> "Ledger":
        """The account once these are charged too."""
        other = Ledger({})
        other._releases = self._releases.copy()
        for event in events:
            other._releases = other._with(event)
        return other

    def _with(self, event: Event) -> Releases:
        release, count = _parsed(to_json(event))
        return self._releases + Counter({release: count})


@lru_cache(maxsize=2**10)
def _spent(releases: frozenset[tuple[Event, int]], delta: float, crosschecks: frozenset[Crosscheck]) -> Account:
    """Nodes of one size that took part alike have equal accounts."""
    return spent(_events(Counter(dict(releases))), delta, crosschecks)


@lru_cache(maxsize=2**16)
def _parsed(text: str) -> tuple[Event, int]:
    """The event as an accountant sees it, and how often: the noise of one release at sensitivity 1, to ten digits.

    Under an adaptive clip noise and sensitivity change from round to round, and what is charged does not.
    """
    event = from_json(text)
    if isinstance(event, MatrixEvent):
        return event, 1
    multiplier = float(f"{min(event.noise_multiplier, MOST_MULTIPLIER):.9e}")
    return replace(event, noise_std=multiplier, sensitivity=1.0, count=1), event.count


def _events(releases: Releases) -> list[Event]:
    """The same as few events: equal releases are one event with a count."""
    events: list[Event] = []
    for event, count in releases.items():
        events += [event] * count if isinstance(event, MatrixEvent) else [replace(event, count=count)]
    return events


def _fit(releases: Releases, epsilon: float, delta: float) -> bool:
    """Whether `releases` stay within the cap: `_fit_reference`, with few questions to the accountant.

    More releases can only cost more. So counts are rounded up to few binary digits first, and where these fit, nothing
    else is asked: the rounds of a run ask the same few questions, whose answers are remembered.
    """
    largest = max(releases.values(), default=0)
    for places in reversed(range(largest.bit_length())):
        up = {event: -(-count >> places) << places for event, count in releases.items()}
        if sum(up.values()) <= MOST_RELEASES and _epsilon(frozenset(up.items()), delta, COARSE) <= epsilon:
            return True
    return _fit_reference(releases, epsilon, delta)


def _fit_reference(releases: Releases, epsilon: float, delta: float) -> bool:
    return _epsilon(frozenset(releases.items()), delta) <= epsilon


@lru_cache(maxsize=2**10)
def _epsilon(releases: frozenset[tuple[Event, int]], delta: float, coarseness: float = 1.0) -> float:
    return headline(_events(Counter(dict(releases))), delta, coarseness)[0]


class SiteLedger:
    """One site's own file: what its data has been charged with, over all runs of all servers.

    Raises OutputError where the file cannot be written or is no database, PrivacyError where its chain is broken.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.engine = opened(path)
        except DatabaseError as error:
            raise OutputError(f"{path}: cannot be used as a ledger ({error.orig}); name another file") from None

    def close(self) -> None:
        self.engine.dispose()

    def append(self, run: str, round_: int, event: Event) -> None:
        """Add a row. It is on disk when this returns: only then may what it is charged for leave the site."""
        with Session(self.engine) as session, session.begin():
            append(session, run, round_, [event])

    def charge(self, run: str, round_: int, event: Event, delta: float, *, per_run: float, in_all: float) -> None:
        """`append` where both caps on ε leave room, and PrivacyError, with nothing written, where one does not.

        Check and row are one transaction: two runs that train at once cannot both take what is left.
        """
        with Session(self.engine) as session, session.begin():
            locked(session)
            Ledger(charged(session, Entry.run == run)).require(event, per_run, delta)
            Ledger(charged(session)).require(event, in_all, delta)
            append(session, run, round_, [event])

    def ledger(self, run: str | None = None) -> Ledger:
        """The account of one run, or of all."""
        with Session(self.engine) as session:
            return Ledger(charged(session, *(() if run is None else (Entry.run == run,))))

    def chain(self) -> Chain:
        """All rows, to be shown and verified."""
        with Session(self.engine) as session:
            return Chain.of(session)
