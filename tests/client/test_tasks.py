"""Tasks with real tokenizers: what is encoded, what is padded, and that the loss is Hugging Face's own."""

from collections.abc import Sequence
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, ViTImageProcessor
from transformers.loss.loss_utils import ForCausalLMLoss, ForSequenceClassificationLoss

from fedapt.client.table import Table
from fedapt.client.tasks import (
    IGNORED,
    CausalLanguageModel,
    Examples,
    ImageClassification,
    SequenceClassification,
    Task,
    member_losses,
)
from fedapt.protocols.errors import DataError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "bad", "fine", "film", "##s", "very"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def byte_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(files("fedapt.client") / "builtin" / "byte-llama"))


@pytest.fixture
def word_tokenizer() -> Any:
    words = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def table(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict(columns)


def ids_of(examples: Examples) -> list[list[int]]:
    return [own.tolist() for own in examples.inputs]


# Classification


def test_texts_become_tokens_and_classes(word_tokenizer: Any) -> None:
    task = SequenceClassification(word_tokenizer, max_length=6)
    examples = task.encode(table(text=["a fine film", "bad", "very very very very films"], label=[1, 0, 2]))
    assert ids_of(examples) == [[2, 4, 6, 7, 3], [2, 5, 3], [2, 9, 9, 9, 9, 3]]
    assert [int(label) for label in examples.labels] == [1, 0, 2]
    assert examples.rows.tolist() == [0, 1, 2]
    assert examples.lengths.tolist() == [5, 3, 6]
    assert all(own.dtype == np.int64 for own in examples.inputs)


def test_short_members_are_filled_with_ignored_rows(word_tokenizer: Any) -> None:
    task = SequenceClassification(word_tokenizer, max_length=8, pad=7)
    examples = task.encode(table(text=["a fine film", "bad", "fine"], label=[1, 0, 2]))
    batch = task.collate(examples, [np.array([2, 1]), np.array([0])])
    assert batch.shapes == ((2, 3), (1, 5))
    assert batch.inputs["input_ids"].tolist() == [[2, 6, 3, 7, 7], [2, 5, 3, 7, 7], [2, 4, 6, 7, 3], [7] * 5]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [2, 0, 1, IGNORED]
    loss, counted, correct = task.losses(torch.eye(3)[[2, 1, 1, 0]], batch.labels)
    assert counted.tolist() == [1, 1, 1, 0]
    assert correct.tolist() == [1, 0, 1, 0]
    assert loss[3] == 0


def test_the_length_of_a_text_is_part_of_what_is_cached(word_tokenizer: Any) -> None:
    rows = table(text=["a very very fine film"], label=[0])
    lengths = [len(SequenceClassification(word_tokenizer, n).encode(rows).inputs[0]) for n in (7, 4, 7)]
    assert lengths == [7, 4, 7]


@given(st.lists(st.text("abc film", max_size=20), min_size=1, max_size=70), st.sampled_from([None, 4, 9]))
def test_a_plain_table_has_the_tokens_of_a_dataset(texts: list[str], max_length: int | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(files("fedapt.client") / "builtin" / "byte-llama"))
    rows: dict[str, list[Any]] = {"text": texts, "label": [len(text) for text in texts]}
    task: Task = CausalLanguageModel(tokenizer, 8)
    if max_length is not None:
        task = SequenceClassification(tokenizer, max_length)
    plain, other = task.encode(Table(rows)), task.encode(table(**rows))
    assert ids_of(plain) == ids_of(other)
    assert plain.rows.tolist() == other.rows.tolist()
    assert [own.tolist() for own in plain.labels] == [own.tolist() for own in other.labels]
    assert {own.dtype for own in (*plain.inputs, *plain.labels)} <= {np.dtype(np.int64)}


# Language models


@settings(max_examples=20)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4), st.integers(2, 20))
def test_blocks_of_a_long_text_lose_nothing(texts: list[str], max_length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(files("fedapt.client") / "builtin" / "byte-llama"))
    examples = CausalLanguageModel(tokenizer, max_length).encode(table(text=texts))
    assert examples.lengths.max(initial=2) <= max_length
    assert examples.lengths.min(initial=2) >= 2
    for row, text in enumerate(texts):
        whole = tokenizer(text)["input_ids"]
        blocks = [own.tolist() for own, of in zip(examples.inputs, examples.rows, strict=True) if of == row]
        joined = [token for block in blocks for token in block]
        # A last block of one token has nothing to predict it from.
        assert joined == whole[: len(joined)]
        assert len(whole) - len(joined) == (len(whole) % max_length == 1)
    assert [x.tolist() for x in examples.labels] == ids_of(examples)


def test_only_the_response_is_a_target(byte_tokenizer: Any) -> None:
    task = CausalLanguageModel(byte_tokenizer, max_length=64)
    examples = task.encode(table(prompt=["Say hi. \n"], response=["hi"]))
    before = byte_tokenizer("Say hi.\n")["input_ids"]
    after = [*byte_tokenizer("hi", add_special_tokens=False)["input_ids"], byte_tokenizer.eos_token_id]
    assert ids_of(examples) == [before + after]
    assert examples.labels[0].tolist() == [IGNORED] * len(before) + after


@pytest.mark.parametrize("template", [None, TEMPLATE])
@settings(max_examples=20)
@given(st.text(max_size=30), st.text("abcé", min_size=1, max_size=30), st.integers(2, 40))
def test_a_long_prompt_loses_its_beginning(template: str | None, prompt: str, response: str, max_length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(files("fedapt.client") / "builtin" / "byte-llama"))
    tokenizer.chat_template = template
    rows = table(prompt=[prompt], response=[response])
    (whole,) = CausalLanguageModel(tokenizer, 1000).encode(rows).labels
    targets = whole[whole != IGNORED]
    examples = CausalLanguageModel(tokenizer, max_length).encode(rows)
    labels, ids = examples.labels[0], examples.inputs[0]
    assert len(ids) == len(labels) == min(max_length, len(whole))
    kept = labels[labels != IGNORED]
    assert kept.tolist() == targets[: max_length - 1].tolist()
    assert tokenizer.decode(targets).startswith(response)
    assert labels[0] == IGNORED  # something is left to predict the first target from
    assert ids[labels != IGNORED].tolist() == kept.tolist()


def test_a_chat_template_is_used(byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = TEMPLATE
    examples = CausalLanguageModel(byte_tokenizer, 100).encode(table(prompt=["Hi?"], response=["Yes."]))
    ids, labels = examples.inputs[0], examples.labels[0]
    assert byte_tokenizer.decode(ids) == "<user>Hi?<|eos|><assistant>Yes.<|eos|>"
    assert byte_tokenizer.decode(labels[labels != IGNORED]) == "Yes.<|eos|>"


def test_a_template_that_rewrites_the_prompt_is_refused(byte_tokenizer: Any) -> None:
    byte_tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(DataError, match="chat template"):
        CausalLanguageModel(byte_tokenizer, 100).encode(table(prompt=["Hi?"], response=["Yes."]))


def test_a_padded_batch_of_texts(byte_tokenizer: Any) -> None:
    task = CausalLanguageModel(byte_tokenizer, 64)
    examples = task.encode(table(prompt=["a", "bb"], response=["c", "dd"]))
    batch = task.collate(examples, [np.array([0]), np.array([1, 0])])
    rows, length = 2, max(examples.lengths)
    assert batch.inputs["input_ids"].shape == (2 * rows, length)
    assert batch.shapes == ((1, examples.lengths[0]), (2, length))
    assert batch.labels[1].tolist() == [IGNORED] * length
    assert batch.labels[2].tolist() == examples.labels[1].tolist()
    assert (batch.labels[3] != IGNORED).sum() == 2
    assert batch.inputs["attention_mask"].sum(1).tolist() == [examples.lengths[0], 1, length, examples.lengths[0]]


# Losses


def ragged(members: Sequence[int], seed: int, causal: bool) -> tuple[Examples, list[Any]]:
    random = np.random.default_rng(seed)
    count = sum(members)
    inputs = [random.integers(0, 9, random.integers(2, 7)) for _ in range(count)]
    labels: list[Any] = [np.int64(label) for label in random.integers(0, 3, count)]
    if causal:
        labels = [np.where(random.random(len(text)) < 0.4, IGNORED, text) for text in inputs]
        for own in labels:
            own[-1] = 1  # a member without a target has no loss to compare
    return Examples(inputs, labels, np.arange(count)), np.split(np.arange(count), np.cumsum(members)[:-1])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 999))
def test_a_members_loss_is_that_of_transformers(members: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for causal in (False, True):
        task: Any = (CausalLanguageModel if causal else SequenceClassification)(None, 16)
        examples, own = ragged(members, seed, causal)
        batch = task.collate(examples, own)
        rows, length = batch.inputs["input_ids"].shape
        logits = torch.randn((rows, length, 9) if causal else (rows, 3), generator=generator)
        losses = member_losses(task, logits, batch.labels, len(members))
        for member, (count, longest) in enumerate(batch.shapes):
            first = member * rows // len(members)
            mine, labels = logits[first : first + count], batch.labels[first : first + count]
            if causal:
                expected = ForCausalLMLoss(mine[:, :longest].contiguous(), labels[:, :longest], vocab_size=9)
            else:
                config: Any = SimpleNamespace(num_labels=3, problem_type="single_label_classification")
                expected = ForSequenceClassificationLoss(labels, mine, config)
            assert float(losses[member]) == pytest.approx(float(expected), rel=1e-5)


def test_a_member_without_a_target_has_no_loss() -> None:
    task = SequenceClassification(None, 16)
    labels = torch.tensor([IGNORED, IGNORED, 1, IGNORED])
    losses = member_losses(task, torch.randn(4, 3, requires_grad=True), labels, 2)
    assert losses[0] == 0
    assert losses[1] > 0


# Images


def test_images_become_pixels() -> None:
    task = ImageClassification(ViTImageProcessor(size={"height": 8, "width": 8}))
    pictures = [Pillow.new("L", (20, 10), 255), Pillow.new("RGB", (5, 5), (255, 0, 0)), Pillow.new("RGBA", (8, 8))]
    rows = Dataset.from_dict(
        {"image": pictures, "label": [2, 0, 1]}, features=Features({"image": Image(), "label": Value("int64")})
    )
    examples = task.encode(rows)
    assert [x.shape for x in examples.inputs] == [(3, 8, 8)] * 3
    assert all(x.dtype == np.float32 for x in examples.inputs)
    assert np.allclose(examples.inputs[0], 1)  # white, normalized by mean 0.5 and deviation 0.5
    assert np.allclose(examples.inputs[1][1], -1)
    batch = task.collate(examples, [np.array([0, 1]), np.array([2])])
    pixels = batch.inputs["pixel_values"]
    assert pixels.shape == (4, 3, 8, 8)
    assert np.array_equal(pixels[2].numpy(), examples.inputs[2])
    assert not pixels[3].any()
    assert batch.labels.tolist() == [2, 0, 1, IGNORED]
    assert [rows for rows, _ in batch.shapes] == [2, 1]


def test_an_image_counts_as_its_patches() -> None:
    """Chunks are bounded by rows × length: an image of 3 "tokens" would fill the memory."""
    images = [np.zeros((3, 224, 224), np.float32), np.zeros((1, 8, 8), np.float32)]
    assert Examples(images, [np.array(0)] * 2, np.arange(2)).lengths.tolist() == [196, 1]
