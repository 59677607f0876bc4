"""The adapter layout: the canonical, sorted list of trainable tensors and their place in one flat fp32 vector."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any, Literal, get_args

import numpy as np

from .errors import PayloadError

Role = Literal["A", "B", "frozen", "other"]
Flat = np.ndarray[tuple[int], np.dtype[np.float32]]

A_SUFFIX, B_SUFFIX, ROTATION_SUFFIX = ".lora_A.weight", ".lora_B.weight", ".rotation"
FROZEN_A_SUFFIX, FROZEN_B_SUFFIX = ".frozen_A.weight", ".frozen_B.weight"
RANK_AXIS = {A_SUFFIX: 0, ROTATION_SUFFIX: 0, FROZEN_A_SUFFIX: 0, B_SUFFIX: 1, FROZEN_B_SUFFIX: 1}
"""Along which axis a tensor of these names has the components of a rank."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an adapter: its name in peft's own format, its shape, and its role in `ΔW = s·B·A`.

    The role `frozen` is for factors that add to ΔW and that no node trains.
    """

    name: str
    shape: tuple[int, ...]
    role: Role

    @cached_property
    def size(self) -> int:
        return prod(self.shape)

    def at_rank(self, rank: int) -> "TensorSpec":
        """Its first `rank` components, where it has any; a tensor of fewer stays as it is."""
        axis = next((axis for suffix, axis in RANK_AXIS.items() if self.name.endswith(suffix)), None)
        if axis is None or len(self.shape) != 2 or (self.role == "other" and not self.name.endswith(ROTATION_SUFFIX)):
            return self
        shape = tuple(min(n, rank) if i == axis else n for i, n in enumerate(self.shape))
        return TensorSpec(self.name, shape, self.role)


@dataclass(frozen=True)
class Pair:
    """The two factors of one adapted module: `a` is (r, in), `b` is (out, r).

    `frozen` are the names of the factors beside them that nobody trains, where the layout has such.
    """

    module: str
    a: TensorSpec
    b: TensorSpec

    @property
    def frozen(self) -> tuple[str, str]:
        return self.module + FROZEN_B_SUFFIX, self.module + FROZEN_A_SUFFIX

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class AdapterLayout:
    """Which tensors an adapter has, in the order in which they lie in its flat vector.

    Tensors are sorted by name, each in C order, without gaps; offsets count fp32 values.
    """

    def __init__(self, tensors: Iterable[TensorSpec]) -> None:
        self.tensors = tuple(sorted(tensors, key=lambda t: t.name))
        names = [t.name for t in self.tensors]
        if len(set(names)) != len(names):
            raise ValueError(f"tensor names repeat in the layout: {sorted({n for n in names if names.count(n) > 1})}")

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Name ⇒ index of the tensor's first value in the flat vector."""
        offsets, position = {}, 0
        for tensor in self.tensors:
            offsets[tensor.name] = position
            position += tensor.size
        return offsets

    @cached_property
    def size(self) -> int:
        """Values in the flat vector."""
        return sum(t.size for t in self.tensors)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The LoRA factor pairs whose two tensors are both in this layout."""
        modules = (t.name.removesuffix(A_SUFFIX) for t in self.tensors if t.role == "A")
        return tuple(
            Pair(module, self.by_name[module + A_SUFFIX], self.by_name[module + B_SUFFIX])
            for module in modules
            if module + B_SUFFIX in self.by_name
        )

    @cached_property
    def rank(self) -> int:
        """The largest rank of its pairs; 0 without a pair."""
        return max((pair.rank for pair in self.pairs), default=0)

    def at_rank(self, rank: int) -> "AdapterLayout":
        """This layout for a node of this rank: every pair and rotation keeps its first `rank` components (0: all)."""
        return self if rank == 0 else _at_rank(self, rank)

    def frozen_at(self, rank: int) -> "AdapterLayout":
        """This layout with the first `rank` components of every frozen factor."""
        return AdapterLayout(t.at_rank(rank) if t.role == "frozen" else t for t in self.tensors)

    def with_frozen(self, rank: int) -> "AdapterLayout":
        """This layout and, beside each pair, frozen factors of this rank."""
        frozen = (
            spec
            for pair in self.pairs
            for spec in (
                TensorSpec(pair.frozen[0], (pair.b.shape[0], rank), "frozen"),
                TensorSpec(pair.frozen[1], (rank, pair.a.shape[1]), "frozen"),
            )
        )
        return AdapterLayout([*self.tensors, *frozen])

    def cut(self, flat: Flat, smaller: "AdapterLayout") -> Flat:
        """The leading part of each tensor that `smaller` has, as a vector over `smaller`."""
        if smaller == self:
            return flat.copy()
        tensors = self.split(flat)
        return smaller.join({t.name: leading(tensors[t.name], t.shape) for t in smaller.tensors})

    def pad(self, flat: Flat, smaller: "AdapterLayout") -> Flat:
        """The inverse of `cut`: a vector over this layout, zero beyond what `smaller` has."""
        if smaller == self:
            return flat.copy()
        whole: Flat = np.zeros(self.size, np.float32)
        tensors = self.split(whole)
        for name, values in smaller.split(flat).items():
            leading(tensors[name], values.shape)[...] = values
        return whole

    def put(self, flat: Flat, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Write tensors of this layout into `flat`, in place."""
        views = self.split(flat)
        for name, values in tensors.items():
            views[name][...] = values

    def select(self, roles: Collection[Role]) -> "AdapterLayout":
        """The layout of the tensors with these roles alone (offsets are counted anew)."""
        return _selected(self, frozenset(roles))

    def fragment(self, index: int, count: int) -> "AdapterLayout":
        """One of `count` parts, strided over the modules in order; the factors of a pair stay together."""
        return _fragment(self, index % count, count)

    @cached_property
    def modules(self) -> int:
        """How many modules it has: a pair is one, and each tensor outside of pairs."""
        return len({_module(t) for t in self.tensors})

    def with_rotations(self) -> "AdapterLayout":
        """This layout without its A factors, and an (r, r) rotation for each of them: FedSVD's downlink."""
        rotations = (TensorSpec(p.module + ROTATION_SUFFIX, (p.rank, p.rank), "other") for p in self.pairs)
        return AdapterLayout([*(t for t in self.tensors if t.role != "A"), *rotations])

    def split(self, flat: Flat) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """Views of `flat` (fp32, (size,)) by tensor name, in shape. Raises PayloadError on a wrong length."""
        if flat.shape != (self.size,):
            raise PayloadError(f"a flat vector of {flat.shape} does not fit a layout of {self.size} values")
        return {
            t.name: flat[first : first + t.size].reshape(t.shape)
            for t, first in zip(self.tensors, self.offsets.values(), strict=True)
        }

    def view(self, flat: Flat, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The view of one tensor of `flat` alone. Raises KeyError for a name outside the layout."""
        first, spec = self.offsets[name], self.by_name[name]
        return flat[first : first + spec.size].reshape(spec.shape)

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        return {tensor.name: tensor for tensor in self.tensors}

    def join(self, tensors: Mapping[str, np.ndarray[Any, Any]]) -> Flat:
        """One flat fp32 vector from tensors by name; names outside the layout are ignored."""
        flat = np.empty(self.size, np.float32)
        for name, view in self.split(flat).items():
            view[...] = tensors[name]
        return flat

    def to_json(self) -> str:
        return json.dumps([{"name": t.name, "shape": list(t.shape), "role": t.role} for t in self.tensors])

    @classmethod
    def from_json(cls, text: str) -> "AdapterLayout":
        """Raises PayloadError where the text is not a layout."""
        try:
            rows = json.loads(text)
            tensors = [TensorSpec(str(r["name"]), tuple(int(n) for n in r["shape"]), r["role"]) for r in rows]
            if any(t.role not in get_args(Role) or min(t.shape, default=1) < 0 for t in tensors):
                raise ValueError("a role or a shape is impossible")
            return cls(tensors)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise PayloadError(f"not an adapter layout: {error}") from error

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: two sides with the same digest agree on every offset."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, AdapterLayout) and self.tensors == other.tensors)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"AdapterLayout({len(self.tensors)} tensors, {self.size} values)"


# Layouts within layouts are asked for at every assignment: each is made once, with its offsets.


@lru_cache(maxsize=256)
def _selected(layout: AdapterLayout, roles: frozenset[Role]) -> AdapterLayout:
    return AdapterLayout(t for t in layout.tensors if t.role in roles)


@lru_cache(maxsize=256)
def _at_rank(layout: AdapterLayout, rank: int) -> AdapterLayout:
    return AdapterLayout(t if t.role == "frozen" else t.at_rank(rank) for t in layout.tensors)


@lru_cache(maxsize=256)
def _fragment(layout: AdapterLayout, index: int, count: int) -> AdapterLayout:
    own = set(sorted({_module(t) for t in layout.tensors})[index::count])
    return AdapterLayout(t for t in layout.tensors if _module(t) in own)


def _module(tensor: TensorSpec) -> str:
    return tensor.name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX)


def leading(
    tensor: np.ndarray[Any, np.dtype[np.float32]], shape: tuple[int, ...]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The view of the first `shape` values of a tensor along each of its axes."""
    index: Any = (*(slice(n) for n in shape), ...)  # the dots make a view of a scalar, too
    view: np.ndarray[Any, np.dtype[np.float32]] = tensor[index]
    return view
