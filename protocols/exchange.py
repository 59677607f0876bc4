"""What travels in the low-bandwidth mode: an Exchange down, an Answer of a few bytes up, and the Steps that all apply.

    server  ─ Exchange: number, what to probe, the Steps that this node lacks ─►  node
    node    ─ Answer: number, one code a direction ────────────────────────────►  server ─► Step, logged, then sent

A run is its Steps: whoever starts from the same adapter and applies them holds the same bits. An Exchange carries those
that its node is not known to have, so a straggler stays in step; one that has none gets a snapshot where that is shorter.

Bodies are little-endian structs. Whatever a sender writes is checked: a body that is not exactly what it should be raises
PayloadError.
"""

import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from .errors import PayloadError
from .keys import derive
from .recipes import recipe_named
from .scalars import SCALAR_CODES, Counts, ScalarCode
from .spec import RunSpec

PROOF_EVERY = 64
"""Exchanges from one state hash in a Step to the next."""

DECAYS = 2**24
"""Weight decay comes in units of 1/DECAYS, so that what is kept of a parameter is a number of fp32."""

LONGEST_REASON = 200
"""Bytes of a node's reason that travel."""


@dataclass(frozen=True)
class Terms:
    """What all sides agree on before the first exchange; a function of the run's spec.

    `key` (64 bits) names the directions. `mode` says which ones an exchange probes: each node its `own`, some of a `pool`
    of that many, or all nodes the same (`shared`). `directions` is how many a node probes in one exchange.
    """

    key: int
    mode: Literal["own", "pool", "shared"]
    directions: int
    code: ScalarCode
    pool: int = 0

    def probed(self, number: int, slot: int, picks: bytes = b"") -> tuple[Counts, Counts]:
        """Streams and indices, each int64 (K,), of what the node in `slot` of an exchange probes (numbers count from 1).

        `picks` are its indices in the pool, as in an Exchange. Raises PayloadError where they are not.
        """
        count = self.directions
        if self.mode == "pool":
            return np.zeros(count, np.int64), self._picks(picks)
        first = slot * count if self.mode == "own" else 0
        return np.full(count, number, np.int64), np.arange(first, first + count)

    def applied(self, step: "Step") -> tuple[Counts, Counts, Counts]:
        """Streams, indices and counts, each int64 (M,), of all that a Step adds. Raises PayloadError."""
        if self.mode == "shared":
            counts = _vector(step.body, "<i4", self.directions)
            return *self.probed(step.number, 0), counts
        records = self._records(step.body)
        counts = self.code.decode_rows(records["codes"], self.directions).ravel()
        if self.mode == "pool":
            return np.zeros(counts.size, np.int64), self._in_pool(records["picks"]).ravel(), counts
        indices = records["slot"].astype(np.int64)[:, None] * self.directions + np.arange(self.directions)
        return np.full(counts.size, step.number, np.int64), indices.ravel(), counts

    def body(self, entries: "list[tuple[int, bytes, bytes]]") -> bytes:
        """What a Step holds of nodes' own codes: (slot, picks, codes) each."""
        return b"".join(struct.pack("<H", slot) + picks + codes for slot, picks, codes in entries)

    def answers(self, step: "Step") -> int | None:
        """How many nodes' codes a Step holds; None where it holds a sum, which does not tell."""
        return None if self.mode == "shared" else len(self._records(step.body))

    @property
    def record(self) -> int:
        """Bytes of one node's codes in a Step."""
        return self._form.itemsize

    @cached_property
    def _form(self) -> np.dtype[np.void]:
        """One node's codes in a Step, as `body` packs them."""
        picked = self.directions if self.mode == "pool" else 0
        size = self.code.size(self.directions)
        return np.dtype([("slot", "<u2"), ("picks", "<u2", (picked,)), ("codes", "u1", (size,))])

    def _records(self, body: bytes) -> Any:
        if len(body) % self.record:
            raise PayloadError(f"a step of {len(body)} bytes does not hold records of {self.record}")
        records = np.frombuffer(body, self._form)
        if len(set(records["slot"].tolist())) < len(records):
            raise PayloadError("a step holds two records of one slot")
        return records

    def _picks(self, picks: bytes) -> Counts:
        return self._in_pool(_vector(picks, "<u2", self.directions))

    def _in_pool(self, chosen: np.ndarray[Any, Any]) -> Counts:
        if (chosen >= self.pool).any():
            raise PayloadError(f"direction {chosen.max()} is not in a pool of {self.pool}")
        return chosen.astype(np.int64)


def terms_of(spec: RunSpec) -> Terms:
    """The terms of a run whose recipe is of zeroth order."""
    mode, zeroth = recipe_named(spec.recipe.name).directions, spec.zeroth
    assert mode != "none", f"{spec.recipe.name} sends updates, not scalars"
    key = derive(spec.run.seed, "directions") % 2**64
    return Terms(key, mode, zeroth.directions, SCALAR_CODES[zeroth.code], zeroth.pool if mode == "pool" else 0)


@dataclass(frozen=True)
class Step:
    """What everybody applies after an exchange: w −= multiplier·2^exponent·Σ counts·z, exactly (`kernels/replica.py`).

    `segment` counts the segments of the lattice from 1: a new one opens with the step that first names it. `scale` was
    announced for the codes. `proof`, in every PROOF_EVERY-th, is the hash of the state after the step (32 bytes).
    `decay` is of a step that opens a segment: before anything is added, w is multiplied by 1 − decay·2⁻²⁴, which fp32
    holds exactly.
    """

    number: int
    segment: int
    exponent: int
    multiplier: int
    scale: int
    body: bytes = field(repr=False)
    proof: bytes = b""
    decay: int = 0

    @property
    def keep(self) -> float:
        """What is left of each parameter when the segment opens: 1 without weight decay."""
        return 1 - self.decay / DECAYS

    def to_bytes(self) -> bytes:
        holds = len(self.proof) | _HOLDS_DECAY * (self.decay > 0)
        head = _STEP.pack(self.number, self.segment, self.exponent, self.multiplier, self.scale, holds)
        return head + self.proof + (_DECAY.pack(self.decay) if self.decay else b"") + self.body

    @classmethod
    def from_bytes(cls, data: bytes) -> "Step":
        """Raises PayloadError where the bytes are no step."""
        number, segment, exponent, multiplier, scale, holds = _unpacked(_STEP, data)
        proof, decays = holds & ~_HOLDS_DECAY, bool(holds & _HOLDS_DECAY)
        rest = data[_STEP.size :]
        if proof not in (0, 32) or len(rest) < proof:
            raise PayloadError(f"a step's proof has {proof} bytes, not 0 or 32")
        (decay,) = _unpacked(_DECAY, rest[proof:]) if decays else (0,)
        if decays and not 0 < decay < DECAYS:
            raise PayloadError(f"a decay of {decay} in units of 2^-24: 1 to {DECAYS - 1} are some")
        body = rest[proof + _DECAY.size * decays :]
        return cls(number, segment, exponent, multiplier, scale, body, rest[:proof], decay)


@dataclass(frozen=True)
class Exchange:
    """What one node is asked: to catch up, then to probe at w ± radius·z and answer in codes of steps of 2^scale.

    `slot` is its place among the nodes of this exchange. `snapshot` and `steps` are what it is not known to have;
    `proof`, if any, is the hash of the state that it must then hold. Steps that it has already are passed over.
    """

    run: str
    node: int
    number: int
    slot: int
    scale: int
    radius: float
    picks: bytes = b""
    proof: bytes = b""
    snapshot: bytes = field(default=b"", repr=False)
    steps: tuple[Step, ...] = ()

    def to_bytes(self) -> bytes:
        """All but the node, whose stream it goes down."""
        steps = [step.to_bytes() for step in self.steps]
        parts = [self.run.encode(), self.picks, self.proof, self.snapshot, *steps]
        head = _EXCHANGE.pack(self.number, self.slot, self.scale, self.radius, len(steps))
        return head + b"".join(_LENGTH.pack(len(part)) + part for part in parts)

    @classmethod
    def from_bytes(cls, node: int, data: bytes) -> "Exchange":
        """Raises PayloadError where the bytes are no exchange."""
        number, slot, scale, radius, count = _unpacked(_EXCHANGE, data)
        parts, place = [], _EXCHANGE.size
        while place < len(data):
            (length,) = _unpacked(_LENGTH, data[place:])
            place += _LENGTH.size + length
            parts.append(data[place - length : place])
        if len(parts) != 4 + count or place != len(data) or not radius > 0:
            raise PayloadError(f"an exchange of {len(data)} bytes has {len(parts)} parts, not {4 + count} that fill it")
        try:
            run = parts[0].decode()
        except UnicodeDecodeError as error:
            raise PayloadError(f"an exchange names no run: {error}") from error
        steps = tuple(map(Step.from_bytes, parts[4:]))
        return cls(run, node, number, slot, scale, radius, parts[1], parts[2], parts[3], steps)


@dataclass(frozen=True)
class Answer:
    """What one node says to one exchange: its `codes`, or that it is `lost` and needs a snapshot, or why it refuses.

    `epsilon` is what its own data has spent, where it keeps an account and the exchange is one that is looked at;
    `private` says whether that noise was secret. `empty`: it holds no data.
    """

    node: int
    number: int
    kind: Literal["codes", "lost", "refused", "empty"]
    codes: bytes = b""
    reason: str = ""
    epsilon: float | None = None
    private: bool = False

    def to_bytes(self) -> bytes:
        """All but the node, whose stream it comes up: 4 bytes, and the codes."""
        head = _ANSWER.pack(self.number | _KINDS.index(self.kind) << _NUMBER_BITS)
        spent = b"" if self.epsilon is None else _SPENT.pack(self.epsilon, self.private)
        return head + (self.codes + spent if self.kind == "codes" else self.reason.encode()[:LONGEST_REASON])

    @classmethod
    def from_bytes(cls, node: int, data: bytes, size: int) -> "Answer":
        """`size` is that of the codes (`ScalarCode.size`). Raises PayloadError where the bytes are no answer."""
        (word,) = _unpacked(_ANSWER, data)
        number, kind, rest = word % 2**_NUMBER_BITS, _KINDS[word >> _NUMBER_BITS], data[_ANSWER.size :]
        if kind != "codes":
            return cls(node, number, kind, reason=rest[:LONGEST_REASON].decode(errors="replace"))
        if len(rest) == size:
            return cls(node, number, kind, rest)
        if len(rest) != size + _SPENT.size:
            raise PayloadError(f"an answer has {len(rest)} bytes of codes, and {size} are expected")
        epsilon, private = _SPENT.unpack(rest[size:])
        return cls(node, number, kind, rest[:size], epsilon=epsilon, private=private)


_STEP, _EXCHANGE, _LENGTH = struct.Struct("<IHhHbB"), struct.Struct("<IHbfI"), struct.Struct("<I")
_DECAY, _HOLDS_DECAY = struct.Struct("<I"), 1
_ANSWER, _SPENT = struct.Struct("<I"), struct.Struct("<f?")
_NUMBER_BITS = 30
_KINDS: tuple[Literal["codes", "lost", "refused", "empty"], ...] = ("codes", "lost", "refused", "empty")


def _unpacked(form: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) < form.size:
        raise PayloadError(f"{len(data)} bytes where at least {form.size} are expected")
    return form.unpack_from(data)


def _vector(data: bytes, dtype: str, count: int) -> Counts:
    if len(data) != count * np.dtype(dtype).itemsize:
        raise PayloadError(f"{len(data)} bytes where {count} numbers of {np.dtype(dtype).itemsize} bytes are expected")
    values: Counts = np.frombuffer(data, dtype).astype(np.int64)
    return values
