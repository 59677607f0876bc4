"""The path that an audit runs: what the server does with a round's updates, over a small adapter of its own.

    change ─► codec ─► client_level(…).release ─► advance ─► the next adapter ─► `read`: the sum, as anybody can have it

Nothing of it is a copy: codec, release and step are those of a run. Three things are chosen so that nothing hides what
was released: the adapter is small and starts from zero, A has orthonormal rows, and the server's step is plain SGD of
rate 1. Whatever else a server does with a release is post-processing and cannot show more.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from math import ceil
from typing import Any, Self

import numpy as np

from ..privacy.audit import Values
from ..privacy.banded import encoder
from ..privacy.clipping import BIT_NOISE
from ..privacy.events import Event, sum_multiplier
from ..protocols.codecs import codec_of
from ..protocols.exchange import terms_of
from ..protocols.keys import derive, generator
from ..protocols.layout import A_SUFFIX, B_SUFFIX, AdapterLayout, Flat, TensorSpec
from ..protocols.legality import recipe_of
from ..protocols.shared import SharedAdapter
from ..protocols.spec import RunSpec
from .advance import advance
from .optimizers import Buffers
from .private import CLIP, ClientLevel, client_level
from .reduction import Reduction
from .rounds import Contribution

RANK, INPUTS, OUTPUTS = 4, 16, 96
FIRST = 1
"""The round of the recipe. Releases are numbered apart from it: each is another first round."""

DIRECTIONS = 1024
"""Of an audited exchange."""

LONGEST = 32
"""Rounds of a run that is audited whole, if that is at least two of its separations."""


class AuditedPath:
    """Releases of a spec's mechanism for so many clients. Raises PrivacyError for a cap that no noise can meet."""

    def __init__(self, spec: RunSpec, population: int) -> None:
        plain = spec.recipe.model_copy(update={"optimizer": "sgd", "learning_rate": 1.0})
        self.spec, self.population = spec.model_copy(update={"recipe": plain}), population
        self.codec = codec_of(spec.wire)
        self.shared = _shared(self.spec)
        self.sent = self.shared.sent(FIRST)
        self.private = client_level(self.spec, population, self.sent.size)

    def again(self, **privacy: Any) -> Self:
        """The same mechanism built anew, with the same noise multiplier, and with these settings of privacy."""
        return type(self)(self._solved(**privacy), self.population)

    @cached_property
    def event(self) -> Event:
        """What a first release charges."""
        (event,) = self.private.release([], {}, 1)[2]
        return event

    @property
    def noise_std(self) -> float:
        """The noise on the sum that the event charges; an adaptive clip's bits take a part of the charge: it is more."""
        event = self.event
        if self.spec.privacy.clipping == "fixed":
            return event.noise_std
        bits = _bit_noise(event, self.private.mechanism.expected)
        return sum_multiplier(event.noise_multiplier, bits / _changed(event)) * event.sensitivity

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
        return self._stepped(mean) * self.private.mechanism.expected

    def scores(self, directions: Values, released: Values) -> Values:
        """How much each of `directions` (float64 (K, size), of norm 1) is in a release: float64 (K,)."""
        return directions @ released

    def draw(self, nodes: Sequence[int], number: int) -> tuple[int, ...]:
        """The cohort of a round."""
        return self.private.draw(nodes, number)

    def _solved(self, **privacy: Any) -> RunSpec:
        """The spec with the noise multiplier that was solved for, and these settings of privacy."""
        privacy = {"noise_multiplier": self.private.mechanism.noise_multiplier, **privacy}
        return self.spec.model_copy(update={"privacy": self.spec.privacy.model_copy(update=privacy)})

    def _stepped(self, mean: Flat) -> Values:
        """A noised mean as the adapter has it after the step."""
        state = self.shared.initial_state()
        after, _, _ = advance(self.shared, state, state, {}, [Contribution(1.0, mean)], number=FIRST)
        return self._read(after)

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


class AuditedRun(AuditedPath):
    """A release is here all rounds of a run, with noise that is correlated over them (`privacy/banded.py`).

    Each change is that of one client, which sends it in each of its turns; all have their first turn in round 1, for
    that is the worst one. Of the rounds' sums x̂ that are read off the adapters, C·x̂ is given, in which noise is
    independent: float64 (rounds · size,). A long run is audited as one of fewer rounds, with the same noise multiplier.
    """

    def __init__(self, spec: RunSpec, population: int) -> None:
        assert spec.privacy.separation is not None, "a spec with a banded mechanism has a separation"
        rounds = min(spec.run.rounds, max(LONGEST, 2 * spec.privacy.separation))
        super().__init__(spec.model_copy(update={"run": spec.run.model_copy(update={"rounds": rounds})}), population)
        self.encoder = encoder(rounds, min(spec.privacy.separation, rounds))
        self._turns: dict[int, np.ndarray[Any, np.dtype[np.bool_]]] = {}

    def release(self, changes: Sequence[Flat], number: int) -> Values:
        """C·x̂ of run `number`."""
        turns, buffers, sums = self.turns(len(changes)), Buffers(), []
        private = client_level(self._keyed(number), self.population, self.size)
        for round_, present in enumerate(turns, 1):
            there = [change for change, takes_part in zip(changes, present, strict=True) if takes_part]
            mean, buffers, _ = private.release(there, buffers, round_)
            sums.append(self._stepped(mean) * self.private.mechanism.expected)
        return np.asarray((self.encoder @ np.stack(sums)).ravel())

    def scores(self, directions: Values, released: Values) -> Values:
        """As in `AuditedPath`; what a client leaves in C·x̂ is C·(its turns) in its own direction."""
        left = self.encoder @ self.turns(len(directions)).astype(np.float64)
        rounds = released.reshape(len(self.encoder), -1) @ directions.T
        return np.asarray((rounds * left / np.linalg.norm(left, axis=0)).sum(axis=0))

    def turns(self, clients: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Who takes part in which round, bool (rounds, clients)."""
        if clients not in self._turns:
            separation = self.spec.privacy.separation or 1
            nodes = self.draw(range(1, 4 * separation * (clients + 16)), 1)[:clients]
            cohorts = [set(self.draw(nodes, round_)) for round_ in range(1, len(self.encoder) + 1)]
            present = [[node in cohort for node in nodes] for cohort in cohorts]
            self._turns[clients] = np.array(present, np.bool_).reshape(len(self.encoder), clients)
        return self._turns[clients]

    def _keyed(self, number: int) -> RunSpec:
        """The spec with a seed of its own for one run: a simulation's noise follows from it."""
        seed = derive(self.spec.run.seed, "audit", "run", number) % 2**63
        spec = self._solved()
        return spec.model_copy(update={"run": spec.run.model_copy(update={"seed": seed})})


class AuditedExchange(AuditedPath):
    """A release is here one exchange of a recipe of codes: the noised sum of the slopes that nodes' codes stand for.

        slopes ─► code ─► Reduction.released (decode, clip, noise) ─► the sum

    Rounding that sum to the Step's integers is post-processing, and cannot show more. All directions of an exchange are
    one vector with one clip, so how many there are is free: DIRECTIONS of them hold many canaries.
    """

    def __init__(self, spec: RunSpec, population: int) -> None:
        self.spec, self.population = spec, population
        self.terms = replace(terms_of(spec), directions=DIRECTIONS)
        self.scale = self.terms.code.scale_of(spec.privacy.clip)
        self.private = ClientLevel(spec, population, DIRECTIONS)
        self.reduction = Reduction(spec, self.terms, ceil(self.private.mechanism.expected), self.private)

    @property
    def size(self) -> int:
        return DIRECTIONS

    def arrived(self, change: Flat, *parts: int | str) -> Flat:
        """A node's slopes as the server reads them off its codes."""
        code = self.terms.code
        payload = code.encode(change, self.scale, derive(self.spec.run.seed, "audit", "code", *parts))
        return np.ldexp(code.decode(payload, self.size).astype(np.float32), self.scale)

    def release(self, changes: Sequence[Flat], number: int) -> Values:
        counts = [np.rint(np.ldexp(change.astype(np.float64), -self.scale)).astype(np.int64) for change in changes]
        return self.reduction.released(counts, self.scale, number)[0]


class AuditedClip(AuditedPath):
    """A release is here what an adaptive clip follows: the noised sum of bits, as the next round's clip tells it.

    A bit is whether a change is within the clip, and that alone: changes have one coordinate here, and the clip is 1.
    """

    private: ClientLevel

    def __init__(self, spec: RunSpec, population: int) -> None:
        privacy = spec.privacy.model_copy(update={"clip": 1.0})
        self.spec, self.population = spec.model_copy(update={"privacy": privacy}), population
        self.private = ClientLevel(self.spec, population, 1)

    @cached_property
    def event(self) -> Event:
        """The bits' part of what a release charges: ±½ of each that changes, and what two fp32 clips may miss of it."""
        event, mechanism = self.private.event, self.private.mechanism
        missed = 2.0**-23 * mechanism.expected / mechanism.clip.rate
        noise_std = _bit_noise(event, mechanism.expected)
        return replace(event, noise_std=noise_std, sensitivity=_changed(event) / 2 + missed)

    @property
    def noise_std(self) -> float:
        return self.event.noise_std

    @property
    def size(self) -> int:
        return 1

    def arrived(self, change: Flat, *parts: int | str) -> Flat:
        """Only its norm matters, and that is of what the server decodes."""
        return change

    def release(self, changes: Sequence[Flat], number: int) -> Values:
        """The noised sum of the bits: float64 (1,)."""
        _, kept, _ = self.private.release(changes, {}, number)
        mechanism, clip = self.private.mechanism, self.private.mechanism.clip
        fraction = clip.quantile - np.log(kept[CLIP].astype(np.float64) / clip.bound) / clip.rate
        return np.asarray((fraction - 0.5) * mechanism.expected)


def audited_path(spec: RunSpec, population: int) -> AuditedPath:
    """The path of a spec with client-level privacy. Raises PrivacyError for a cap that no noise can meet."""
    if recipe_of(spec).zeroth:
        return AuditedExchange(spec, population)
    kind = AuditedRun if spec.privacy.mechanism == "banded" else AuditedPath
    return kind(spec, population)


def _changed(event: Event) -> int:
    """How many changes differ between two neighbouring worlds."""
    return 2 if event.relation == "replace-one" else 1


def _bit_noise(event: Event, expected: float) -> float:
    """The noise on the sum of an adaptive clip's bits, for what a whole release charges."""
    return max(BIT_NOISE * expected, event.noise_multiplier * _changed(event))


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
