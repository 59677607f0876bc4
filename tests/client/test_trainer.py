"""The central claim: a cohort trains as its members would one after another, with stock peft and a stock optimizer."""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fedapt.client import trainer as trainer_module
from fedapt.client.adapted import AdaptedModel, adapt
from fedapt.client.batches import plan_batches
from fedapt.client.tasks import CausalLanguageModel, Examples, ImageClassification, SequenceClassification
from fedapt.client.trainer import Member, Trained, Trainer
from fedapt.kernels.cohort import Batched, Dropout, Forward, Inputs, Looped, Stack, members
from fedapt.protocols.keys import derive
from fedapt.protocols.layout import AdapterLayout
from fedapt.protocols.spec import Local

from .tiny import SIZES

TEXT = SIZES | {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = TEXT | {"num_key_value_heads": 2}
CLASSIFY, GENERATE = SequenceClassification(None, 16), CausalLanguageModel(None, 16)
BASES: dict[str, tuple[Any, Any, list[str], list[str] | None]] = {
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(**TEXT, num_labels=3)),
        CLASSIFY,
        ["query", "dense"],
        ["classifier"],
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), GENERATE, ["q_proj", "down_proj"], None),
    "llama-head": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3)),
        CLASSIFY,
        ["v_proj", "up_proj"],
        ["score"],
    ),
    "vit": (
        lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3)),
        ImageClassification(None),
        ["q_proj", "fc1"],
        ["classifier"],
    ),
}
roles = st.sampled_from(["AB", "B"])
sizes = st.lists(st.integers(1, 7), min_size=1, max_size=5)
SGD = Local(optimizer="sgd", learning_rate=0.1, batch_size=3, epochs=1)
ADAMW = Local(optimizer="adamw", learning_rate=1e-3, weight_decay=0.01, batch_size=3, epochs=2)


@cache
def model_of(kind: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> AdaptedModel:
    make, task, targets, heads = BASES[kind]
    config = LoraConfig(
        r=2, target_modules=targets, modules_to_save=heads, init_lora_weights=False, lora_dropout=dropout
    )
    torch.manual_seed(0)
    return adapt(get_peft_model(make(), config).to(dtype), task)


def trained_of(adapted: AdaptedModel, which: str = "AB") -> AdapterLayout:
    return adapted.layout.select(("A", "B", "other") if which == "AB" else ("B", "other"))


def forward_of(adapted: AdaptedModel, trained: AdapterLayout) -> Batched:
    return Batched(adapted.model, [adapted.parameter_names[t.name] for t in trained.tensors])


def examples_for(kind: str, count: int, seed: int, dtype: torch.dtype = torch.float32, shortest: int = 2) -> Examples:
    """Random examples; texts of `shortest` … 12 tokens, and some targets of a language model ignored."""
    random = np.random.default_rng(seed)
    classes: list[Any] = [np.int64(label) for label in random.integers(0, 3, count)]
    if kind == "vit":
        # Pixels are fp32 in a batch, so both sides get values that fp32 holds.
        pixels = random.standard_normal((count, 3, 8, 8)).astype(np.float32)
        return Examples(list(pixels.astype(str(dtype).removeprefix("torch."))), classes, np.arange(count))
    texts = [random.integers(3, 100, random.integers(shortest, 13)) for _ in range(count)]
    if kind == "llama":
        classes = [np.where(np.arange(len(text)) < len(text) // 3, -100, text) for text in texts]
    return Examples(texts, classes, np.arange(count))


def cohort_of(examples: Examples, own_sizes: Sequence[int], local: Local, seed: int = 0) -> list[Member]:
    """Nodes with so many examples each, planned as the client plans them."""
    ends = np.cumsum(own_sizes)
    cohort = []
    for node, (size, end) in enumerate(zip(own_sizes, ends, strict=True)):
        own = np.arange(end - size, end)
        batches = plan_batches(examples.lengths[own], local, seed, 1, node)
        cohort.append(Member([own[b] for b in batches], derive(seed, "dropout", 1, node)))
    return cohort


def stock_batch(kind: str, examples: Examples, batch: Any) -> dict[str, Tensor]:
    """One member's own batch as a user of transformers writes it: padded to its own longest text alone."""
    inputs = [torch.tensor(examples.inputs[i]) for i in batch]
    if kind == "vit":
        return {"pixel_values": torch.stack(inputs), "labels": torch.tensor([int(examples.labels[i]) for i in batch])}
    pad = torch.nn.utils.rnn.pad_sequence
    ids, mask = pad(inputs, batch_first=True), pad([torch.ones_like(x) for x in inputs], batch_first=True)
    if kind == "llama":
        labels = pad([torch.tensor(examples.labels[i]) for i in batch], batch_first=True, padding_value=-100)
    else:
        labels = torch.tensor([int(examples.labels[i]) for i in batch])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def stock_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Hugging Face's own loss; of a language model in float64 by hand, because transformers computes it in fp32."""
    if next(model.parameters()).dtype == torch.float64 and batch["labels"].dim() == 2:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss: Tensor = model(**batch).loss
    return loss


def alone(  # noqa: PLR0917
    kind: str, adapted: AdaptedModel, trained: AdapterLayout, examples: Examples, member: Member, local: Local
) -> tuple[Any, list[float]]:
    """Independent of the code under test: the update (in the layout's order) and the losses of one member."""
    model = copy.deepcopy(adapted.model).eval()
    for name, parameter in model.named_parameters():
        if ".lora_A." in name and "A" not in {t.role for t in trained.tensors}:
            parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind_of = torch.optim.SGD if local.optimizer == "sgd" else torch.optim.AdamW
    optimizer = kind_of(parameters, lr=local.learning_rate, weight_decay=local.weight_decay)
    losses = []
    for batch in member.batches:
        loss = stock_loss(model, stock_batch(kind, examples, batch))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    after = get_peft_model_state_dict(model)
    change = torch.cat([(after[t.name] - before[t.name]).flatten() for t in trained.tensors])
    return change.numpy(), losses


def start_of(adapted: AdaptedModel, trained: AdapterLayout) -> Any:
    return np.concatenate([adapted.parameters[t.name].detach().numpy().ravel() for t in trained.tensors])


def relative(actual: Any, expected: Any) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def check(  # noqa: PLR0917
    kind: str, own_sizes: Sequence[int], local: Local, dtype: torch.dtype, which: str, seed: int, shortest: int = 2
) -> tuple[list[float], list[float], list[float]]:
    """For each member the relative error of its update, of its weights and of its losses."""
    adapted = model_of(kind, dtype)
    trained = trained_of(adapted, which)
    examples = examples_for(kind, sum(own_sizes), seed, dtype, shortest)
    cohort = cohort_of(examples, own_sizes, local, seed)
    result = Trainer(adapted, forward_of(adapted, trained), trained, local).train(examples, cohort)
    start = start_of(adapted, trained)
    updates, weights, losses = [], [], []
    for member, own in zip(cohort, result, strict=True):
        change, own_losses = alone(kind, adapted, trained, examples, member, local)
        updates.append(relative(own.change, change))
        weights.append(relative(start + own.change, start + change))
        losses.append(relative(own.losses, np.array(own_losses)))
    return updates, weights, losses


# Each kind by name: left to hypothesis, one of them might never be drawn.
@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=8)
@given(sizes, roles, st.integers(0, 9999))
def test_sgd_gives_the_updates_of_training_one_after_another(
    kind: str, own_sizes: list[int], which: str, seed: int
) -> None:
    updates, _, losses = check(kind, own_sizes, SGD, torch.float32, which, seed)
    assert max(updates) <= 1e-5
    assert max(losses) <= 1e-5


@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=5)
@given(sizes, roles, st.integers(0, 9999))
def test_sgd_gives_the_updates_in_float64(kind: str, own_sizes: list[int], which: str, seed: int) -> None:
    updates, _, losses = check(kind, own_sizes, SGD, torch.float64, which, seed)
    assert max(updates) <= 1e-12
    assert max(losses) <= 1e-12


@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=5)
@given(sizes, roles, st.integers(0, 9999))
def test_adamw_gives_the_updates_in_float64(kind: str, own_sizes: list[int], which: str, seed: int) -> None:
    """Texts have three tokens or more. The one target of two tokens is predicted from a position that attends to
    itself alone: its query's gradient is zero but for rounding (1e-17), which AdamW divides by ε = 1e-8.
    """
    updates, _, losses = check(kind, own_sizes, ADAMW, torch.float64, which, seed, shortest=3)
    assert max(updates) <= 1e-9
    assert max(losses) <= 1e-9


@pytest.mark.parametrize("kind", BASES)
@settings(max_examples=5)
@given(sizes, roles, st.integers(0, 9999))
def test_adamw_gives_the_weights_in_fp32(kind: str, own_sizes: list[int], which: str, seed: int) -> None:
    _, weights, _ = check(kind, own_sizes, ADAMW, torch.float32, which, seed)
    assert max(weights) <= 1e-4


class Watched:
    """A forward that keeps what it was called with."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.counts: list[int] = []
        self.dropouts: list[Dropout | None] = []

    def __call__(self, stack: Stack, inputs: Inputs, dropout: Dropout | None = None) -> Tensor:
        self.counts.append(members(stack))
        self.dropouts.append(dropout)
        return self.forward(stack, inputs, dropout)


RAGGED = [4, 8, 1, 5, 11]


def trained_ragged(
    kind: str,
    *,
    local: Local = SGD,
    looped: bool = False,
    dropout: float = 0.0,
    only: Sequence[int] = range(len(RAGGED)),
    seed: int = 0,
) -> tuple[list[Trained], Watched]:
    """The members `only`, in this order, of one fixed ragged cohort; `seed` is the run's."""
    adapted = model_of(kind, dropout=dropout)
    trained = trained_of(adapted)
    examples = examples_for(kind, sum(RAGGED), 5)
    cohort = cohort_of(examples, RAGGED, local)
    keyed = [Member(m.batches, derive(seed, "dropout", 1, node)) for node, m in enumerate(cohort)]
    watched = Watched(Looped(adapted.model) if looped else forward_of(adapted, trained))
    result = Trainer(adapted, watched, trained, local).train(examples, [keyed[m] for m in only])
    return result, watched


@pytest.mark.parametrize("kind", BASES)
def test_members_in_the_wrong_order_would_be_caught(kind: str) -> None:
    """The control of this file: with the members shuffled, the comparison fails by orders of magnitude."""
    result, watched = trained_ragged(kind)
    assert watched.counts[0] == len(RAGGED)  # they were trained together, and
    assert watched.counts[-1] == 1  # left one by one
    adapted = model_of(kind)
    examples = examples_for(kind, sum(RAGGED), 5)
    shuffled = np.roll(np.arange(len(RAGGED)), 1)
    cohort = cohort_of(examples, RAGGED, SGD)
    for position, member in enumerate(shuffled):
        expected, _ = alone(kind, adapted, adapted.layout, examples, cohort[member], SGD)
        assert relative(result[member].change, expected) <= 1e-5
        assert relative(result[position].change, expected) > 1e-1


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize(("local", "tolerance"), [(SGD, 1e-5), (ADAMW, 1e-4)])
def test_chunks_and_order_change_nothing(
    kind: str, local: Local, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = model_of(kind)
    start = start_of(adapted, adapted.layout)
    reference, _ = trained_ragged(kind, local=local)
    for tokens, order in ((1, [0, 1, 2, 3, 4]), (60, [4, 2, 0, 1, 3]), (10**9, [3, 1, 4, 0, 2])):
        monkeypatch.setattr(trainer_module, "chunk_tokens", lambda _, most=tokens: most)
        result, watched = trained_ragged(kind, local=local, only=order)
        assert max(watched.counts) in {1: {1}, 60: {2, 3, 4}}.get(tokens, {5})
        for own, member in zip(result, order, strict=True):
            expected = reference[member].change
            assert relative(start + own.change, start + expected) <= tolerance
            assert local.optimizer == "adamw" or relative(own.change, expected) <= tolerance
            assert len(own.losses) == len(reference[member].losses)


def test_a_chunk_keeps_within_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "chunk_tokens", lambda _: 50)
    adapted = model_of("bert")
    rows: list[int] = []

    def forward(stack: Stack, inputs: Inputs, dropout: Dropout | None = None) -> Tensor:
        rows.append(inputs["input_ids"].numel())
        return forward_of(adapted, adapted.layout)(stack, inputs, dropout)

    examples = examples_for("bert", 20, 0)
    cohort = [Member([np.array([i])] * (1 + i % 2), 0) for i in range(20)]
    Trainer(adapted, forward, adapted.layout, SGD).train(examples, cohort)
    assert max(rows) <= 50
    assert len(rows) < 20


def test_the_number_of_threads_changes_nothing() -> None:
    own = torch.get_num_threads()
    changes = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            changes.append([trained.change for trained in trained_ragged("llama")[0]])
    finally:
        torch.set_num_threads(own)
    for one, two in zip(*changes, strict=True):
        assert relative(two, one) <= 1e-5


def test_training_leaves_the_model_as_it_was() -> None:
    adapted = model_of("bert")
    before = adapted.read()
    trained_ragged("bert")
    assert np.array_equal(adapted.read(), before)
    assert all(p.grad is None for p in adapted.model.parameters())


def test_no_members_give_nothing() -> None:
    adapted = model_of("bert")
    trainer = Trainer(adapted, forward_of(adapted, adapted.layout), adapted.layout, SGD)
    assert trainer.train(examples_for("bert", 1, 0), []) == []


@pytest.mark.parametrize("kind", BASES)
def test_dropout_is_the_same_in_every_cohort(kind: str) -> None:
    together, _ = trained_ragged(kind, dropout=0.3)
    for member in range(len(RAGGED)):
        (own,), _ = trained_ragged(kind, dropout=0.3, only=[member])
        assert relative(together[member].change, own.change) <= 1e-5


@pytest.mark.parametrize("kind", BASES)
def test_dropout_is_the_same_in_the_loop(kind: str) -> None:
    batched, _ = trained_ragged(kind, dropout=0.3)
    looped, _ = trained_ragged(kind, dropout=0.3, looped=True)
    for one, two in zip(batched, looped, strict=True):
        assert relative(one.change, two.change) <= 1e-5


def test_dropout_depends_on_the_key_and_the_rate() -> None:
    without, _ = trained_ragged("bert")
    first, _ = trained_ragged("bert", dropout=0.3)
    again, _ = trained_ragged("bert", dropout=0.3)
    other, _ = trained_ragged("bert", dropout=0.3, seed=1)
    for member in range(len(RAGGED)):
        assert np.array_equal(first[member].change, again[member].change)
        assert relative(other[member].change, first[member].change) > 1e-2
        assert relative(without[member].change, first[member].change) > 1e-2


def test_dropout_keeps_the_expected_value() -> None:
    _, watched = trained_ragged("bert", dropout=0.3)
    drop = watched.dropouts[0]
    assert drop is not None
    masked = [drop(module, member, torch.ones(9, 4000)) for module in ("m", "n") for member in (0, 1)]
    for own in masked:
        assert sorted(set(own.flatten().tolist())) == pytest.approx([0, 1 / 0.7])
        assert abs(float(own.mean()) - 1) < 5 * (0.3 / 0.7 / own.numel()) ** 0.5
    for one, two in ((0, 1), (0, 2), (0, 3)):  # independent: they agree where chance has it
        agreed = float((masked[one] == masked[two]).float().mean())
        assert abs(agreed - (0.3**2 + 0.7**2)) < 5 * 0.5 / 36000**0.5
    later = watched.dropouts[1]
    assert later is not None
    assert not torch.equal(later("m", 0, torch.ones(9, 4000)), masked[0])


def test_without_a_rate_there_are_no_masks() -> None:
    assert set(trained_ragged("bert")[1].dropouts) == {None}
