"""Ragged products and their gradients are those of one member after another."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedapt.kernels.ragged import add_products


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 3), st.booleans(), st.booleans())
def test_products_are_the_members_own(sizes: list[int], rank: int, own_a: bool, own_b: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    base, x = draw(sum(sizes), 5), draw(sum(sizes), 3)
    a, b = draw(*[len(sizes)] * own_a, rank, 3), draw(*[len(sizes)] * own_b, 5, rank)
    parts = zip(
        torch.split(base, sizes), torch.split(x, sizes), a if own_a else [a] * 9, b if own_b else [b] * 9, strict=False
    )
    expected = torch.cat([rows + (own @ first.mT) @ second.mT for rows, own, first, second in parts])
    actual = add_products(base, x, a, b, sizes)
    assert torch.allclose(actual, expected)
    weights = torch.randn(actual.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((y * weights).sum(), [base, x, a, b]) for y in (actual, expected)]
    assert all(torch.allclose(*pair) for pair in zip(*gradients, strict=True))
