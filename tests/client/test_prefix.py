"""The frozen prefix: what is computed once gives the numbers that the whole model gives."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from fedapt.client import prefix
from fedapt.client.adapted import AdaptedModel, adapt
from fedapt.client.batches import plan_batches
from fedapt.client.evaluation import score
from fedapt.client.prefix import PREFIX, FrozenBlocks, frozen_blocks
from fedapt.client.tasks import CausalLanguageModel, Examples, ImageClassification, SequenceClassification
from fedapt.client.trainer import Member, Trainer
from fedapt.kernels.cohort import Batched, Forward, Looped
from fedapt.protocols.spec import Local

from .tiny import SIZES

TEXT = SIZES | {"vocab_size": 100, "pad_token_id": 0, "num_hidden_layers": 3}
LLAMA = TEXT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
LOCAL = Local(optimizer="sgd", learning_rate=0.1, batch_size=3, epochs=2)


def bert(layers: list[int] | None, **settings: Any) -> AdaptedModel:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**TEXT, num_labels=3))
    config = LoraConfig(
        r=2,
        target_modules=["query", "dense"],
        layers_to_transform=layers,
        modules_to_save=["classifier"],
        init_lora_weights=False,
        **settings,
    )
    return adapt(get_peft_model(model, config), SequenceClassification(None, 16))


def llama() -> AdaptedModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[2], init_lora_weights=False)
    return adapt(get_peft_model(LlamaForCausalLM(LlamaConfig(**LLAMA)), config), CausalLanguageModel(None, 16))


def examples_of(adapted: AdaptedModel, count: int = 20, seed: int = 0) -> Examples:
    random = np.random.default_rng(seed)
    texts = [random.integers(3, 100, random.integers(2, 13)) for _ in range(count)]
    labels: list[Any] = texts if isinstance(adapted.task, CausalLanguageModel) else list(random.integers(0, 3, count))
    return Examples(texts, labels, np.arange(count))


def cohort_of(examples: Examples) -> list[Member]:
    nodes = np.array_split(np.arange(len(examples)), [3, 4, 11])
    return [
        Member([own[b] for b in plan_batches(examples.lengths[own], LOCAL, 0, 1, n)], n) for n, own in enumerate(nodes)
    ]


def trained(adapted: AdaptedModel, examples: Examples, forward: Forward) -> Any:
    results = Trainer(adapted, forward, adapted.layout, LOCAL).train(examples, cohort_of(examples))
    return np.stack([r.change for r in results]), np.concatenate([r.losses for r in results])


def count_frozen(adapted: AdaptedModel, examples: Examples) -> int:
    found = frozen_blocks(adapted.model, adapted.task.collate(examples, [np.arange(2)]).inputs)
    return 0 if found is None else len(found.blocks)


@pytest.mark.parametrize("make", [lambda: bert([2]), lambda: bert([1, 2]), llama])
@pytest.mark.parametrize("kind", [Batched, Looped])
def test_training_and_scores_are_those_of_the_whole_model(
    make: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, whole = make(), make()
    examples = examples_of(adapted)

    def forward(model: AdaptedModel) -> Forward:
        made: Forward = (
            Batched(model.model, list(model.parameter_names.values())) if kind is Batched else kind(model.model)
        )
        return made

    change, losses = trained(adapted, examples, forward(adapted))
    scores = score(adapted, examples)
    assert PREFIX in adapted.batch(examples, [np.arange(3)]).inputs
    monkeypatch.setattr(prefix, "PREFIX_BYTES", 0)
    expected, expected_losses = trained(whole, examples, forward(whole))
    assert PREFIX not in whole.batch(examples, [np.arange(3)]).inputs
    assert np.linalg.norm(change - expected) <= 1e-5 * np.linalg.norm(expected)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    np.testing.assert_allclose(scores.loss, score(whole, examples).loss, rtol=1e-4)


@pytest.mark.parametrize(("layers", "frozen"), [(None, 0), ([0], 0), ([0, 2], 0), ([1], 1), ([2], 2), ([1, 2], 1)])
def test_the_blocks_below_the_lowest_that_trains_are_frozen(layers: list[int] | None, frozen: int) -> None:
    adapted = bert(layers)
    assert count_frozen(adapted, examples_of(adapted)) == frozen


def test_under_a_head_alone_every_block_is_frozen() -> None:
    adapted = bert([2])
    for name, parameter in adapted.model.named_parameters():
        parameter.requires_grad_(".classifier.modules_to_save" in name)
    assert count_frozen(adapted, examples_of(adapted)) == 3


def test_images_have_frozen_blocks_but_their_states_are_not_kept() -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(**(SIZES | {"num_hidden_layers": 3}), image_size=8, patch_size=4, num_labels=3)
    )
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2], modules_to_save=["classifier"])
    adapted = adapt(get_peft_model(model, config), ImageClassification(None))
    pixels = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    examples = Examples(list(pixels), list(np.zeros(4, np.int64)), np.arange(4))
    assert count_frozen(adapted, examples) == 2
    assert PREFIX not in adapted.batch(examples, [np.arange(2)]).inputs


def test_states_do_not_depend_on_what_else_was_asked_for() -> None:
    adapted = bert([2])
    examples = examples_of(adapted, 200)
    alike, other = copy.deepcopy(adapted), copy.deepcopy(adapted)
    alike.prepare(examples, np.arange(200))
    for index in np.random.default_rng(1).permutation(200):
        other.prepare(examples, np.array([index]))
    states = [m.batch(examples, [np.arange(200)]).inputs[PREFIX] for m in (alike, other)]
    assert torch.equal(*states)


def test_padding_is_zero_and_short_members_are_filled() -> None:
    adapted = bert([2])
    examples = examples_of(adapted)
    batch = adapted.batch(examples, [np.array([4, 7]), np.array([1])])
    own = [len(examples.inputs[i]) for i in (4, 7, 1)]
    states = batch.inputs[PREFIX]
    assert states.shape == (4, max(own), 32)
    for row, length in enumerate([*own, 0]):
        assert not states[row, length:].any()
        assert states[row, :length].all(-1).all()


def test_a_copy_of_the_model_has_frozen_blocks_of_its_own() -> None:
    adapted = bert([2])
    examples = examples_of(adapted)
    before = score(adapted, examples).loss
    other = copy.deepcopy(adapted)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    plain = other.model(**other.task.collate(examples, [np.arange(3)]).inputs).logits
    own = adapted.model(**adapted.task.collate(examples, [np.arange(3)]).inputs).logits
    assert not torch.allclose(plain, own)
    np.testing.assert_array_equal(score(adapted, examples).loss, before)


def test_removed_blocks_leave_the_model_as_it_was() -> None:
    adapted = bert([2])
    inputs = adapted.task.collate(examples_of(adapted), [np.arange(2)]).inputs
    before = adapted.model(**inputs).logits
    found = frozen_blocks(adapted.model, inputs)
    assert found is not None
    found.remove()
    assert torch.equal(adapted.model(**inputs).logits, before)
    assert all("forward" not in vars(block) for block in found.blocks)


class Skipping(nn.Module):
    """A model whose head looks at an early block too, past the last frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.blocks[:2].requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        first = self.blocks[0](x)
        y = self.blocks[2](self.blocks[1](first))
        return type("Output", (), {"logits": y + first})


def test_a_model_that_reads_an_early_block_is_run_whole() -> None:
    x = torch.randn((2, 3, 4), generator=torch.Generator().manual_seed(0))
    model = Skipping()
    assert frozen_blocks(model, {"x": x}) is None
    found = FrozenBlocks(model, list(model.blocks)[:2])  # what would have come of it
    wrong = model(x=x, **{PREFIX: found.states({"x": x})}).logits
    assert not torch.allclose(wrong, model(x=x).logits)


def test_models_of_one_base_share_their_states() -> None:
    """What another model has computed serves, where as many blocks are frozen; where not, it does not."""
    first, alike, other = bert([2]), bert([2], use_rslora=True), bert([1, 2])
    examples = examples_of(first)
    score(first, examples)
    for adapted in (alike, other):
        expected = score(copy.deepcopy(adapted), examples).loss
        adapted.prefix.share(first.prefix)
        assert PREFIX in adapted.batch(examples, [np.arange(3)]).inputs
        np.testing.assert_allclose(score(adapted, examples).loss, expected, rtol=1e-5)
