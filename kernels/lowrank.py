"""Low-rank algebra: sums of products `B·A` that stay factored, truncated by QR and a small SVD.

No `out × in` matrix is ever formed: with R columns in all, everything is `O((out + in)·R²)` (NumPy and LAPACK, no
torch, because the server runs this). The plain references at the end of the file form the dense matrix; the tests
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
        """Frobenius norm of `b @ a`, from the R×R cores of the two QR factorizations."""
        _, core_b = np.linalg.qr(self.b.astype(np.float64))
        _, core_a = np.linalg.qr(self.a.T.astype(np.float64))
        return float(np.linalg.norm(core_b @ core_a.T))

    def minus(self, other: "LowRank") -> "LowRank":
        return weighted_sum([(1.0, self), (-1.0, other)])

    def truncate(self, rank: int) -> "LowRank":
        """The best approximation of at most this rank, with orthonormal rows in `a` (Eckart–Young).

        The result has exactly `rank` columns; where the matrix's own rank is smaller, the further columns of `b` are
        zero up to rounding, and `a` stays orthonormal as far as `in` allows.
        """
        q_b, core_b = np.linalg.qr(self.b)
        q_a, core_a = np.linalg.qr(self.a.T)
        u, s, vt = np.linalg.svd(core_b @ core_a.T, full_matrices=False)
        kept = min(rank, len(s))
        b = np.zeros((self.b.shape[0], rank), self.b.dtype)
        a = np.zeros((rank, self.a.shape[1]), self.a.dtype)
        b[:, :kept] = (q_b @ u[:, :kept]) * s[:kept]
        a[:kept] = vt[:kept] @ q_a.T
        return _fix_signs(LowRank(b, a))

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
