"""Client-level privacy of one run at the server: who takes part, what is released, and what it costs.

`ClientLevel` noises each round for itself and charges it; `BandedLevel` has noise that is correlated over the rounds,
and charges the whole run with its first release.

The noise of rounds before is a buffer of the snapshot, in the transaction of the release that it is part of: after a
crash it goes on, and is never drawn again. It is secret: with the releases it tells each round's sum. So it is in the
server's store alone, which holds the contributions of an open round as well, and is forgotten with the last round.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..privacy.accounting import too_large
from ..privacy.banded import banded_of
from ..privacy.events import Event, GaussianEvent, MatrixEvent
from ..privacy.ledger import Ledger
from ..privacy.mechanism import Mechanism, mechanism_of
from ..privacy.randomness import Integers, Randomness, randomness_of
from ..protocols.errors import PrivacyError, RunError, SpecError
from ..protocols.keys import derive
from ..protocols.layout import Flat
from ..protocols.spec import RunSpec
from .optimizers import Buffers

logger = logging.getLogger(__name__)

CLIP = "clip"
"""The buffer of an adaptive clip: its bound for the next round, fp32 (1,)."""

NOISE = "noise"
"""The buffer of correlated noise: int64 (bands − 1, dimensions) in steps of the grid, its bits as fp32. Secret."""

OWN_BUFFERS = frozenset({CLIP, NOISE})
"""The buffers that are kept here, and that no optimizer reads."""


class ClientLevel:
    """One run's mechanism, over a public number of clients, with the randomness that its spec names.

    Raises PrivacyError for a cap that no noise can meet.
    """

    def __init__(self, spec: RunSpec, population: int, dimensions: int) -> None:
        self.spec = spec
        self.mechanism = mechanism_of(spec, population, dimensions)

    @property
    def event(self) -> GaussianEvent:
        """What the first release is charged with; those after it differ by their clip, where it adapts."""
        return self._event(self.mechanism)

    def allows(self, ledger: Ledger) -> bool:
        """Whether the cap leaves room for one more round: asked before it starts."""
        privacy = self.spec.privacy
        assert privacy.epsilon is not None
        return ledger.allows(self.event, privacy.epsilon, privacy.delta)

    def draw(self, nodes: Sequence[int], round_: int) -> tuple[int, ...]:
        """The cohort of a round, ascending."""
        return self.mechanism.draw(nodes, self._source("draw", round_))

    def release(self, changes: Sequence[Flat], buffers: Buffers, round_: int) -> tuple[Flat, Buffers, Sequence[Event]]:
        """The noised mean change (fp32), the buffers to keep for the next round, and the events to charge."""
        mechanism = self._at(buffers.get(CLIP))
        mean, after = mechanism.release(changes, self._source("noise", round_))
        kept = {CLIP: np.array([after.clip.bound], np.float32)} if after.adapts else {}
        return mean, kept, [self._event(mechanism)]

    def _at(self, bound: Flat | None) -> Mechanism:
        if bound is None:
            return self.mechanism
        return replace(self.mechanism, clip=replace(self.mechanism.clip, bound=float(bound[0])))

    def _event(self, mechanism: Mechanism) -> GaussianEvent:
        return mechanism.event(secret=self.spec.privacy.noise == "secret")

    def _source(self, purpose: str, round_: int) -> Randomness:
        return _source(self.spec, purpose, round_)


class BandedLevel:
    """One run's banded mechanism (`privacy/banded.py`), over a public number of clients.

    Raises PrivacyError for a cap that no noise can meet.
    """

    def __init__(self, spec: RunSpec, population: int, dimensions: int) -> None:
        self.spec = spec
        self.mechanism = banded_of(spec, population, dimensions)

    @property
    def event(self) -> MatrixEvent:
        """What the whole run is charged with."""
        return self.mechanism.event(secret=self.spec.privacy.noise == "secret")

    def allows(self, ledger: Ledger) -> bool:
        """Whether the cap leaves room for the whole run, or this run is charged already.

        Raises PrivacyError where it is charged as another one: its noise is right for that alone.
        """
        privacy = self.spec.privacy
        assert privacy.epsilon is not None
        if ledger.empty:
            return ledger.allows(self.event, privacy.epsilon, privacy.delta)
        if not ledger.is_of(self.event):
            raise PrivacyError(
                f"run.rounds = {self.spec.run.rounds}: this run is charged as a whole for another number of rounds, and "
                "its noise holds for that alone. Set run.rounds back, or begin a run of another name"
            )
        return True

    def draw(self, nodes: Sequence[int], round_: int) -> tuple[int, ...]:
        """The cohort of a round, ascending: the nodes whose turn it is."""
        return self.mechanism.draw(nodes, round_)

    def release(self, changes: Sequence[Flat], buffers: Buffers, round_: int) -> tuple[Flat, Buffers, Sequence[Event]]:
        """The noised mean change (fp32), the noise to keep for the next round, and the events to charge.

        Raises RunError where the noise of the rounds before is lost.
        """
        mean, past = self.mechanism.release(changes, self._past(buffers, round_), self._source("noise", round_))
        kept = {NOISE: past.view(np.float32)} if round_ < self.mechanism.rounds and len(past) else {}
        return mean, kept, [self.event] if round_ == 1 else []

    def _past(self, buffers: Buffers, round_: int) -> Integers:
        rounds = min(round_, self.mechanism.bands) - 1
        if rounds == 0:
            return np.zeros((0, self.mechanism.dimensions), np.int64)
        past = np.ascontiguousarray(buffers[NOISE]).view(np.int64) if NOISE in buffers else None
        if past is None or past.shape != (rounds, self.mechanism.dimensions):
            raise RunError(f"round {round_}: the store has lost the noise of {rounds} rounds before; start a new run")
        return past

    def _source(self, purpose: str, round_: int) -> Randomness:
        return _source(self.spec, purpose, round_)


def require_population(spec: RunSpec) -> None:
    """Of a run over sites that come and go. Raises SpecError where the number of clients would be that of one moment."""
    if spec.privacy.unit == "client" and spec.privacy.population is None:
        raise SpecError(
            f"{spec.run.name}: privacy.population is missing: client-level privacy divides by the number of "
            "clients, which has to be public, and who is connected at the moment is not. Say how many there are"
        )


def client_level(spec: RunSpec, population: int, dimensions: int) -> ClientLevel | BandedLevel:
    """The client-level privacy that a spec asks for. Raises PrivacyError for a cap that no noise can meet."""
    if warning := too_large(spec.privacy.delta, population, "clients"):
        logger.warning(warning)
    kind = BandedLevel if spec.privacy.mechanism == "banded" else ClientLevel
    return kind(spec, population, dimensions)


def _source(spec: RunSpec, purpose: str, round_: int) -> Randomness:
    return randomness_of(spec.privacy, derive(spec.run.seed, "privacy", purpose, round_))
