"""Frozen factors beside the trained ones: a second LoRA adapter that adds to ΔW and that nobody trains."""

from dataclasses import replace

import numpy as np
from peft import LoraConfig

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
    names = adapted.parameter_names | _second_adapter(adapted, layout)
    whole = replace(
        adapted,
        layout=layout,
        parameters={t.name: adapted.model.get_parameter(names[t.name]) for t in layout.tensors},
        parameter_names={t.name: names[t.name] for t in layout.tensors},
    )
    _draw(whole, recipe, spec)
    return whole


def _second_adapter(adapted: AdaptedModel, layout: AdapterLayout) -> dict[str, str]:
    """Put it into the model; the layout's names of its factors ⇒ the model's."""
    first = adapted.model.active_adapter
    names: dict[str, str] = {}
    for pair in adapted.layout.pairs:
        module = adapted.parameter_names[pair.a.name].partition(".lora_A.")[0]
        layer = adapted.model.get_submodule(module)
        rank, scaling = layout.by_name[pair.frozen[1]].shape[0], float(layer.scaling[first])
        config = LoraConfig(r=rank, lora_alpha=scaling * rank, init_lora_weights=False)
        layer.update_layer(FROZEN, rank, lora_alpha=scaling * rank, config=config)
        layer.set_adapter([first, FROZEN])
        for side in (layer.lora_A, layer.lora_B):
            side[FROZEN].float().requires_grad_(False)  # fp32 over any base, like all of an adapter
            side[first].requires_grad_(True)
        names |= {
            pair.frozen[0]: f"{module}.lora_B.{FROZEN}.weight",
            pair.frozen[1]: f"{module}.lora_A.{FROZEN}.weight",
        }
    return names


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
