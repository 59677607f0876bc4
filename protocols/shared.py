"""What both sides know of a run's adapter: what travels in a round, and how the whole is rebuilt from it.

The server's state *is* the vector that nodes receive: all tensors that have changed since the start, in their
smallest form. What never changes (FFA's A), changes by a rotation alone (FedSVD's A) or is drawn by key (the A's of
`refresh`) is rebuilt from the start, which every node holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import SpecError
from .layout import A_SUFFIX, B_SUFFIX, ROTATION_SUFFIX, AdapterLayout, Flat, Pair, leading
from .recipes import Recipe
from .spec import Recipe as Settings

Matrix = np.ndarray[Any, np.dtype[np.float32]]


def works_on_factors(recipe: Recipe) -> bool:
    """Whether it needs the two factors of each ΔW = B·A; the others average any tensor, or move it by codes."""
    return not recipe.zeroth and (recipe.averages != "tensors" or recipe.residual != "lost")


def require_pairs(recipe: Recipe, layout: AdapterLayout, where: str) -> None:
    """Raise SpecError where the recipe works on ΔW = B·A, and a LoRA tensor is in no pair or there is no pair at all.

    Such a tensor would be averaged for itself, and the aggregation error, which is of the pairs, would not show it.
    `where` is what holds the tensors, for the message.
    """
    if not works_on_factors(recipe):
        return
    paired = {factor.name for pair in layout.pairs for factor in (pair.a, pair.b)}
    alone = [t for t in layout.tensors if "lora_" in t.name and t.name not in paired]
    if layout.pairs and not alone:
        return
    named = [f"{t.name} of shape {t.shape}" for t in alone or layout.tensors]
    if alone:
        problem = f"{named[0]} is in no pair of plain LoRA factors"
    else:
        problem = ", such as ".join([f"no pair of plain LoRA factors among its {len(named)} tensors", *named[:1]])
    raise SpecError(
        f'{where}: {problem}, and recipe "{recipe.name}" works on ΔW = B·A. A pair is MODULE{A_SUFFIX} of (rank, inputs) '
        f"and MODULE{B_SUFFIX} of (outputs, rank), both trainable and without DoRA's magnitudes: peft's own names, as in "
        'get_peft_model_state_dict(model). Nearest legal: "fedit", the mean of what is trained.'
    )


@dataclass(frozen=True)
class SharedAdapter:
    """The recipe and its settings, the layout, and the start: the same at every node and at the server.

    `start` is fp32 over `layout`.
    """

    recipe: Recipe
    settings: Settings
    layout: AdapterLayout
    start: Flat

    def __post_init__(self) -> None:
        if self.settings.fragments > max(1, self.layout.modules):
            raise SpecError(
                f"recipe.fragments = {self.settings.fragments}: the adapter has {self.layout.modules} modules. "
                f"Nearest legal: {max(1, self.layout.modules)}"
            )

    def received(self, round_: int, rank: int = 0) -> AdapterLayout:
        """What a node of this rank (0: the adapter's own) receives for a round, counted from 1."""
        return self.recipe.downlink(self.layout, round_, self.settings).at_rank(rank)

    def delivered(self, round_: int, rank: int = 0) -> AdapterLayout:
        """What of it the server sends: all, or where fragments stream, the one that the round before has moved."""
        return self._fragment(self.received(round_, rank), round_ - 1)

    def trained(self, round_: int) -> AdapterLayout:
        """What a node trains in a round."""
        return self.recipe.trained(self.layout, round_)

    def sent(self, round_: int, rank: int = 0) -> AdapterLayout:
        """What of it a node of this rank sends."""
        return self._fragment(self.trained(round_), round_).at_rank(rank)

    def stepped(self, round_: int) -> AdapterLayout:
        """What the server's step of a round moves."""
        return self._fragment(self.recipe.stepped(self.layout, round_), round_)

    def initial_state(self) -> Flat:
        """The state that round 1 starts from: the start itself, every rotation the identity."""
        tensors = self.layout.split(self.start)
        for pair in self.layout.pairs:
            tensors[pair.module + ROTATION_SUFFIX] = np.eye(pair.rank, dtype=np.float32)
        received = self.received(1)
        return received.join({t.name: leading(tensors[t.name], t.shape) for t in received.tensors})

    def whole(self, state: Flat, round_: int) -> Flat:
        """The whole adapter, fp32, (layout.size,), that the state at the start of a round stands for."""
        received = self.received(round_).split(state)
        tensors = self.layout.split(self.start.copy())
        for name, view in tensors.items():
            if name in received:
                leading(view, received[name].shape)[...] = received[name]
        for pair in self.layout.pairs:
            if self.recipe.refreshes:
                self._turn_page(pair, tensors, round_)
        for module, rotation in self.rotations(state, round_).items():
            tensors[module + A_SUFFIX][...] = rotation @ tensors[module + A_SUFFIX]
        return self.layout.join(tensors)

    def rotations(self, state: Flat, round_: int) -> dict[str, Matrix]:
        """Module ⇒ the (r, r) rotation of its A since the start; empty where no basis turns."""
        if not self.recipe.refactorizes:
            return {}
        received = self.received(round_).split(state)
        return {pair.module: received[pair.module + ROTATION_SUFFIX] for pair in self.layout.pairs}

    def _fragment(self, layout: AdapterLayout, round_: int) -> AdapterLayout:
        """The fragment whose turn it is in a round; nothing in round 0. The whole where none stream."""
        if not self.recipe.streams:
            return layout
        return layout.fragment(round_ - 1, self.settings.fragments) if round_ > 0 else AdapterLayout([])

    def _turn_page(self, pair: Pair, tensors: Mapping[str, Matrix], round_: int) -> None:
        """`refresh`: the start holds the A of every fresh start, the first one as A, the later ones as the frozen A."""
        frozen = tensors[pair.frozen[1]]
        drawn = np.concatenate([tensors[pair.a.name], frozen])
        first = self.recipe.refreshed(self.layout, round_, self.settings) * pair.rank
        tensors[pair.a.name][...] = drawn[first : first + pair.rank]
        frozen[...] = drawn[: len(frozen)]
