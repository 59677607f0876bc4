"""Low-rank algebra: sums of products `B·A` that stay factored, truncated by QR and a small SVD, or by iteration.

No `out × in` matrix is formed unless it is smaller than `R × R`: with R columns in all, everything is `O((out + in)·R²)`
(NumPy and LAPACK, no torch, because the server runs this). The plain references at the end of the file form the dense matrix; the tests
hold each function equal to its reference.

| here      | papers        | meaning                                             | shape     |
|-----------|---------------|-----------------------------------------------------|-----------|
| `b`       | B             | output factor                                       | (out, R)  |
| `a`       | A             | input factor                                        | (R, in)   |
| `rotation`| V             | orthogonal matrix between two orthonormal A's       | (r, r)    |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Matrix = np.ndarray[Any, np.dtype[Any]]

MANY = 256
"""Stacked columns from which on the cheaper, rougher way to a norm is taken."""

OVERSAMPLING, ITERATIONS, CHECK_EVERY = 16, 24, 2

FEW, ROUNDINGS, STEPS = 8, 32, 12
"""A block of at most 1/FEW of the stack is worth STEPS of iteration, which must settle to so many roundings: more steps
would cost as much as the SVD."""


@dataclass(frozen=True)
class LowRank:
    """The matrix `b @ a`, kept as its factors."""

    b: Matrix
    a: Matrix

    @property
    def rank(self) -> int:
        """Columns kept; an upper bound of the matrix's rank."""
        return int(self.a.shape[0])

    def norm(self) -> float:
        """Frobenius norm of `b @ a`, in float64.

        Of many stacked terms it is taken from the two Gram matrices, several times faster than by QR: where terms cancel,
        rounding then leaves 1e-8 of the largest. With more columns than the matrix has it is the matrix' own.
        """
        if self._is_small():
            return float(np.linalg.norm(self._dense()))
        b, a = self.b.astype(np.float64), self.a.astype(np.float64)
        if self.rank > MANY:
            return _norm_of(b.T @ b, a @ a.T)
        return float(np.linalg.norm(_core(b) @ _core(a.T).T))

    def norm_and_distance(self, other: "LowRank") -> tuple[float, float]:
        """`‖self‖` and `‖self − other‖`, of many stacked terms from one pair of Gram matrices; see `norm`."""
        if self._is_small():
            own = self._dense()
            return float(np.linalg.norm(own)), float(np.linalg.norm(own - other._dense()))
        if self.rank <= MANY:
            return self.norm(), self.minus(other).norm()
        difference = self.minus(other)
        b, a = difference.b.astype(np.float64), difference.a.astype(np.float64)
        gram_b, gram_a = b.T @ b, a @ a.T
        first = slice(self.rank)
        return _norm_of(gram_b[first, first], gram_a[first, first]), _norm_of(gram_b, gram_a)

    def _is_small(self) -> bool:
        """Whether the matrix is no larger than a Gram matrix of its many columns: tiny modules, many nodes."""
        return self.rank > MANY and self.rank >= max(self.b.shape[0], self.a.shape[1])

    def _dense(self) -> Matrix:
        """The (out, in) matrix, float64."""
        return np.asarray(self.b.astype(np.float64) @ self.a.astype(np.float64))

    def singular_values(self) -> Matrix:
        """The min(R, out, in) largest singular values of `b @ a`, falling; float64."""
        core = _core(self.b.astype(np.float64)) @ _core(self.a.T.astype(np.float64)).T
        return np.asarray(np.linalg.svd(core, full_matrices=False, compute_uv=False))

    def effective_rank(self) -> float:
        """exp of the entropy of the normalized singular values (Roy & Vetterli 2007); 0 for the zero matrix."""
        values = self.singular_values()
        total = values.sum()
        if not total > 0:
            return 0.0
        shares = values[values > 0] / total
        return float(np.exp(-(shares * np.log(shares)).sum()))

    def minus(self, other: "LowRank") -> "LowRank":
        return weighted_sum([(1.0, self), (-1.0, other)])

    def truncate(self, rank: int) -> "LowRank":
        """The best approximation of at most this rank, with orthonormal rows in `a` (Eckart–Young).

        The result has exactly `rank` columns; where the matrix's own rank is smaller, the further columns of `b` are
        zero up to rounding, and `a` stays orthonormal as far as `in` allows.

        Formal guarantees: it is the truncation of a matrix that differs by rounding from `b @ a`, relative to
        `‖b‖·‖a‖`. Few columns of many come from an iteration, several times faster, only where a bound on all that
        it left out, with an estimate of its own rounding, says that nothing larger was missed.
        """
        if (rank + OVERSAMPLING) * FEW <= min(*self.b.shape, *self.a.shape):
            found = self._leading(rank)
            if found is not None:
                return found
        return self._by_svd(rank)

    def _by_svd(self, rank: int) -> "LowRank":
        """The plain way: every singular value of the product of the two triangular factors."""
        q_b, core_b = np.linalg.qr(self.b)
        q_a, core_a = np.linalg.qr(self.a.T)
        u, s, vt = np.linalg.svd(core_b @ core_a.T, full_matrices=False)
        return _fix_signs(_widened((q_b @ u[:, :rank]) * s[:rank], vt[:rank] @ q_a.T, rank))

    def _leading(self, rank: int) -> "LowRank | None":
        """`_by_svd` without a QR or SVD of R columns: iterate, take out what was found, bound the rest.

        None where the iteration does not settle to rounding, or where the rest may hold something larger.
        """
        precision = float(np.finfo(self.b.dtype).eps)
        found, residual = self.dominant(rank, ROUNDINGS * precision, STEPS)
        lengths = np.linalg.norm(found.b, axis=0)
        # Where the matrix has no further rank the smallest length is 0, and the rest is what rounding left.
        smallest = lengths.min(initial=np.inf) + ROUNDINGS * precision * lengths.max(initial=0.0)
        if not (residual <= ROUNDINGS * precision and 0 < smallest < np.inf):
            return None
        u = np.linalg.qr(found.b)[0]
        rest = LowRank((self.b - u @ (u.T @ self.b)) / smallest, self.a - (self.a @ found.a.T) @ found.a)
        return found if rest._is_contraction() else None

    def _is_contraction(self) -> bool:
        """Whether `b @ a` is bounded to have no singular value above 1; False says nothing.

        Its squared singular values are the eigenvalues of `X = (bᵀb)(a·aᵀ)`. They are at most their sum, which needs no
        further product, and their squares at most `‖X²‖`, which for R equal ones is only √R times too large.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large, or NaN, compares as no contraction
            gram_b, gram_a = self.b.T @ self.b, self.a @ self.a.T
            scale = float(np.linalg.norm(gram_b)) * float(np.linalg.norm(gram_a))
            rounding = float(np.finfo(gram_b.dtype).eps * np.sqrt(sum(self.b.shape + self.a.shape))) * scale
            if float(np.vdot(gram_b, gram_a)) + rounding <= 1:
                return True
            product = gram_b @ gram_a
            return float(np.linalg.norm(product @ product)) + 3 * rounding * scale <= 1

    def dominant(self, rank: int, tolerance: float = 1e-6, steps: int = ITERATIONS) -> tuple["LowRank", float]:
        """`truncate` by subspace iteration on the factored operator, and the residual that was reached.

        A step costs `O((out + in)·R·rank)`, without a QR of R columns. It stops when `‖b·a·v − s·u‖ ≤ tolerance·s₁` for
        every triple kept, or after so many steps (an even number): the residual, relative to s₁ and measured on the
        operator itself, says how far it came (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, §4.5 and §4.3).
        """
        columns = min(rank + OVERSAMPLING, *self.b.shape, *self.a.shape)
        # Any start will do that is not orthogonal to the answer; a keyed one keeps the result a function of the input.
        v = np.linalg.qr(_start(self.a.shape[1], columns).astype(self.a.dtype))[0]
        for step in range(1, steps + 1):
            u = np.linalg.qr(self.b @ (self.a @ v))[0]
            v, core = np.linalg.qr(self.a.T @ (self.b.T @ u))
            left, s, right = np.linalg.svd(core)
            kept_u, kept_v, kept_s = u @ right[:rank].T, v @ left[:, :rank], s[:rank]
            if step % CHECK_EVERY:
                continue
            missed = np.linalg.norm(self.b @ (self.a @ kept_v) - kept_u * kept_s, axis=0).max(initial=0.0)
            residual = float(missed / s[0]) if s[0] > 0 else 0.0
            if residual <= tolerance:
                break
        return _fix_signs(_widened(kept_u * kept_s, kept_v.T, rank)), residual

    def residual(self, rank: int) -> "LowRank":
        """What `truncate(rank)` leaves out, as factors."""
        return self.minus(self.truncate(rank))

    def merge(self, weight: Matrix, scaling: float = 1.0) -> Matrix:
        """`weight + scaling·b·a`, (out, in)."""
        return np.asarray(weight + scaling * (self.b @ self.a))


def weighted_sum(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """`Σ w_k·b_k·a_k`, exactly, by stacking: its rank is the sum of the terms' ranks. Terms may differ in rank."""
    if not terms:
        raise ValueError("a sum of no low-rank terms has no shape")
    return LowRank(
        np.concatenate([np.asarray(weight, term.b.dtype) * term.b for weight, term in terms], axis=1),
        np.concatenate([term.a for _, term in terms], axis=0),
    )


def refactor(b: Matrix, dtype: Any = np.float64) -> tuple[Matrix, Matrix]:
    """FedSVD's step for an orthonormal A (arXiv 2505.12805 §3): `b·a = new_b·(rotation·a)`, by the SVD of `b` alone.

    `b` is (out, r). Returns `new_b` (out, r), with orthogonal columns of falling norm, and `rotation` (r, r),
    orthogonal. Because A's rows are orthonormal, the singular vectors of the product are those of `b`, turned by A;
    so nodes need the r×r rotation and never the r×in factor.
    """
    q, core = np.linalg.qr(b.astype(dtype))
    u, s, vt = np.linalg.svd(core)
    new_b = (q @ u[:, : len(s)]) * s
    if new_b.shape[1] < b.shape[1]:  # fewer outputs than the rank: the last columns are zero
        new_b = np.pad(new_b, ((0, 0), (0, b.shape[1] - new_b.shape[1])))
    signs = _row_signs(vt)
    return new_b * signs, vt * signs[:, None]


def orthonormalize(b: Matrix, a: Matrix) -> tuple[Matrix, Matrix]:
    """The same product with orthonormal rows in `a`: `a = core·q`, so `b·a = (b·core)·q`. Needs r ≤ in."""
    if a.shape[0] > a.shape[1]:
        raise ValueError(f"A of shape {a.shape} cannot have orthonormal rows: its rank exceeds its inputs")
    q, core = np.linalg.qr(a.T.astype(np.float64))
    return b @ core.T, q.T


def _norm_of(gram_b: Matrix, gram_a: Matrix) -> float:
    """`‖b·a‖` from `bᵀb` and `a·aᵀ`."""
    return float(np.sqrt(max(0.0, float(np.vdot(gram_b, gram_a)))))


def _core(tall: Matrix) -> Matrix:
    """The R of a QR factorization, without its Q."""
    return np.asarray(np.linalg.qr(tall, mode="r"))


def _widened(b: Matrix, a: Matrix, rank: int) -> LowRank:
    """The product with exactly `rank` columns, zeros after its own."""
    more = rank - a.shape[0]
    return LowRank(np.pad(b, ((0, 0), (0, more))), np.pad(a, ((0, more), (0, 0))))


def _start(rows: int, columns: int) -> Matrix:
    return np.random.Generator(np.random.Philox(key=rows)).standard_normal((rows, columns))


def _row_signs(a: Matrix) -> Matrix:
    """±1 per row, such that the largest entry of each row times its sign is positive: an SVD is unique only so far."""
    largest = np.take_along_axis(a, np.abs(a).argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(largest < 0, -1.0, 1.0).astype(a.dtype)


def _fix_signs(product: LowRank) -> LowRank:
    signs = _row_signs(product.a)
    return LowRank(product.b * signs, product.a * signs[:, None])


def truncate_reference(dense: Matrix, rank: int) -> Matrix:
    """The dense way to `truncate`: SVD of the whole (out, in) matrix."""
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])


def refactor_reference(b: Matrix, a: Matrix) -> tuple[Matrix, Matrix]:
    """The published way to `refactor`: form `b @ a`, dense SVD, keep r directions. Returns (new_b, new_a)."""
    u, s, vt = np.linalg.svd(b @ a, full_matrices=False)
    rank = a.shape[0]
    return u[:, :rank] * s[:rank], vt[:rank]
