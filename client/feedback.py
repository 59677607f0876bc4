"""Error feedback: what a biased codec leaves out of a round, a node adds to its next change.

| here        | papers | meaning                                     |
|-------------|--------|---------------------------------------------|
| `change`    | Δ_t    | what a node's training of a round has moved |
| `corrected` | p_t    | the change and what was left of before      |
| `sent`      | C(p_t) | what the receiver decodes                   |
| residual    | e_t    | p_t − C(p_t), kept for the next round       |

Seide et al., INTERSPEECH 2014; Stich et al., arXiv 1809.07599 (algorithm 1, the memory m_t).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..protocols.codecs import Codec
from ..protocols.errors import PayloadError
from ..protocols.layout import B_SUFFIX, AdapterLayout, Flat
from ..protocols.update import Assignment

Rotations = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]
"""Module ⇒ its (r, r) rotation of this round, orthogonal, with A = rotation·A₀. Empty where no basis turns."""


class Feedback:
    """The residual of each node, over the layout that it trains.

    Under FedSVD the factor B is written in the basis of A, which turns each round: a residual of B is kept as
    e·rotation, in the basis of A₀, and comes back as e·rotationᵀ.

    It suits a codec whose error is smaller than what it codes, and a recipe that averages tensors. Where products
    are truncated (FlexLoRA), the next factors are other vectors, and an old residual means nothing among them.
    Residuals are 8 bytes a trained value and node, in memory alone: what is left when a process ends is lost.

    Formal guarantees: in the basis of A₀, the sum of all that was sent is the sum of all changes minus the last
    residual, up to fp32 rounding.
    """

    def __init__(self, trained: AdapterLayout) -> None:
        self.trained = trained
        self._residuals: dict[int, Flat] = {}
        self._sent: dict[int, tuple[tuple[str, int], Flat | None]] = {}

    def tables(self) -> tuple[dict[int, Any], ...]:
        """All that is kept from round to round, each by node: whoever moves nodes elsewhere takes their entries along."""
        return self._residuals, self._sent

    def encode(self, asked: Assignment, change: Flat, rotations: Rotations, codec: Codec, key: int) -> bytes:
        """The payload of a node's round; what the codec leaves out is kept for the next.

        A round that is asked for again starts from the residual before it, and another run from none.
        """
        self._rewind(asked)
        corrected = self.corrected(asked.node, change, rotations)
        payload = codec.encode(corrected, self.trained, key)
        try:
            sent = codec.decode(payload, self.trained)
        except PayloadError:
            return payload  # a change that is not finite is refused where it arrives, and must not stay here either
        self.keep(asked.node, corrected, sent, rotations)
        return payload

    def corrected(self, node: int, change: Flat, rotations: Rotations) -> Flat:
        """What to encode: `change` (fp32, (trained.size,)) and what is left of the node's rounds before."""
        residual = self._residuals.get(node)
        if residual is None:
            return change
        return change + self._turned(residual, {module: rotation.T for module, rotation in rotations.items()})

    def keep(self, node: int, corrected: Flat, sent: Flat, rotations: Rotations) -> None:
        """Keep what `sent`, the decoded payload, lacks of `corrected`; `rotations` are those of `corrected`."""
        self._residuals[node] = self._turned(corrected - sent, rotations)

    def _rewind(self, asked: Assignment) -> None:
        """Bring a node's residual to where it was before the round that is asked for."""
        (run, round_), before = self._sent.get(asked.node, (("", 0), None))
        if run != asked.run:
            self._residuals.pop(asked.node, None)
        elif round_ == asked.round:
            self._residuals.pop(asked.node, None)
            if before is not None:
                self._residuals[asked.node] = before
        self._sent[asked.node] = (asked.run, asked.round), self._residuals.get(asked.node)

    def _turned(self, flat: Flat, rotations: Rotations) -> Flat:
        """`flat` with each B whose module turns multiplied from the right: a new vector."""
        turned = flat.copy()
        for name, values in self.trained.split(turned).items():
            rotation = rotations.get(name.removesuffix(B_SUFFIX)) if name.endswith(B_SUFFIX) else None
            if rotation is not None:
                values[...] = values @ rotation
        return turned
