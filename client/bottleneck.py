"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751): a small network after attention and after the feed-forward.

`peft` has none, so this is our own module. Such a model is a PeftModel around a base that already holds the
bottlenecks: `peft` treats them as it treats biases, as parameters of the base that are trained and saved. The
adapter_config.json says `"peft_type": "BOTTLENECK"`, a kind that `peft` refuses instead of leaving it out in silence;
`client.models.load_adapted_folder` reads it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

OUTPUTS = ("output.dense", "o_proj", "out_proj", "down_proj", "fc2", "c_proj", "out_lin", "lin2", "dense_4h_to_h")
"""What common architectures call the last layer of their attention and of their feed-forward."""

PREFIX = ".bottleneck_"
"""What the names of a bottleneck's own parameters hold, and no other name does."""


class Bottleneck(nn.Module):
    """A frozen layer, and behind it `y + W_up·gelu(W_down·y + b_down) + b_up`, as its output reaches the residual sum.

    `width` is the inner dimension; W_down is (width, out), W_up (out, width).
    """

    def __init__(self, base_layer: nn.Linear | Conv1D, width: int) -> None:
        super().__init__()
        size = base_layer.nf if isinstance(base_layer, Conv1D) else base_layer.out_features
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.Linear(size, width), nn.Linear(width, size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        step: Tensor = self.bottleneck_up(nn.functional.gelu(self.bottleneck_down(y)))
        return y + step.to(y.dtype)


@dataclass
class BottleneckConfig(LoraConfig):  # type: ignore[misc]
    """peft's config for a base with bottlenecks of `width` behind the layers `after`; no layer of it gets factors."""

    width: int = 16
    after: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.target_modules = DUMMY_TARGET_MODULES
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """Only what a reader of the folder needs."""
        kept = ("task_type", "base_model_name_or_path", "modules_to_save", "width", "after")
        config = super().to_dict()
        return {"peft_type": "BOTTLENECK", **{key: config[key] for key in kept}}


def places(base: nn.Module, targets: Sequence[str], excluded: Iterable[str]) -> list[str]:
    """The linear layers whose name ends on one of `targets`, outside the `excluded` modules."""
    outside = tuple(f"{module}." for module in excluded)
    return [
        name
        for name, layer in base.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
        and f".{name}".endswith(tuple(f".{target}" for target in targets))
        and not f"{name}.".startswith(outside)
    ]


def insert(base: nn.Module, names: Iterable[str], width: int) -> None:
    """Put a bottleneck behind each of the named layers, in place."""
    for name in names:
        base.set_submodule(name, Bottleneck(base.get_submodule(name), width), strict=True)
