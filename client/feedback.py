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
from .shelf import Shelf

RESIDUAL = "residual"

Rotations = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]
"""Module ⇒ its (r, r) rotation of this round, orthogonal, with A = rotation·A₀. Empty where no basis turns."""


class Feedback:
    """The residual of each node, over the layout that it trains.

    Under FedSVD the factor B is written in the basis of A, which turns each round: a residual of B is kept as
    e·rotation, in the basis of A₀, and comes back as e·rotationᵀ.

    It suits a codec whose error is smaller than what it codes, and a recipe that averages tensors. Where products
    are truncated (FlexLoRA), the next factors are other vectors, and an old residual means nothing among them.
    Residuals are on a shelf (`client/shelf.py`), of each node those of its last two rounds: 8 bytes a trained value.

    A node does not hear whether its update counts. One that was sent and is not counted, because it came after the
    deadline or was refused, is lost as it would be without feedback: the residual goes on from what it left out.
    A federation that drops updates by design would lose them so each round (`protocols/legality.py` refuses it).

    Formal guarantees: in the basis of A₀, the sum of all that was sent is the sum of all changes minus the last
    residual, up to fp32 rounding.
    """

    def __init__(self, trained: AdapterLayout, shelf: Shelf | None = None) -> None:
        self.trained = trained
        self.shelf = Shelf() if shelf is None else shelf

    def tables(self) -> tuple[Any, ...]:
        """All that is kept from round to round, each by node: whoever moves nodes elsewhere takes their entries along."""
        return (self.shelf,)

    def encode(self, asked: Assignment, change: Flat, rotations: Rotations, codec: Codec, key: int) -> bytes:
        """The payload of a node's round; what the codec leaves out is kept for the next, where it is finite.

        A round that is asked for again starts from the residual before it, and another run from none.
        """
        corrected = self.corrected(asked, change, rotations)
        payload = codec.encode(corrected, self.trained, key)
        try:
            sent = codec.decode(payload, self.trained)
        except PayloadError:
            return payload  # a change that is not finite is refused where it arrives, and must not stay here either
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is seen below
            residual = self._turned(corrected - sent, rotations)
        if np.isfinite(residual).all():  # any other would spoil all later rounds of the node
            self.shelf.put(asked, {RESIDUAL: residual})
        return payload

    def corrected(self, asked: Assignment, change: Flat, rotations: Rotations) -> Flat:
        """What to encode: `change` (fp32, (trained.size,)) and what is left of the node's rounds before."""
        found = self.shelf.before(asked)
        if found is None:
            return change
        return change + self._turned(found[1][RESIDUAL], {module: rotation.T for module, rotation in rotations.items()})

    def _turned(self, flat: Flat, rotations: Rotations) -> Flat:
        """`flat` with each B whose module turns multiplied from the right: a new vector."""
        turned = flat.copy()
        for name, values in self.trained.split(turned).items():
            rotation = rotations.get(name.removesuffix(B_SUFFIX)) if name.endswith(B_SUFFIX) else None
            if rotation is not None:
                values[...] = values @ rotation
        return turned
