"""The frozen prefix: blocks below the lowest one that trains give an example the same states in every step and round.

They are computed once an example and kept, and the model then starts from them: with adapters in the last two of six
blocks a step costs a third. What is kept is bounded; data that does not fit is run from its tokens, to the same
numbers up to rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.blocks import stacked_blocks
from ..kernels.cohort import agree, with_gradients
from .shared_rows import SharedRows
from .tasks import Examples, Indices, Task

PREFIX = "prefix"
"""The model's keyword argument that stands for the output of its frozen blocks."""

PREFIX_BYTES = 2**30
"""States kept of one set of examples; a larger set is not kept at all."""

ROWS, STRIDE = 32, 8
"""States are computed in batches of one number of rows, of a length that is a multiple: in a batch of one shape the
matmuls give a row the same bits whatever stands beside it, so they do not depend on what else was asked for."""


class _Reached(Exception):  # noqa: N818  (no error: it ends a forward whose rest nobody needs)
    def __init__(self, states: Tensor) -> None:
        self.states = states


class FrozenBlocks:
    """The leading blocks of a model with nothing to train in or before them; the model then takes PREFIX.

    PREFIX is (rows, length, width), what the last of `blocks` gives; without it the model runs as before. `following` is
    the block behind them, if there is one: it reads PREFIX.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], following: nn.Module | None = None) -> None:
        self.model, self.blocks = model, list(blocks)
        self.shared = SharedRows([] if following is None else _frozen_layers(following))
        self._given: Tensor | None = None
        self._stops = False
        self._hooks = (
            model.register_forward_pre_hook(self._take, with_kwargs=True),
            model.register_forward_hook(self._forget, always_call=True),
        )
        for block in self.blocks:
            block.forward = _Skippable(self, block)

    def remove(self) -> None:
        """Leave the model as it was."""
        self.shared.remove()
        for hook in self._hooks:
            hook.remove()
        for block in self.blocks:
            del block.forward

    @torch.no_grad()
    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output of the last frozen block, (rows, length, width); the rest of the model does not run."""
        self._stops = True
        try:
            self.model(**inputs)
        except _Reached as reached:
            return reached.states
        finally:
            self._stops = False
        raise AssertionError("a forward did not pass the frozen blocks that it passed before")

    def run(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A frozen block's forward: its own, or what is given in its place."""
        if self._given is not None:
            return self._given
        output = type(block).forward(block, *args, **kwargs)
        if self._stops and block is self.blocks[-1]:
            raise _Reached(output)
        return output

    def _take(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._given = kwargs.get(PREFIX)
        return args, {key: value for key, value in kwargs.items() if key != PREFIX}

    def _forget(self, *_: Any) -> None:
        self._given = None


class _Skippable:
    """A block's forward as an object, because a copy of a model copies objects with it, and closures not."""

    def __init__(self, owner: FrozenBlocks, block: nn.Module) -> None:
        self.owner, self.block = owner, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner.run(self.block, *args, **kwargs)


@torch.enable_grad()
def frozen_blocks(model: nn.Module, inputs: Mapping[str, Tensor]) -> FrozenBlocks | None:
    """The model's frozen blocks, ready to be skipped; None where the first block trains or skipping is not safe.

    `inputs` are two or more rows of real data: what depends on a trained tensor is seen from the graph, and whether
    skipping gives the same logits and gradients is tried.
    """
    blocks = stacked_blocks(model)
    frozen = 0
    with _outputs(blocks) as outputs:
        expected = model(**inputs).logits
    while frozen < len(outputs) and _is_constant(outputs[frozen]):
        frozen += 1
    if frozen == 0 or len(outputs) != len(blocks):
        return None
    found = FrozenBlocks(model, blocks[:frozen], blocks[frozen] if frozen < len(blocks) else None)
    actual = model(**inputs, **{PREFIX: found.states(inputs)}).logits
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if agree(with_gradients(actual, trained), with_gradients(expected, trained)):
        return found
    found.remove()
    return None


@dataclass
class _Pool:
    """The states of one set of examples: those of example i are rows `first[i] … first[i + 1] − 1` of `states`."""

    first: Indices
    states: Tensor
    known: np.ndarray[Any, np.dtype[np.bool_]]


class PrefixStates:
    """What the frozen blocks of one model give for the examples that were asked for, within PREFIX_BYTES a set."""

    def __init__(self) -> None:
        self._searched = False
        self._blocks: FrozenBlocks | None = None
        self._pools: WeakKeyDictionary[Examples, dict[int, _Pool | None]] = WeakKeyDictionary()

    def share(self, other: "PrefixStates") -> None:
        """Use, and add to, the states that another model has computed: one with the same base and the same task."""
        self._pools = other._pools

    def fill(self, model: nn.Module, task: Task, examples: Examples, indices: Indices) -> None:
        """Compute what is not there yet of `indices`."""
        pool = self._pool(model, task, examples)
        if pool is None or self._blocks is None or pool.known[indices].all():
            return
        missing = np.unique(indices[~pool.known[indices]])
        lengths = np.minimum(-(-examples.lengths[missing] // STRIDE) * STRIDE, examples.lengths.max())
        for length in np.unique(lengths):
            alike = missing[lengths == length]
            for start in range(0, len(alike), ROWS):
                own = alike[start : start + ROWS]
                rows = np.concatenate([own, np.repeat(own[:1], ROWS - len(own))])
                states = self._blocks.states(_on(model, _fixed(task, examples, rows, int(length))))
                for index, values in zip(own, states, strict=False):
                    first, last = pool.first[index], pool.first[index + 1]
                    pool.states[first:last] = values[: last - first]
        pool.known[missing] = True

    def gather(self, examples: Examples, members: Sequence[Indices], shape: tuple[int, int]) -> Tensor | None:
        """PREFIX of a batch, (C·rows, length, width), zero where it is padding; None where nothing is kept.

        `members[m]` are the indices of member m's rows, filled before; `shape` is (rows, length) of each member.
        """
        pool = None if self._blocks is None else self._pools.get(examples, {}).get(len(self._blocks.blocks))
        if pool is None:
            return None
        rows, length = shape
        nothing = len(pool.states) - 1  # the last row is zero
        places = np.full((len(members), rows, length), nothing)
        for member, own in enumerate(members):
            positions = pool.first[own][:, None] + np.arange(length)
            places[member, : len(own)] = np.where(positions < pool.first[own + 1][:, None], positions, nothing)
        flat = torch.from_numpy(places.ravel()).to(pool.states.device)
        return pool.states[flat].view(len(members) * rows, length, -1)

    def repeating(
        self, inputs: Mapping[str, Tensor], once: Mapping[str, Tensor], places: Tensor
    ) -> AbstractContextManager[None]:
        """Within it, the model is run on `inputs` that are `once[places]`, row by row: PREFIX is projected once."""
        if self._blocks is None or PREFIX not in inputs:
            return nullcontext()
        return self._blocks.shared.repeating(inputs[PREFIX], once[PREFIX], places)

    def _pool(self, model: nn.Module, task: Task, examples: Examples) -> _Pool | None:
        """Where the states of a set of examples go; None where they are not kept."""
        if not examples.inputs or examples.inputs[0].ndim != 1:
            return None
        probe = [np.arange(min(2, len(examples)))]
        if not self._searched:
            self._searched = True
            self._blocks = frozen_blocks(model, _on(model, task.collate(examples, probe).inputs))
        if self._blocks is None:
            return None
        pools, depth = self._pools.setdefault(examples, {}), len(self._blocks.blocks)
        if depth not in pools:
            pools[depth] = _room(examples, self._blocks.states(_on(model, task.collate(examples, probe).inputs)))
        return pools[depth]


def _room(examples: Examples, like: Tensor) -> _Pool | None:
    first = np.concatenate([[0], np.cumsum(examples.lengths)])
    if first[-1] * like.shape[-1] * like.element_size() > PREFIX_BYTES:
        return None
    states = torch.empty((int(first[-1]) + 1, like.shape[-1]), dtype=like.dtype, device=like.device)
    states[-1] = 0
    return _Pool(first, states, np.zeros(len(examples), np.bool_))


def _fixed(task: Task, examples: Examples, rows: Indices, length: int) -> dict[str, Tensor]:
    inputs = task.collate(examples, [rows]).inputs
    return {key: functional.pad(value, (0, length - value.shape[1])) for key, value in inputs.items()}


def _on(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in inputs.items()}


def _frozen_layers(block: nn.Module) -> Iterator[nn.Linear]:
    for layer in block.modules():
        if type(layer) is nn.Linear and not any(parameter.requires_grad for parameter in layer.parameters()):
            yield layer


@contextmanager
def _outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Collects what the blocks give, in the order of their calls."""
    outputs: list[Any] = []
    hooks = [block.register_forward_hook(lambda _, args, output: outputs.append(output)) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _is_constant(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() == 3 and not output.requires_grad
