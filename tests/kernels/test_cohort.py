"""Three forwards, one meaning: batched and vmapped give the loop's logits and gradients, and keep members apart."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fedapt.kernels.cohort import (
    Batched,
    Dropout,
    Forward,
    Inputs,
    Looped,
    NotBatchableError,
    Stack,
    Vmapped,
    fastest,
    members,
)

# Eager attention: the masks of SDPA ask whether all of them is set, which vmap cannot trace.
COMMON: dict[str, Any] = {"num_labels": 3, "initializer_range": 0.2, "attn_implementation": "eager"}
TEXT = COMMON | {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA = SIZES | TEXT | {"num_key_value_heads": 2}
GPT2 = TEXT | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
BASES: dict[str, tuple[Any, list[str], str]] = {
    "bert": (lambda: BertForSequenceClassification(BertConfig(**SIZES, **TEXT)), ["query", "dense"], "classifier"),
    "llama": (lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA)), ["q_proj", "v_proj", "up_proj"], "score"),
    "gpt2": (lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2)), ["c_attn", "c_proj"], "score"),
    "vit": (
        lambda: ViTForImageClassification(ViTConfig(**SIZES, **COMMON, image_size=8, patch_size=4)),
        ["q_proj", "fc2"],
        "classifier",
    ),
}
# BERT asks of its padding mask whether it masks anything, in eager attention too.
TRACED = [kind for kind in BASES if kind != "bert"]
counts = st.integers(1, 4)
TOLERANCE = (
    1e-10  # tensor by tensor, in float64: in fp32 a gradient that nearly cancels is off by a few 1e-5 in the loop too
)


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = BASES[kind][0]()
    return module


@cache
def lora(kind: str, rank: int = 2, head: bool = False, dtype: torch.dtype = torch.float64) -> PeftModel:
    targets, heads = BASES[kind][1], [BASES[kind][2]] if head else None
    config = LoraConfig(
        r=rank,
        lora_alpha=3,
        target_modules=targets,
        modules_to_save=heads,
        init_lora_weights=False,
        fan_in_fan_out=kind == "gpt2",  # Conv1D: its weight is (in, out)
    )
    torch.manual_seed(1)
    # peft rewrites the base that it is given, so each adapter gets a base of its own
    return get_peft_model(base(kind), config).to(dtype).eval()


def trainable(model: nn.Module, without_a: bool = False) -> list[str]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name for name in names if not (without_a and ".lora_A." in name)]


def stacked(model: nn.Module, names: list[str], count: int, seed: int = 0) -> Stack:
    generator = torch.Generator().manual_seed(seed)
    stack = {}
    for name in names:
        value = model.get_parameter(name).detach()
        stack[name] = (value + 0.1 * torch.randn((count, *value.shape), generator=generator)).requires_grad_()
    return stack


def rows_for(kind: str, rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random inputs (rows, …); texts of ragged lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn((rows, 3, 8, 8), generator=generator).to(dtype)}
    lengths = torch.randint(1, 7, (rows, 1), generator=generator)
    mask = (torch.arange(6) < lengths).long()
    ids = torch.randint(1, 100, (rows, 6), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def gradients(forward: Forward, stack: Stack, inputs: Inputs, dropout: Dropout | None = None) -> list[Tensor]:
    """The logits, and the gradient of every tensor for a loss in which no two logits weigh alike."""
    logits = forward(stack, inputs, dropout)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=logits.dtype)
    return [logits.detach(), *torch.autograd.grad((logits * weights).sum(), list(stack.values()))]


def error(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest relative difference, tensor by tensor."""
    assert [x.shape for x in left] == [y.shape for y in right]
    return max(float((x - y).norm() / y.norm().clamp(min=1e-2)) for x, y in zip(left, right, strict=True))


# Each kind by name: left to hypothesis, one of them might never be drawn.
@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=12)
@given(counts, st.integers(1, 3), st.sampled_from([1, 2, 5]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_three_forwards_agree(  # noqa: PLR0917 - hypothesis draws them by position
    kind: str, count: int, rows: int, rank: int, head: bool, without_a: bool, seed: int
) -> None:
    model = lora(kind, rank, head)
    stack = stacked(model, trainable(model, without_a), count, seed)
    inputs = rows_for(kind, count * rows, seed)
    reference = gradients(Looped(model), stack, inputs)
    assert len(reference[0]) == count * rows
    assert error(gradients(Batched(model, list(stack)), stack, inputs), reference) < TOLERANCE
    if kind in TRACED:
        assert error(gradients(Vmapped(model), stack, inputs), reference) < TOLERANCE


@pytest.mark.parametrize("kind", BASES)
def test_a_member_is_the_stock_model_with_its_tensors(kind: str) -> None:
    model = lora(kind, head=True)
    stack = stacked(model, trainable(model), 3)
    inputs = rows_for(kind, 6)
    logits = Batched(model, list(stack))(stack, inputs)
    before = {name: model.get_parameter(name).detach().clone() for name in stack}
    for member in range(3):
        own = {key: value[2 * member : 2 * member + 2] for key, value in inputs.items()}
        with torch.no_grad():
            for name, tensor in stack.items():
                model.get_parameter(name).copy_(tensor[member])
            expected = model(**own).logits
            for name, value in before.items():
                model.get_parameter(name).copy_(value)
        assert error([logits[2 * member : 2 * member + 2].detach()], [expected]) < TOLERANCE


@pytest.mark.parametrize("kind", TRACED)
@pytest.mark.parametrize("make", [Batched, lambda model, _: Vmapped(model), lambda model, _: Looped(model)])
def test_shuffled_members_are_caught(kind: str, make: Any) -> None:
    """The control of the comparison: a kernel that gave members each other's tensors would fail it by far."""
    model = lora(kind, head=True)
    stack = stacked(model, trainable(model), 3)
    inputs = rows_for(kind, 6)
    shuffled = {name: tensor[[1, 2, 0]].detach().requires_grad_() for name, tensor in stack.items()}
    reference = gradients(Looped(model), shuffled, inputs)
    assert error(gradients(make(model, list(stack)), stack, inputs), reference) > 1e-2


@pytest.mark.parametrize("kind", TRACED)
@settings(max_examples=4)
@given(st.integers(2, 4), st.data())
def test_members_do_not_touch_each_other(kind: str, count: int, data: st.DataObject) -> None:
    changed = data.draw(st.integers(0, count - 1))
    model = lora(kind, head=True)
    stack = stacked(model, trainable(model), count)
    inputs = rows_for(kind, 2 * count)
    other = {name: tensor.detach().clone() for name, tensor in stack.items()}
    for tensor in other.values():
        tensor[changed] += 1.0
    for forward in (Batched(model, list(stack)), Vmapped(model)):
        before, after = (forward(s, inputs).detach().view(count, 2, -1) for s in (stack, other))
        for member in range(count):
            difference = float((before[member] - after[member]).abs().max())
            assert difference > 1e-3 if member == changed else difference <= 1e-6


@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=6)
@given(counts, st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_fp32_agrees_over_the_whole_gradient(kind: str, count: int, rows: int, head: bool, seed: int) -> None:
    """What DESIGN promises of an update is relative to all of it."""
    model = lora(kind, head=head, dtype=torch.float32)
    stack = stacked(model, trainable(model), count, seed)
    inputs = rows_for(kind, count * rows, seed, torch.float32)
    results = [gradients(forward, stack, inputs) for forward in (Batched(model, list(stack)), Looped(model))]
    assert {tensor.dtype for result in results for tensor in result} == {torch.float32}
    one, two = (torch.cat([tensor.flatten() for tensor in result[1:]]) for result in results)
    assert error([results[0][0], one], [results[1][0], two]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_logits_keep_their_precision(dtype: torch.dtype) -> None:
    model = lora("vit", head=True, dtype=dtype)
    stack, inputs = stacked(model, trainable(model), 2), rows_for("vit", 4, dtype=dtype)
    for forward in (Batched(model, list(stack)), Vmapped(model), Looped(model)):
        assert forward(stack, inputs).dtype == dtype


def test_bf16_base_gives_fp32_logits() -> None:
    model = lora.__wrapped__("bert", head=True)
    model.to(torch.bfloat16)  # all of it: the head has no cast of its own here
    factors = [name for name in trainable(model) if ".lora_" in name]
    for name in factors:
        model.get_parameter(name).data = model.get_parameter(name).data.float()
    stack = stacked(model, factors, 2)
    logits = Batched(model, list(stack))(stack, rows_for("bert", 4))
    assert logits.dtype == torch.float32


def test_the_model_is_left_as_it_was() -> None:
    model = lora("llama", head=True)
    inputs = rows_for("llama", 4)
    before = model(**inputs).logits.detach()
    stack = stacked(model, trainable(model), 2)
    for forward in (Batched(model, list(stack)), Vmapped(model), Looped(model)):
        forward(stack, inputs)
        assert torch.equal(model(**inputs).logits.detach(), before)
    with pytest.raises(ValueError, match="input_ids"):
        Batched(model, list(stack))(stack, {"unknown": inputs["input_ids"]})
    assert torch.equal(model(**inputs).logits.detach(), before)


def masks(module: str, member: int, x: Tensor) -> Tensor:
    """Any rule that differs between modules and members."""
    generator = torch.Generator().manual_seed(1000 * member + len(module) + sum(map(ord, module)))
    return x * (torch.rand(x.shape, generator=generator) > 0.3)


@pytest.mark.parametrize("kind", BASES)
def test_dropout_agrees(kind: str) -> None:
    model = lora(kind, head=True)
    stack = stacked(model, trainable(model), 3)
    inputs = rows_for(kind, 6)
    reference = gradients(Looped(model), stack, inputs, masks)
    assert error(gradients(Batched(model, list(stack)), stack, inputs, masks), reference) < TOLERANCE
    assert error(gradients(Vmapped(model), stack, inputs, masks), reference) < TOLERANCE  # by way of the loop
    assert error(gradients(Looped(model), stack, inputs), reference) > 1e-3  # the masks do something
    again = gradients(Looped(model), stack, inputs)
    assert error(gradients(Batched(model, list(stack)), stack, inputs), again) < TOLERANCE  # and are gone afterwards


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_fastest_takes_the_batched_kernel_for_plain_lora(kind: str, head: bool, rows: int) -> None:
    model = lora(kind, head=head, dtype=torch.float32)
    inputs = rows_for(kind, 2 * rows, dtype=torch.float32)
    assert isinstance(fastest(model, trainable(model), inputs), Batched)


def other_adapters(kind: str) -> list[PeftModel]:
    targets, feedforward = BASES[kind][1], BASES[kind][1][-1:]
    configs = [
        LoraConfig(r=2, target_modules=targets, use_dora=True, init_lora_weights=False),
        LoraConfig(r=2, target_modules=targets, lora_bias=True, init_lora_weights=False),
        IA3Config(target_modules=targets, feedforward_modules=feedforward, init_ia3_weights=False),
    ]
    return [get_peft_model(base(kind), config).double().eval() for config in configs]


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_fastest_falls_back_where_the_kernel_does_not_know_the_adapter(kind: str) -> None:
    for model in other_adapters(kind):
        names, inputs = trainable(model), rows_for(kind, 4)
        with pytest.raises(NotBatchableError):
            Batched(model, names)
        forward = fastest(model, names, inputs)
        assert isinstance(forward, Vmapped | Looped)
        stack = stacked(model, names, 2)
        assert error(gradients(forward, stack, inputs), gradients(Looped(model), stack, inputs)) < TOLERANCE


def test_vmap_takes_what_it_can_trace() -> None:
    kinds = {type(fastest(model, trainable(model), rows_for("vit", 4))) for model in other_adapters("vit")}
    assert Vmapped in kinds


class Mixing(nn.Module):
    """A model that turns its batch around inside, and back at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.last(torch.tanh(self.first(x.flip(0))).flip(0)))


def test_a_model_that_mixes_its_rows_is_looped() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    model = get_peft_model(Mixing(), config).double().eval()
    for rows in (1, 2):
        # As the client probes: both members have the same rows.
        inputs = {"x": torch.randn(rows, 5, dtype=torch.float64).repeat(2, 1)}
        stack = stacked(model, trainable(model), 2)
        reference = gradients(Looped(model), stack, inputs)
        assert error(gradients(Batched(model, list(stack)), stack, inputs), reference) > 1e-2
        forward = fastest(model, trainable(model), inputs)
        assert not isinstance(forward, Batched)
        assert error(gradients(forward, stack, inputs), reference) < TOLERANCE


def test_members_counts_the_leading_axis() -> None:
    assert members({"a": torch.zeros(4, 2), "b": torch.zeros(4)}) == 4
