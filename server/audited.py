"""The path that an audit runs: what the server does with a round's updates, over a small adapter of its own.

    change ─► codec ─► ClientLevel.release ─► advance ─► the next adapter ─► `read`: the sum, as anybody can have it

Nothing of it is a copy: codec, release and step are those of a run. Three things are chosen so that nothing hides what
was released: the adapter is small and starts from zero, A has orthonormal rows, and the server's step is plain SGD of
rate 1. Whatever else a server does with a release is post-processing and cannot show more.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..privacy.audit import Values
from ..privacy.events import GaussianEvent
from ..protocols.codecs import codec_of
from ..protocols.keys import derive, generator
from ..protocols.layout import A_SUFFIX, B_SUFFIX, AdapterLayout, Flat, TensorSpec
from ..protocols.legality import recipe_of
from ..protocols.shared import SharedAdapter
from ..protocols.spec import RunSpec
from .advance import advance
from .private import ClientLevel
from .rounds import Contribution

RANK, INPUTS, OUTPUTS = 4, 16, 96
FIRST = 1
"""The round of the recipe. Releases are numbered apart from it: each is another first round."""


class AuditedPath:
    """Releases of a spec's mechanism for so many clients. Raises PrivacyError for a cap that no noise can meet."""

    def __init__(self, spec: RunSpec, population: int) -> None:
        plain = spec.recipe.model_copy(update={"optimizer": "sgd", "learning_rate": 1.0})
        self.spec, self.population = spec.model_copy(update={"recipe": plain}), population
        self.codec = codec_of(spec.wire)
        self.shared = _shared(self.spec)
        self.sent = self.shared.sent(FIRST)
        self.private = ClientLevel(self.spec, population, self.sent.size)

    def again(self, **privacy: Any) -> "AuditedPath":
        """The same mechanism built anew, with the same noise multiplier, and with these settings of privacy."""
        privacy = {"noise_multiplier": self.private.mechanism.noise_multiplier, **privacy}
        changed = self.spec.privacy.model_copy(update=privacy)
        return AuditedPath(self.spec.model_copy(update={"privacy": changed}), self.population)

    @cached_property
    def event(self) -> GaussianEvent:
        """What a release charges."""
        return self.private.release([], {}, 0)[2]

    @property
    def size(self) -> int:
        """Coordinates of a release."""
        return self.sent.size

    def arrived(self, change: Flat, *parts: int | str) -> Flat:
        """A node's change as the server decodes it; `parts` key what the codec draws."""
        key = derive(self.spec.run.seed, "audit", "codec", *parts)
        return self.codec.decode(self.codec.encode(change, self.sent, key), self.sent)

    def release(self, changes: Sequence[Flat], number: int) -> Values:
        """The noised sum of decoded `changes` as it is read off the next adapter: float64 (size,)."""
        mean, _, _ = self.private.release(changes, {}, number)
        state = self.shared.initial_state()
        after, _, _ = advance(self.shared, state, state, {}, [Contribution(1.0, mean)], number=FIRST)
        return self._read(after) * self.private.mechanism.expected

    def draw(self, nodes: Sequence[int], number: int) -> tuple[int, ...]:
        """The cohort of a round."""
        return self.private.draw(nodes, number)

    def _read(self, state: Flat) -> Values:
        """What the step added, float64 over `sent`: where A stays, B is read off the products, in A's own basis."""
        tensors = {
            name: tensor.astype(np.float64)
            for name, tensor in self.shared.layout.split(self.shared.whole(state, FIRST + 1)).items()
        }
        for pair in () if "A" in self.shared.recipe.trains else self.shared.layout.pairs:
            product = tensors[pair.b.name] @ tensors[pair.a.name]
            if pair.frozen[0] in tensors:
                product = product + tensors[pair.frozen[0]] @ tensors[pair.frozen[1]]
            start = self.shared.layout.view(self.shared.start, pair.a.name)
            tensors[pair.b.name] = product @ start.T.astype(np.float64)
        return np.concatenate([tensors[tensor.name].ravel() for tensor in self.sent.tensors])


def _shared(spec: RunSpec) -> SharedAdapter:
    recipe = recipe_of(spec)
    tensors = [TensorSpec("score.weight", (8, INPUTS), "other"), TensorSpec("score.bias", (8,), "other")]
    for module in ("q_proj", "v_proj"):
        tensors.append(TensorSpec(module + A_SUFFIX, (RANK, INPUTS), "A"))
        tensors.append(TensorSpec(module + B_SUFFIX, (OUTPUTS, RANK), "B"))
    layout = AdapterLayout(tensors)
    if recipe.has_frozen:
        layout = layout.with_frozen(recipe.budget(layout, spec.recipe))
    start = np.zeros(layout.size, np.float32)
    for pair in () if "A" in recipe.trains else layout.pairs:
        names = (pair.a.name, pair.frozen[1]) if recipe.has_frozen else (pair.a.name,)
        for name in names:
            _orthonormal(layout.view(start, name), derive(spec.run.seed, "audit", "start", name))
    return SharedAdapter(recipe, spec.recipe, layout, start)


def _orthonormal(rows: np.ndarray[Any, np.dtype[np.float32]], key: int) -> None:
    """Fills `rows` with as many orthonormal ones as an A has, again and again."""
    random = generator(key)
    for first in range(0, len(rows), RANK):
        part = rows[first : first + RANK]
        part[...] = np.linalg.qr(random.standard_normal((rows.shape[1], len(part))))[0].T
