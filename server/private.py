"""Client-level privacy of one run at the server: who is drawn, what is released, and what it costs."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..privacy.events import GaussianEvent
from ..privacy.ledger import Ledger
from ..privacy.mechanism import Mechanism, mechanism_of
from ..privacy.randomness import Randomness, randomness_of
from ..protocols.keys import derive
from ..protocols.layout import Flat
from ..protocols.spec import RunSpec
from .optimizers import Buffers

CLIP = "clip"
"""The buffer of an adaptive clip: its bound for the next round, fp32 (1,)."""


class ClientLevel:
    """One run's mechanism, over a public number of clients, with the randomness that its spec names.

    Raises PrivacyError for a cap that no noise can meet.
    """

    def __init__(self, spec: RunSpec, population: int, dimensions: int) -> None:
        self.spec = spec
        self.mechanism = mechanism_of(spec, population, dimensions)

    def allows(self, ledger: Ledger) -> bool:
        """Whether the cap leaves room for one more round: asked before it starts."""
        privacy = self.spec.privacy
        assert privacy.epsilon is not None
        return ledger.allows(self._event(self.mechanism), privacy.epsilon, privacy.delta)

    def draw(self, nodes: Sequence[int], round_: int) -> tuple[int, ...]:
        return self.mechanism.draw(nodes, self._source("draw", round_))

    def release(self, changes: Sequence[Flat], buffers: Buffers, round_: int) -> tuple[Flat, Buffers, GaussianEvent]:
        """The noised mean change (fp32), the buffer of the next round's clip, if it adapts, and the event to charge."""
        mechanism = self._at(buffers.get(CLIP))
        mean, after = mechanism.release(changes, self._source("noise", round_))
        kept = {CLIP: np.array([after.clip.bound], np.float32)} if after.adapts else {}
        return mean, kept, self._event(mechanism)

    def _at(self, bound: Flat | None) -> Mechanism:
        if bound is None:
            return self.mechanism
        return replace(self.mechanism, clip=replace(self.mechanism.clip, bound=float(bound[0])))

    def _event(self, mechanism: Mechanism) -> GaussianEvent:
        return mechanism.event(secret=self.spec.privacy.noise == "secret")

    def _source(self, purpose: str, round_: int) -> Randomness:
        return randomness_of(self.spec.privacy, derive(self.spec.run.seed, "privacy", purpose, round_))
