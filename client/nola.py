"""NOLA (Koohpayegani et al., arXiv 2310.02556): LoRA whose factors are sums of random bases; the coefficients are trained.

A = Σ_i a_i·A_i and B = Σ_j b_j·B_j (§3), and a node sends the a_i and b_j alone: as many numbers as there are bases,
whatever the rank and the size of the layer. The bases are Philox signs, a function of the run's key, the module's name
and the index alone: every node computes the same ones, bit for bit, and they are in no layout, message or saved file.

`peft` has no NOLA. As with bottlenecks, such a model is a PeftModel around a base that already holds the sums, and
the adapter_config.json says `"peft_type": "NOLA"`, which `peft` refuses. `as_lora` makes a plain LoRA of it, once it
is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..protocols.keys import derive
from ..protocols.philox import signs

PREFIX = ".nola."
"""What the names of the coefficients hold, and no other name does."""


class Combination(nn.Module):
    """The change of one layer: `scaling·B·A·x`, with A (rank, in) and B (out, rank) the sums of their bases.

    `a` and `b` are the coefficients, (bases,) each. The bases have entries of ±1/√bases: with coefficients as LoRA's
    A has entries, the sum has the variance of LoRA's A, and a step of the coefficients moves a factor as far as the
    same step of LoRA would. They are kept as int8, so they take (in + out)·rank·bases bytes.
    """

    def __init__(self, shape: tuple[int, int], rank: int, bases: int, scaling: float, key: int) -> None:
        super().__init__()
        (out, into), self.scaling = shape, scaling
        self.a, self.b = nn.Parameter(torch.zeros(bases)), nn.Parameter(torch.zeros(bases))
        for stream, (name, size) in enumerate((("signs_a", (rank, into)), ("signs_b", (out, rank)))):
            own = torch.from_numpy(signs(key, bases, size[0] * size[1], stream)).view(bases, *size)
            self.register_buffer(name, own, persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank), in the precision of the coefficients."""
        return _sum(self.a, self.get_buffer("signs_a")), _sum(self.b, self.get_buffer("signs_b"))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.factors()
        step: Tensor = self.scaling * (x.to(a.dtype) @ a.mT @ b.mT)
        return step


def _sum(coefficients: Tensor, bases: Tensor) -> Tensor:
    """`Σ_i coefficients_i·bases_i/√k` of k bases."""
    total = coefficients @ bases.flatten(1).to(coefficients.dtype)
    scaled: Tensor = total.view(bases.shape[1:]) / len(bases) ** 0.5
    return scaled


class Nola(nn.Module):
    """A frozen linear layer and, beside it, its change."""

    def __init__(self, base_layer: nn.Linear | Conv1D, change: Combination) -> None:
        super().__init__()
        self.base_layer, self.nola = base_layer, change

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        step: Tensor = self.nola(x)
        return y + step.to(y.dtype)


@dataclass
class NolaConfig(LoraConfig):  # type: ignore[misc]
    """peft's config for a base with sums of `bases` bases beside the layers `beside`; no layer of it gets factors.

    `r` and `lora_alpha` are those of the sums, `key` is what the bases are drawn by.
    """

    bases: int = 64
    key: int = 0
    beside: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.target_modules = DUMMY_TARGET_MODULES
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """Only what a reader of the folder needs."""
        kept = ("task_type", "base_model_name_or_path", "modules_to_save", "r", "lora_alpha", "bases", "key", "beside")
        config = super().to_dict()
        return {"peft_type": "NOLA", **{key: config[key] for key in kept}}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "NolaConfig":
        """The config of a folder. Raises KeyError where it lacks a setting."""
        keys = ("task_type", "modules_to_save", "r", "lora_alpha", "bases", "key", "beside")
        return cls(**{key: saved[key] for key in keys})

    def combination(self, name: str, layer: nn.Module) -> Combination:
        """The change of one layer of the base, its coefficients zero. Raises TypeError where the layer is not linear."""
        if not isinstance(layer, nn.Linear | Conv1D):
            raise TypeError(f"{name} is no linear layer")
        shape = (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)
        key = derive(self.key, "nola", name) % 2**64
        return Combination(shape, self.r, self.bases, self.lora_alpha / self.r, key)


def insert(base: nn.Module, config: NolaConfig) -> None:
    """Put the sums beside the layers that the config names, in place."""
    for name in config.beside:
        layer = base.get_submodule(name)
        base.set_submodule(name, Nola(layer, config.combination(name, layer)), strict=True)


def as_lora(base: nn.Module, config: NolaConfig, tensors: Mapping[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The plain LoRA adapter with the factors that the saved coefficients `tensors` give, as `peft` saves one.

    Raises KeyError where coefficients are missing. Its bytes are those of any LoRA, so nothing is saved any more; it
    can be merged, and loaded without this package.

    Formal guarantees: it adds the same ΔW to every layer, up to rounding.
    """
    found = dict(tensors)
    for name in config.beside:
        change = config.combination(name, base.get_submodule(name))
        saved = f"base_model.model.{name}"
        own = {part: found.pop(f"{saved}{PREFIX}{part}") for part in ("a", "b")}
        change.load_state_dict(own)
        a, b = (factor.detach() for factor in change.factors())
        found |= {f"{saved}.lora_A.weight": a, f"{saved}.lora_B.weight": b}
    plain = LoraConfig(
        task_type=config.task_type,
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.beside),
        modules_to_save=config.modules_to_save,
    )
    return plain, found
