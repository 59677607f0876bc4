"""The last block for its first token alone: the numbers of the whole block, and only where nothing else is read."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedapt.client.adapted import adapt
from fedapt.client.first_token import FirstTokenAttention, read_first_token
from fedapt.client.tasks import SequenceClassification
from fedapt.client.trainer import Trainer
from fedapt.kernels.cohort import Batched, Forward, Looped, with_gradients

from .test_prefix import LLAMA, LOCAL, TEXT, cohort_of, examples_of
from .tiny import SIZES

ENCODERS: dict[str, Any] = {
    "bert": (BertForSequenceClassification, BertConfig),
    "roberta": (RobertaForSequenceClassification, RobertaConfig),
    "electra": (ElectraForSequenceClassification, ElectraConfig),
}


def encoder(kind: str = "bert", attention: str = "sdpa", **lora: Any) -> PeftModel:
    torch.manual_seed(0)
    make, config = ENCODERS[kind]
    model = make(config(**TEXT | {"max_position_embeddings": 32}, num_labels=3, attn_implementation=attention)).eval()
    options = {"target_modules": ["query", "value", "dense"], "init_lora_weights": False} | lora
    return get_peft_model(model, LoraConfig(r=2, modules_to_save=["classifier"], **options))


def texts(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 100, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def numbers(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    return with_gradients(model(**inputs).logits, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", list(ENCODERS))
@settings(max_examples=6, deadline=None)
@given(rows=st.integers(1, 5), length=st.integers(1, 12), seed=st.integers(0, 99))
def test_logits_and_gradients_are_those_of_the_whole_block(
    kind: str, attention: str, rows: int, length: int, seed: int
) -> None:
    whole, short = encoder(kind, attention), encoder(kind, attention)
    assert read_first_token(short)
    inputs = texts(rows, length, seed)
    for actual, expected in zip(numbers(short, inputs), numbers(whole, inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_last_block_gives_one_token() -> None:
    model = encoder()
    read_first_token(model)
    shapes = []
    for block in model.get_submodule("base_model.model.bert.encoder.layer"):
        block.register_forward_hook(lambda _, args, output: shapes.append(tuple(output.shape)))
    model(**texts(2, 7, 0))
    assert shapes == [(2, 7, SIZES["hidden_size"])] * 2 + [(2, 1, SIZES["hidden_size"])]


@pytest.mark.parametrize("kind", [Batched, Looped])
def test_a_cohort_trains_as_on_the_whole_block(kind: Any) -> None:
    def changes(model: PeftModel) -> Any:
        adapted = adapt(model.double(), SequenceClassification(None, 16))
        forward: Forward = kind(model, list(adapted.parameter_names.values())) if kind is Batched else kind(model)
        examples = examples_of(adapted)
        trained = Trainer(adapted, forward, adapted.layout, LOCAL).train(examples, cohort_of(examples))
        return np.stack([member.change for member in trained])

    short, whole = encoder(), encoder()
    assert read_first_token(short)
    expected = changes(whole)
    assert np.linalg.norm(changes(short) - expected) <= 1e-9 * np.linalg.norm(expected)


class MeanPooled(BertForSequenceClassification):  # type: ignore[misc]
    """A classifier that reads every token."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        states = self.bert(*args, **kwargs).last_hidden_state
        output.logits = self.classifier(states.mean(1))
        return output


def test_a_model_that_reads_every_token_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = MeanPooled(BertConfig(**TEXT, num_labels=3)).eval()
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    inputs = texts(2, 7, 0)
    before = model(**inputs).logits
    assert not read_first_token(model)
    assert torch.equal(model(**inputs).logits, before)


def test_a_decoder_and_a_frozen_encoder_stay_as_they_are() -> None:
    config = LlamaConfig(**LLAMA, num_labels=3)
    decoder = get_peft_model(LlamaForSequenceClassification(config), LoraConfig(r=2, target_modules=["q_proj"]))
    assert not read_first_token(decoder)
    frozen = BertForSequenceClassification(BertConfig(**TEXT, num_labels=3))
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("classifier" in name)
    assert not read_first_token(frozen)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_its_own(copied: Any) -> None:
    model = encoder()
    read_first_token(model)
    other, inputs = copied(model), texts(2, 7, 0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    attention = other.get_submodule("base_model.model.bert.encoder.layer.2.attention")
    assert isinstance(attention.forward, FirstTokenAttention)
    assert attention.forward.attention is attention
    assert not torch.allclose(other(**inputs).logits, model(**inputs).logits)
