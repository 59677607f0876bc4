"""The adapter layout: the canonical, sorted list of trainable tensors and their place in one flat fp32 vector."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np

from .errors import PayloadError

Role = Literal["A", "B", "other"]
Flat = np.ndarray[tuple[int], np.dtype[np.float32]]

A_SUFFIX, B_SUFFIX, ROTATION_SUFFIX = ".lora_A.weight", ".lora_B.weight", ".rotation"


@dataclass(frozen=True)
class TensorSpec:
    """One trainable tensor: its name in peft's own format, its shape, and its role in `ΔW = s·B·A`."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Pair:
    """The two factors of one adapted module: `a` is (r, in), `b` is (out, r)."""

    module: str
    a: TensorSpec
    b: TensorSpec

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
        by_name = {t.name: t for t in self.tensors}
        modules = (t.name.removesuffix(A_SUFFIX) for t in self.tensors if t.role == "A")
        return tuple(
            Pair(module, by_name[module + A_SUFFIX], by_name[module + B_SUFFIX])
            for module in modules
            if module + B_SUFFIX in by_name
        )

    def select(self, roles: Collection[Role]) -> "AdapterLayout":
        """The layout of the tensors with these roles alone (offsets are counted anew)."""
        return AdapterLayout(t for t in self.tensors if t.role in roles)

    def with_rotations(self) -> "AdapterLayout":
        """This layout without its A factors, and an (r, r) rotation for each of them: FedSVD's downlink."""
        rotations = (TensorSpec(p.module + ROTATION_SUFFIX, (p.rank, p.rank), "other") for p in self.pairs)
        return AdapterLayout([*self.select({"B", "other"}).tensors, *rotations])

    def split(self, flat: Flat) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """Views of `flat` (fp32, (size,)) by tensor name, in shape. Raises PayloadError on a wrong length."""
        if flat.shape != (self.size,):
            raise PayloadError(f"a flat vector of {flat.shape} does not fit a layout of {self.size} values")
        return {
            t.name: flat[self.offsets[t.name] : self.offsets[t.name] + t.size].reshape(t.shape) for t in self.tensors
        }

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
            if any(t.role not in ("A", "B", "other") or min(t.shape, default=1) < 0 for t in tensors):
                raise ValueError("a role or a shape is impossible")
            return cls(tensors)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise PayloadError(f"not an adapter layout: {error}") from error

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: two sides with the same digest agree on every offset."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterLayout) and self.tensors == other.tensors

    def __hash__(self) -> int:
        return hash(self.tensors)

    def __repr__(self) -> str:
        return f"AdapterLayout({len(self.tensors)} tensors, {self.size} values)"
