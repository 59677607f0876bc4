"""One copy of a zeroth-order run's state: the lattice after so many Steps. Nodes, server and replay all hold one.

A Step adds integers times signs, so copies that applied the same Steps are equal in every bit, whatever the machine, the
number of threads or the order inside a Step. A snapshot is that state as bytes: dense (8 bytes a parameter), or, where
directions come from a pool, what has been added along each of them (4 bytes a direction and segment; FedKSeed,
arXiv 2312.06353, §4): whichever is shorter.
"""

import struct
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from ..protocols.errors import PayloadError, RunError
from ..protocols.exchange import DECAYS, Step, Terms
from .directions import Directions, Floats, Integers
from .lattice import EXPONENTS, Lattice

_HEAD = struct.Struct("<BIIhQ")
_SEGMENT = struct.Struct("<hI")
_DENSE, _POOLED = 0, 1


@dataclass(frozen=True, eq=False)
class Replica:
    """The state after `number` Steps. `sums` are kept for a pool: for each segment its exponent, its decay and, int32
    (pool,), what it has added along each direction.

    Formal guarantees: replicas of one start and one list of Steps have equal `proof`s, and so has one that was read from
    any snapshot on the way.
    """

    terms: Terms
    lattice: Lattice
    number: int = 0
    sums: tuple[tuple[int, int, Integers], ...] = ()

    @classmethod
    def begin(cls, terms: Terms, start: Floats) -> Self:
        """Before the first Step: fp32 (n,). Segment 0 holds nothing; the first Step opens segment 1."""
        return cls(terms, Lattice.begin(start, 0))

    def after(self, step: Step) -> Self:
        """The state after the next Step.

        Raises PayloadError for a Step that is malformed, RunError where it is not the next one, where it moves more than
        a segment holds, or where its proof is of another state.
        """
        if step.number != self.number + 1:
            raise RunError(f"step {step.number} does not follow step {self.number}: ask for the steps between")
        lattice, sums = self._in_segment(step)
        streams, indices, counts = self.terms.applied(step)
        changes = -step.multiplier * counts
        if sums:
            exponent, decay, before = sums[-1]
            added = before.copy()
            np.add.at(added, indices, changes.astype(np.int32))
            sums = (*sums[:-1], (exponent, decay, added))
        if len(counts):
            lattice = lattice.advance(Directions(self.terms.key, streams, indices), changes)
        after = replace(self, lattice=lattice, number=step.number, sums=sums)
        after.require(step.proof)
        return after

    def _in_segment(self, step: Step) -> tuple[Lattice, tuple[tuple[int, int, Integers], ...]]:
        """The lattice and the sums in the Step's segment, opened if it is the next one."""
        segment = self.lattice.segment
        if step.segment == segment.number and step.exponent == segment.exponent and not step.decay:
            return self.lattice, self.sums
        if step.segment != segment.number + 1 or step.exponent not in EXPONENTS:
            raise PayloadError(
                f"step {step.number} is of segment {step.segment} in units of 2^{step.exponent} with the decay "
                f"{step.decay}, and segment {segment.number} in units of 2^{segment.exponent} is open"
            )
        summed = self.terms.pool and len(self.sums) == segment.number
        fresh = ((step.exponent, step.decay, np.zeros(self.terms.pool, np.int32)),) if summed else ()
        return self.lattice.next_segment(step.exponent, step.keep), (*self.sums, *fresh)

    @property
    def weights(self) -> Floats:
        """The parameters, fp32 (n,)."""
        return self.lattice.weights()

    @property
    def proof(self) -> bytes:
        """SHA-256 of the state, 32 bytes."""
        return bytes.fromhex(self.lattice.state_hash())

    def require(self, proof: bytes) -> None:
        """Raises RunError where `proof` is not empty and not of this state."""
        if proof and proof != self.proof:
            raise RunError(f"the state after step {self.number} is not the one that its hash {proof.hex()[:12]}… says")

    def snapshot(self) -> bytes:
        """The state as bytes, in its shorter form."""
        dense, pooled = 8 * len(self.lattice.acc), len(self.sums) * (_SEGMENT.size + 4 * self.terms.pool)
        if self.sums and pooled < dense:
            parts = (_SEGMENT.pack(*head) + added.astype("<i4").tobytes() for *head, added in self.sums)
            return self._head(_POOLED) + b"".join(parts)
        segment = self.lattice.segment
        return self._head(_DENSE) + segment.start.astype("<f4").tobytes() + self.lattice.acc.astype("<i4").tobytes()

    def restored(self, snapshot: bytes) -> Self:
        """The state of a snapshot of this run; this replica gives the terms, and the start, so it must be at step 0.

        After a dense snapshot of a pooled run the sums are lost, so its snapshots stay dense. Raises PayloadError.
        """
        if self.number:
            raise ValueError("a snapshot is read from the start of its run")
        if len(snapshot) < _HEAD.size:
            raise PayloadError(f"a snapshot of {len(snapshot)} bytes is none")
        form, number, segment, exponent, reach = _HEAD.unpack_from(snapshot)
        body = snapshot[_HEAD.size :]
        if form == _POOLED and self.terms.pool:
            return replace(self._pooled(body, segment), number=number)
        size = len(self.lattice.acc)
        if form != _DENSE or len(body) != 8 * size or exponent not in EXPONENTS or reach >= 2**24:
            raise PayloadError(f"a snapshot of {len(snapshot)} bytes does not fit {size} parameters")
        start = np.frombuffer(body, "<f4", size)
        lattice = Lattice.begin(start.astype(np.float32), exponent, segment)
        acc = np.frombuffer(body, "<i4", size, 4 * size).astype(np.int32)
        return replace(self, lattice=replace(lattice, acc=acc, reach=reach), number=number)

    def _head(self, form: int) -> bytes:
        segment = self.lattice.segment
        return _HEAD.pack(form, self.number, segment.number, segment.exponent, self.lattice.reach)

    def _pooled(self, body: bytes, segments: int) -> Self:
        pool = self.terms.pool
        width = _SEGMENT.size + 4 * pool
        if len(body) != segments * width:
            raise PayloadError(f"{len(body)} bytes are not the sums of {segments} segments along {pool} directions")
        lattice, sums = self.lattice, []
        directions = Directions(self.terms.key, 0, np.arange(pool))
        for first in range(0, len(body), width):
            exponent, decay = _SEGMENT.unpack_from(body, first)
            added = np.frombuffer(body, "<i4", pool, first + _SEGMENT.size).astype(np.int32)
            if exponent not in EXPONENTS or decay >= DECAYS:
                raise PayloadError(
                    f"a segment in units of 2^{exponent} with the decay {decay}, which fp32 does not hold"
                )
            lattice = lattice.next_segment(exponent, 1 - decay / DECAYS).advance(directions, added)
            sums.append((exponent, decay, added))
        return replace(self, lattice=lattice, sums=tuple(sums))
