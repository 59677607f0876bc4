"""Rows that members of a cohort share: what a frozen layer gives for them is computed once, and repeated.

The probes of one batch all start from the same states (`prefix.py`), so the frozen projections that read those give each
probe the same numbers: with 16 probes a batch, a sixteenth of the arithmetic of that layer.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class SharedRows:
    """Watches linear layers for an input that is known to repeat rows. A layer that trains must not be among them."""

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        self.layers = list(layers)
        self._repeated: tuple[Tensor, Tensor, Tensor] | None = None
        for layer in self.layers:
            layer.forward = _Once(self, layer)  # type: ignore[method-assign, assignment]

    def remove(self) -> None:
        """Leave the layers as they were."""
        for layer in self.layers:
            del layer.forward

    @contextmanager
    def repeating(self, rows: Tensor, once: Tensor, places: Tensor) -> Iterator[None]:
        """Within it, a layer that reads the very tensor `rows`, which is `once[places]`, reads `once` instead."""
        self._repeated = rows, once, places
        try:
            yield
        finally:
            self._repeated = None

    def run(self, layer: nn.Linear, x: Tensor) -> Tensor:
        if self._repeated is not None and x is self._repeated[0]:
            _, once, places = self._repeated
            return type(layer).forward(layer, once)[places]
        return type(layer).forward(layer, x)


class _Once:
    """A layer's forward as an object, because a copy of a model copies objects with it, and closures not."""

    def __init__(self, owner: SharedRows, layer: nn.Linear) -> None:
        self.owner, self.layer = owner, layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.owner.run(self.layer, x)
