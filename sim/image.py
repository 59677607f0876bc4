"""A client as one block of bytes that processes share: the base and the data stand in it once for all of them.

Pickle's fifth protocol leaves the contents of arrays out of its stream; tensors go the same way, as arrays. What is left
of a client is small and each process has its own; the contents are looked at in place, and nobody writes to them.
"""

import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..client.client import Client
from ..client.prefix import FrozenBlocks, PrefixStates
from ..protocols.errors import ModelError

ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector. Where in a line a matrix begins decides which of its entries a matmul
sums first: each array stands in the block as it stood in its own memory, so that the copy computes the same bits."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Image:
    """A client without the contents of its arrays, and where in the block each of them stands (bytes: first, last)."""

    skeleton: bytes
    places: Sequence[tuple[int, int]]

    def client(self, block: Bytes) -> Client:
        """The client, its frozen tensors and its data in `block`, its adapter its own.

        `block` is uint8, may be read-only, and begins with a cache line: anywhere else, sums are rounded otherwise.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            client: Client = pickle.loads(self.skeleton, buffers=[block[first:last] for first, last in self.places])
        for parameter in client.adapted.parameters.values():
            parameter.data = parameter.data.clone()
        return client


def image(client: Client, allocate: Callable[[int], Bytes]) -> tuple[Image, Bytes]:
    """The image of a client and its block, which `allocate` gives for a number of bytes, beginning with a cache line.

    The client's own frozen parameters move into the block too, so that this process keeps no copy of them.
    Raises ModelError for a model that cannot be copied to another process.
    """
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    try:
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(client)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ModelError(f"the model cannot be copied to other processes ({error}); run it with --workers 1") from error
    contents = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
    places = _places(contents)
    block = allocate(max((last for _, last in places), default=1))
    for (first, last), content in zip(places, contents, strict=True):
        block[first:last] = content
    found = Image(stream.getvalue(), places)
    _move(client.adapted.model, found.client(block).adapted.model)
    return found, block


def aligned(size: int) -> Bytes:
    """`size` zeros that begin with a cache line."""
    room = np.zeros(size + ALIGNMENT, np.uint8)
    first = -room.ctypes.data % ALIGNMENT
    return room[first : first + size]


def _places(contents: Sequence[Bytes]) -> list[tuple[int, int]]:
    """Where each of the contents goes, one after another: as far into a cache line as it is now."""
    places, end = [], 0
    for content in contents:
        first = -(-end // ALIGNMENT) * ALIGNMENT + content.ctypes.data % ALIGNMENT
        end = first + content.nbytes
        places.append((first, end))
    return places


class _Pickler(pickle.Pickler):
    """Tensors as arrays; of what the frozen blocks give, nothing: each process computes what it needs."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) in (Tensor, nn.Parameter):
            own = value.detach().cpu().contiguous()
            array = own.reshape(-1).view(torch.uint8).numpy()
            return _tensor, (array, own.dtype, tuple(own.shape), type(value) is nn.Parameter, value.requires_grad)
        if isinstance(value, PrefixStates):
            return _prefix, (value._searched, value._blocks)
        return NotImplemented


def _prefix(searched: bool, blocks: FrozenBlocks | None) -> PrefixStates:
    states = PrefixStates()
    states._searched, states._blocks = searched, blocks
    return states


def _tensor(
    array: Bytes, dtype: torch.dtype, shape: tuple[int, ...], is_parameter: bool, requires_grad: bool
) -> Tensor:
    value = torch.from_numpy(array).view(dtype).view(shape)
    return nn.Parameter(value, requires_grad) if is_parameter else value.requires_grad_(requires_grad)


def _move(model: nn.Module, shared: nn.Module) -> None:
    """Point the frozen parameters of a model on the CPU at those of its copy in the block."""
    for own, other in zip(model.parameters(), shared.parameters(), strict=True):
        if not own.requires_grad and own.device.type == "cpu":
            own.data = other.data
