"""Client-level privacy of one run at the server: who is drawn, what is released, and what it costs."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..privacy.events import GaussianEvent
from ..privacy.ledger import Ledger
from ..privacy.mechanism import Mechanism, mechanism_of
from ..privacy.randomness import Randomness, SecretRandomness, SimulationRandomness
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
        """The noised mean change (fp32), the buffers with the next round's clip, and the event that charges it."""
        buffers = dict(buffers)
        mechanism = self._at(buffers.pop(CLIP, None))
        mean, after = mechanism.release(changes, self._source("noise", round_))
        if after.adapts:
            buffers[CLIP] = np.array([after.clip.bound], np.float32)
        return mean, buffers, self._event(mechanism)

    def _at(self, bound: Flat | None) -> Mechanism:
        if bound is None:
            return self.mechanism
        return replace(self.mechanism, clip=replace(self.mechanism.clip, bound=float(bound[0])))

    def _event(self, mechanism: Mechanism) -> GaussianEvent:
        return mechanism.event(secret=self.spec.privacy.noise == "secret")

    def _source(self, purpose: str, round_: int) -> Randomness:
        """The operating system's; in a watermarked simulation one that a key repeats."""
        if self.spec.privacy.noise == "secret":
            return SecretRandomness()
        return SimulationRandomness(derive(self.spec.run.seed, "privacy", purpose, round_))
