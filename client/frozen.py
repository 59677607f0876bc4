"""Frozen factors beside the trained ones: a second LoRA adapter that adds to ΔW and that nobody trains."""

from dataclasses import replace

import numpy as np
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from ..protocols.errors import ModelError
from ..protocols.keys import derive, generator
from ..protocols.layout import AdapterLayout
from ..protocols.recipes import Recipe
from ..protocols.spec import RunSpec
from .adapted import AdaptedModel

FROZEN = "frozen"
"""The name of the second adapter inside the model."""


def add_frozen(adapted: AdaptedModel, recipe: Recipe, spec: RunSpec) -> AdaptedModel:
    """The model with frozen factors of the recipe's budget, all of B zero, where the recipe has them.

    Under `refresh` their A's are the orthonormal A's of all later starts, drawn by key. They scale like the trained
    factors. Raises ModelError where the pairs of the adapter differ in rank, because a budget is one rank for all.
    """
    if not recipe.has_frozen:
        return adapted
    layout = adapted.layout
    if len({pair.rank for pair in layout.pairs}) != 1:
        raise ModelError(
            f"recipe {recipe.name} keeps frozen factors of one rank, and the adapter's modules have the ranks "
            f"{sorted({pair.rank for pair in layout.pairs})}: give them one rank, or take another recipe"
        )
    layout = layout.with_frozen(recipe.budget(layout, spec.recipe))
    factors = _second_adapter(adapted, layout)
    names = {name: name for name in factors}
    whole = replace(
        adapted,
        layout=layout,
        parameters={t.name: (adapted.parameters | factors)[t.name] for t in layout.tensors},
        parameter_names={t.name: (adapted.parameter_names | names)[t.name] for t in layout.tensors},
    )
    _draw(whole, recipe, spec)
    return whole


def _second_adapter(adapted: AdaptedModel, layout: AdapterLayout) -> dict[str, nn.Parameter]:
    """Put it into the model; its parameters by the layout's names."""
    model, first = adapted.model, adapted.model.active_adapter
    sizes = {t.name: t.shape for t in layout.tensors}
    factors: dict[str, nn.Parameter] = {}
    own = {adapted.parameter_names[pair.a.name].partition(".lora_A.")[0]: pair for pair in adapted.layout.pairs}
    for name, layer in model.named_modules():
        if name not in own or not isinstance(layer, LoraLayer):
            continue
        rank = sizes[own[name].frozen[1]][0]
        scaling = float(layer.scaling[first])
        config = LoraConfig(r=rank, lora_alpha=scaling * rank, init_lora_weights=False)
        layer.update_layer(FROZEN, rank, lora_alpha=scaling * rank, config=config)
        layer.set_adapter([first, FROZEN])
        for factor, side in zip(own[name].frozen, (layer.lora_B, layer.lora_A), strict=True):
            factors[factor] = side[FROZEN].weight.requires_grad_(False)
        for side in (layer.lora_A, layer.lora_B):
            side[first].requires_grad_(True)
    return factors


def _draw(adapted: AdaptedModel, recipe: Recipe, spec: RunSpec) -> None:
    flat = adapted.read()
    tensors = adapted.layout.split(flat)
    for pair in adapted.layout.pairs:
        b, a = (tensors[name] for name in pair.frozen)
        b[...] = a[...] = 0.0
        for start in range(1, len(a) // pair.rank + 1) if recipe.refreshes else ():
            drawn = generator(derive(spec.run.seed, "A", pair.module, start)).standard_normal(pair.a.shape)
            a[(start - 1) * pair.rank : start * pair.rank] = np.linalg.qr(drawn.T)[0].T
    adapted.write(flat)
