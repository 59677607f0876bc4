"""Frozen factors: they add to ΔW in every forward alike, nobody trains them, and they are fp32 over any base."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from fedapt.client.adapted import AdaptedModel, adapt
from fedapt.client.frozen import add_frozen
from fedapt.client.tasks import SequenceClassification
from fedapt.kernels.cohort import Batched, Forward, Looped
from fedapt.protocols.errors import ModelError
from fedapt.protocols.recipes import RECIPES
from fedapt.protocols.spec import RunSpec

from .tiny import SIZES

FORWARDS: list[Callable[[Any, list[str]], Forward]] = [Batched, lambda model, names: Looped(model)]


def adapted_with(recipe: str, dtype: torch.dtype = torch.float32, **lora: Any) -> AdaptedModel:
    """A tiny BERT whose factors, frozen ones too, have values."""
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=100, num_labels=3)).to(dtype)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["query", "dense"], init_lora_weights=False, **lora)
    model = get_peft_model(base, config, autocast_adapter_dtype=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    raw = {"model": {"base": "m", "task": "causal-lm"}, "recipe": {"name": recipe, "budget": 4}, "adapter": {"rank": 2}}
    spec = RunSpec.check(raw)
    whole = add_frozen(adapt(model, SequenceClassification(None, 16)), RECIPES[recipe], spec)
    flat = whole.read()
    for name, view in whole.layout.split(flat).items():
        if "frozen_B" in name:
            view[...] = np.random.default_rng(1).standard_normal(view.shape) / 4
    whole.write(flat)
    return whole


def logits(adapted: AdaptedModel, make: Callable[[Any, list[str]], Forward]) -> torch.Tensor:
    """Of two members that hold the adapter as it is."""
    trained = adapted.layout.select({"A", "B"})
    names = [adapted.parameter_names[t.name] for t in trained.tensors]
    stack = {name: adapted.model.get_parameter(name).detach().expand(2, -1, -1).clone() for name in names}
    inputs = {"input_ids": torch.arange(3, 15).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    with torch.no_grad():
        return make(adapted.model, names)(stack, inputs)


def merged_logits(adapted: AdaptedModel) -> torch.Tensor:
    """The plain reference: every ΔW formed and added to the base's own weight."""
    tensors = adapted.layout.split(adapted.read())
    changes = {
        adapted.parameter_names[pair.a.name].partition(".lora_A.")[0]: 1.5
        * (tensors[pair.b.name] @ tensors[pair.a.name] + tensors[pair.frozen[0]] @ tensors[pair.frozen[1]])
        for pair in adapted.layout.pairs
    }
    inputs = {"input_ids": torch.arange(3, 15).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    model = copy.deepcopy(adapted.model)  # disabling adapters changes what requires a gradient
    with torch.no_grad(), model.disable_adapter():
        for name, change in changes.items():
            model.get_submodule(name).base_layer.weight += torch.from_numpy(change)
        result: torch.Tensor = model(**inputs).logits
    return result


@pytest.mark.parametrize("recipe", ["fedex", "refresh"])
@pytest.mark.parametrize("make", FORWARDS, ids=["batched", "looped"])
def test_every_forward_adds_them(recipe: str, make: Callable[[Any, list[str]], Forward]) -> None:
    adapted = adapted_with(recipe)
    if recipe == "fedex":  # its frozen A starts as zero
        flat = adapted.read()
        for name, view in adapted.layout.split(flat).items():
            if "frozen_A" in name:
                view[...] = np.random.default_rng(2).standard_normal(view.shape) / 4
        adapted.write(flat)
    found, expected = logits(adapted, make), merged_logits(adapted)
    assert torch.allclose(found, expected, atol=1e-5)
    flat = adapted.read()
    for name, view in adapted.layout.split(flat).items():
        view[...] = 0 if "frozen_B" in name else view
    adapted.write(flat)
    assert not torch.allclose(logits(adapted, make), expected, atol=1e-3)  # the control: they matter


def test_nobody_trains_them_and_the_first_adapter_goes_on_training() -> None:
    adapted = adapted_with("refresh")
    for tensor in adapted.layout.tensors:
        assert adapted.parameters[tensor.name].requires_grad == (tensor.role != "frozen")
    assert {t.name for t in adapted.layout.tensors} == set(adapted.parameters)


@pytest.mark.parametrize("make", FORWARDS, ids=["batched", "looped"])
def test_over_a_bf16_base_they_are_fp32_and_the_base_stays_bf16(make: Callable[[Any, list[str]], Forward]) -> None:
    adapted = adapted_with("refresh", torch.bfloat16)
    assert {parameter.dtype for parameter in adapted.parameters.values()} == {torch.float32}
    seen = []
    layer = adapted.model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    try:
        logits(adapted, make)
    finally:
        hook.remove()
    assert set(seen) <= {torch.bfloat16}


def test_every_start_of_refresh_has_orthonormal_rows_of_its_own() -> None:
    adapted = adapted_with("refresh")
    tensors = adapted.layout.split(adapted.read())
    for pair in adapted.layout.pairs:
        later = tensors[pair.frozen[1]]
        assert later.shape[0] == 4
        for block in (later[:2], later[2:]):
            assert np.allclose(block @ block.T, np.eye(2), atol=1e-6)
        assert np.abs(later[:2] @ later[2:].T).max() < 0.9


def test_modules_of_different_ranks_are_refused() -> None:
    with pytest.raises(ModelError, match=r"one rank.*\[2, 3\]"):
        adapted_with("fedex", rank_pattern={"query": 3})
