"""Products with stacked low-rank factors where the members of a cohort have different numbers of rows.

`bmm` wants as many rows of each. Padding them to the longest would cost more than it saves, so each member's product is a
matmul of its own, written straight to its place.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def add_products(base: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: Sequence[int]) -> Tensor:
    """base + x_m·A_mᵀ·B_mᵀ for each member m, whose rows are the next `sizes[m]`.

    base (rows, out); x (rows, in); A (C, r, in) or one for all, (r, in); B (C, out, r) or (out, r).
    """
    result: Tensor = _AddProducts.apply(base, x, a, b, sizes)  # type: ignore[no-untyped-call]
    return result


class _AddProducts(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd hands them over by position
        ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, sizes: Sequence[int]
    ) -> Tensor:
        inner, result = x.new_empty(len(x), a.shape[-2]), torch.empty_like(base)
        for rows, own_a, own_b in _members(sizes, a, b):
            torch.mm(x[rows], own_a.mT, out=inner[rows])
            torch.addmm(base[rows], inner[rows], own_b.mT, out=result[rows])
        ctx.save_for_backward(x, a, b, inner)
        ctx.sizes = sizes
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, inner = ctx.saved_tensors
        dx, da, db = (
            torch.zeros_like(own) if needed else None
            for own, needed in zip((x, a, b), ctx.needs_input_grad[1:], strict=False)
        )
        for member, (rows, own_a, own_b) in enumerate(_members(ctx.sizes, a, b)):
            if db is not None:
                _of(db, member).addmm_(gradient[rows].mT, inner[rows])
            if da is None and dx is None:
                continue
            inside = gradient[rows] @ own_b
            if da is not None:
                _of(da, member).addmm_(inside.mT, x[rows])
            if dx is not None:
                torch.mm(inside, own_a, out=dx[rows])
        return gradient, dx, da, db, None


def _members(sizes: Sequence[int], a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each member's rows and factors."""
    first = 0
    for member, size in enumerate(sizes):
        yield slice(first, first + size), _of(a, member), _of(b, member)
        first += size


def _of(factor: Tensor, member: int) -> Tensor:
    """A member's own factor, or the one that all share."""
    return factor[member] if factor.dim() == 3 else factor
