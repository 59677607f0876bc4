"""Rows that members share: what a frozen layer gives for them is computed once, and is what it would have been."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedapt.client.adapted import AdaptedModel
from fedapt.client.shared_rows import SharedRows
from fedapt.client.tasks import Examples
from fedapt.client.zeroth import Ask, Probing
from fedapt.kernels.cohort import Batched, Forward, Looped
from fedapt.kernels.directions import Directions

from .test_prefix import bert, examples_of, llama


class Counting(nn.Linear):
    """How many rows it was given, call by call."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [*getattr(self, "seen", []), len(x)]
        return super().forward(x)


@given(st.integers(0, 3), st.integers(0, 6), st.integers(1, 4), st.integers(0, 2**32))
def test_a_layer_gives_what_it_gives_row_by_row(once: int, repeats: int, width: int, seed: int) -> None:
    torch.manual_seed(seed % 2**32)
    layer, rows = Counting(width, 3), torch.randn(once, 2, width)
    places = torch.randint(max(1, once), (repeats if once else 0,))
    repeated = rows[places]
    expected = layer(repeated)
    shared = SharedRows([layer])
    with shared.repeating(repeated, rows, places):
        torch.testing.assert_close(layer(repeated), expected)
        other = repeated.clone()
        torch.testing.assert_close(layer(other), expected)
    layer(repeated)
    assert layer.seen == [len(places), once, len(places), len(places)]
    shared.remove()
    assert "forward" not in vars(layer)


def slopes(adapted: AdaptedModel, forward: Forward, examples: Examples, sides: int = 1) -> list[Any]:
    random = np.random.default_rng(1)
    start = adapted.read() + random.normal(0, 0.1, adapted.layout.size).astype(np.float32)
    asks = [
        Ask(np.arange(7), Directions(5, 1, np.arange(9))),
        Ask(np.array([8]), Directions(5, 1, np.arange(9, 10))),
        Ask(np.arange(9, 20), Directions(5, 1, np.arange(16))),
    ]
    return Probing(adapted, forward, adapted.layout, sides).slopes(examples, start, asks, 1e-2)


@pytest.mark.parametrize("make", [lambda: bert([2]), lambda: bert([1, 2]), llama])
@pytest.mark.parametrize("sides", [1, 2])
def test_probes_read_the_prefix_once_and_give_the_slopes_of_the_loop(
    make: Any, sides: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make()
    examples = examples_of(adapted)
    saved: list[tuple[int, int]] = []
    run = SharedRows.run

    def counted(self: SharedRows, layer: nn.Linear, x: Tensor) -> Tensor:
        if self._repeated is not None and x is self._repeated[0]:
            saved.append((len(self._repeated[1]), len(x)))
        return run(self, layer, x)

    monkeypatch.setattr(SharedRows, "run", counted)
    names = list(adapted.parameter_names.values())
    together = slopes(adapted, Batched(adapted.model, names), examples, sides)
    assert bool(saved) == (make is not llama), "Llama norms its states before it projects them"
    assert all(once < rows for once, rows in saved)
    saved.clear()
    alone = slopes(adapted, Looped(adapted.model), examples, sides)
    assert not saved
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-4)
