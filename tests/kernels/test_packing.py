"""Packed rows give the padded batch's numbers, and are taken only where they do."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AttentionInterface,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fedapt.kernels.cohort import Batched, Looped, Packed, Stack, fastest
from fedapt.kernels.packing import IMPLEMENTATION, PackedBlocks, Packing, packed_attention

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT: dict[str, Any] = {"num_labels": 3, "initializer_range": 0.2, "vocab_size": 100, "pad_token_id": 0}
TOLERANCE = 1e-10
lengths = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def bert(attention: str = "sdpa", targets: tuple[str, ...] = ("query", "dense")) -> PeftModel:
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**SIZES, **TEXT, attn_implementation=attention))
    config = LoraConfig(r=2, target_modules=list(targets), modules_to_save=["classifier"], init_lora_weights=False)
    return get_peft_model(base, config).double().eval()


def names_of(model: PeftModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def stack_of(model: PeftModel, names: list[str], count: int) -> Stack:
    generator = torch.Generator().manual_seed(1)
    values = {name: model.get_parameter(name).detach() for name in names}
    return {
        name: (value + 0.1 * torch.randn((count, *value.shape), generator=generator)).requires_grad_()
        for name, value in values.items()
    }


def texts(counts: list[int]) -> dict[str, Tensor]:
    """Rows of random tokens of these lengths, padded to the longest."""
    ids = torch.randint(1, 100, (len(counts), max(counts)), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(max(counts)) < torch.tensor(counts)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def result(forward: Any, stack: Stack, inputs: dict[str, Tensor]) -> list[Tensor]:
    logits = forward(stack, inputs)
    weights = torch.linspace(-1, 2, logits.numel()).view_as(logits)
    return [logits.detach(), *torch.autograd.grad((logits * weights).sum(), list(stack.values()))]


def error(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((x - y).norm() / y.norm().clamp(min=1e-2)) for x, y in zip(left, right, strict=True))


@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_packed_rows_give_the_loops_logits_and_gradients(count: int, rows: int, data: st.DataObject) -> None:
    model = bert()
    counts = data.draw(st.lists(st.integers(1, 6), min_size=count * rows, max_size=count * rows))
    frozen_a = data.draw(st.booleans())
    names = [name for name in names_of(model) if not (frozen_a and ".lora_A." in name)]
    stack, inputs = stack_of(model, names, count), texts(counts)
    reference = result(Looped(model), stack, inputs)
    assert error(result(Packed(model, names), stack, inputs), reference) < TOLERANCE
    assert error(result(Batched(model, names), stack, inputs), reference) < TOLERANCE  # and the model is as it was


@given(lengths)
def test_packing_and_unpacking_are_inverse_and_leave_padding_alone(counts: list[int]) -> None:
    mask = texts(counts)["attention_mask"]
    packing = Packing(mask, 1)
    padded = torch.rand((*mask.shape, 3), dtype=torch.float64, requires_grad=True)
    packed = packing.pack(padded)
    again = packing.unpack(packed)
    assert packed.shape == (1, sum(counts), 3)
    assert packing.pack(packed) is packed
    assert torch.equal(again, padded * mask[..., None])
    assert torch.equal(packing.first(packed)[0], padded[:, 0])
    weights = torch.rand(again.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((again * weights).sum(), padded)
    assert torch.equal(gradient, weights * mask[..., None])


def test_fastest_packs_an_encoder_with_sdpa() -> None:
    model = bert()
    assert isinstance(fastest(model, names_of(model), texts([4, 4, 3, 4])), Packed)
    assert {config._attn_implementation for config in PackedBlocks(model).configs} == {"sdpa"}


def test_eager_attention_is_not_packed() -> None:
    model = bert("eager")
    with pytest.raises(ValueError, match="SDPA"):
        PackedBlocks(model)
    assert isinstance(fastest(model, names_of(model), texts([4, 4, 3, 4])), Batched)


def test_a_decoder_is_not_packed_because_its_positions_are_the_rows_own() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, **TEXT, num_key_value_heads=2)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForSequenceClassification(config), lora).double().eval()
    assert isinstance(fastest(model, names_of(model), texts([4, 4, 3, 4])), Batched)


def test_attention_across_texts_is_noticed_and_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def across(attending: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, **settings: Any) -> Any:
        return sdpa_attention_forward(attending, query, key, value, None, is_causal=False, **settings)

    monkeypatch.setitem(AttentionInterface._global_mapping, IMPLEMENTATION, across)
    model = bert()
    assert isinstance(fastest(model, names_of(model), texts([4, 4, 3, 4])), Batched)
    monkeypatch.setitem(AttentionInterface._global_mapping, IMPLEMENTATION, packed_attention)
    assert isinstance(fastest(model, names_of(model), texts([4, 4, 3, 4])), Packed)


def test_a_batch_that_fails_leaves_the_model_as_it_was() -> None:
    model = bert()
    names = names_of(model)
    inputs = texts([4, 2])
    stack = stack_of(model, names, 1)
    with pytest.raises(IndexError):  # no such token
        Packed(model, names)(stack, {**inputs, "input_ids": inputs["input_ids"] + 1000})
    assert error(result(Batched(model, names), stack, inputs), result(Looped(model), stack, inputs)) < TOLERANCE
