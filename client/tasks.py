"""Tasks: rows of a table ⇒ encoded examples ⇒ padded batches ⇒ one loss for each member.

A task knows nothing of adapters or federation. Labels of −100 are never counted, as in Hugging Face models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..protocols.errors import DataError, ModelError
from ..protocols.spec import Model
from .table import Table

IGNORED = -100
BATCH = 64
"""Texts that are tokenized together."""

Array = np.ndarray[Any, np.dtype[Any]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Examples:
    """Encoded examples: ready to be padded and stacked. Two sets are equal only if they are the same object.

    `inputs[i]` are token ids (n,) int64, or pixels (channels, height, width) float32; `labels[i]` is a class index
    or, for causal language models, a vector beside the token ids. `rows[i]` is the row of the table it came from:
    a long text gives several examples.
    """

    inputs: Sequence[Array]
    labels: Sequence[Array]
    rows: Array

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def lengths(self) -> Indices:
        """How much work each example is: its tokens; of an image, its patches of 16 × 16 pixels (int64, (len,))."""
        return np.array(
            [len(x) if x.ndim == 1 else -(-x.shape[-2] * x.shape[-1] // 256) for x in self.inputs], np.int64
        )


@dataclass(frozen=True)
class Batch:
    """A padded batch of C members with b rows each, member-major, on the model's device.

    `shapes[m]` are member m's own (rows, length) before padding.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    shapes: tuple[tuple[int, int], ...]


class Task(Protocol):
    """What a model is trained for."""

    @property
    def metric(self) -> Literal["accuracy", "perplexity"]: ...

    def encode(self, table: Table) -> Examples:
        """Tokenize or preprocess a whole table once."""

    def collate(self, examples: Examples, members: Sequence[Array]) -> Batch:
        """`members[m]` are the indices of member m's examples; short members are filled with ignored rows."""

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each row of the batch: summed loss, counted targets, correct predictions, each (C·b,)."""


def member_losses(task: Task, logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Each member's mean loss over its counted targets, (C,): what stock training of that member would minimize."""
    loss, counted, _ = task.losses(logits, labels)
    return loss.view(count, -1).sum(1) / counted.view(count, -1).sum(1).clamp(min=1)


def _token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`losses` over the last axis of `logits`; any axes of `labels` beyond the first are summed."""
    flat = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    rows = labels.shape[0]
    counted = labels != IGNORED
    correct = (logits.argmax(-1) == labels) & counted
    return flat.view(rows, -1).sum(1), counted.view(rows, -1).sum(1), correct.view(rows, -1).sum(1)


def _pad_tokens(sequences: Sequence[Sequence[Array]], fill: int, rows: int, length: int) -> Array:
    """(C·rows, length) int64 from ragged members of ragged sequences."""
    padded = np.full((len(sequences), rows, length), fill, np.int64)
    for m, member in enumerate(sequences):
        for i, sequence in enumerate(member):
            padded[m, i, : len(sequence)] = sequence
    return padded.reshape(len(sequences) * rows, length)


def _token_batch(examples: Examples, members: Sequence[Array], pad: int) -> tuple[dict[str, Tensor], Any, int, int]:
    """Padded ids and mask of a batch, with each member's own shape and the common (rows, length)."""
    shapes = tuple((len(own), int(examples.lengths[own].max(initial=1))) for own in members)
    rows, length = max(s[0] for s in shapes), max(s[1] for s in shapes)
    ids = _pad_tokens([[examples.inputs[i] for i in own] for own in members], pad, rows, length)
    mask = np.zeros((len(members), rows, length), np.int64)
    for m, own in enumerate(members):
        mask[m, : len(own)] = np.arange(length) < examples.lengths[own][:, None]
    mask[:, :, 0] = 1  # a row that attends to nothing would be NaN
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.reshape(ids.shape))}
    return inputs, shapes, rows, length


def _row_labels(examples: Examples, members: Sequence[Array], rows: int) -> Tensor:
    labels = np.full((len(members), rows), IGNORED, np.int64)
    for m, own in enumerate(members):
        labels[m, : len(own)] = [examples.labels[i] for i in own]
    return torch.from_numpy(labels.ravel())


def _labels(table: Table) -> Array:
    """The classes of all rows, (n,) int64."""
    return np.asarray(table["label"][:], np.int64)


@dataclass(frozen=True)
class SequenceClassification:
    """One label for a text. `tokenizer` is any Hugging Face tokenizer; `pad` its padding id."""

    tokenizer: Any
    max_length: int
    pad: int = 0
    metric: Literal["accuracy"] = "accuracy"

    def encode(self, table: Table) -> Examples:
        ids = _tokenize(self.tokenizer, table, "text", self.max_length)
        return Examples(ids, list(_labels(table)), np.arange(len(table)))

    def collate(self, examples: Examples, members: Sequence[Array]) -> Batch:
        inputs, shapes, rows, _ = _token_batch(examples, members, self.pad)
        return Batch(inputs, _row_labels(examples, members, rows), shapes)

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _token_losses(logits, labels)


@dataclass(frozen=True)
class CausalLanguageModel:
    """The next token of a text, or of a response after a prompt that is not itself a target.

    A plain text longer than `max_length` is cut into blocks, none of it lost. A prompt longer than its share loses
    its beginning, never the response.
    """

    tokenizer: Any
    max_length: int
    pad: int = 0
    metric: Literal["accuracy", "perplexity"] = "perplexity"

    def encode(self, table: Table) -> Examples:
        return self._dialogues(table) if "prompt" in table.column_names else self._texts(table)

    def _texts(self, table: Table) -> Examples:
        blocks, rows = [], []
        for row, ids in enumerate(_tokenize(self.tokenizer, table, "text", None)):
            for start in range(0, len(ids), self.max_length):
                block = ids[start : start + self.max_length]
                if len(block) > 1:  # one token alone predicts nothing
                    blocks.append(block)
                    rows.append(row)
        return Examples(blocks, blocks, np.array(rows, np.int64))

    def _dialogues(self, table: Table) -> Examples:
        inputs, labels = [], []
        for prompt, response in zip(table["prompt"], table["response"], strict=True):
            before, after = self._prompt_and_response(prompt, response)
            after = after[: self.max_length - 1]
            before = before[max(0, len(before) + len(after) - self.max_length) :]
            inputs.append(np.array(before + after, np.int64))
            labels.append(np.array([IGNORED] * len(before) + after, np.int64))
        return Examples(inputs, labels, np.arange(len(table)))

    def _prompt_and_response(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Token ids before and from the response on, in the tokenizer's chat template where it has one."""
        if self.tokenizer.chat_template:
            opening = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            whole = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], tokenize=False
            )
            if not whole.startswith(opening):
                raise DataError("the tokenizer's chat template rewrites the prompt when a response follows it")
            before = self.tokenizer(opening, add_special_tokens=False)["input_ids"]
            after = self.tokenizer(whole[len(opening) :], add_special_tokens=False)["input_ids"]
            return before, after
        before = self.tokenizer(prompt.rstrip() + "\n")["input_ids"]
        after = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return before, [*after, self.tokenizer.eos_token_id]

    def collate(self, examples: Examples, members: Sequence[Array]) -> Batch:
        inputs, shapes, rows, length = _token_batch(examples, members, self.pad)
        labels = _pad_tokens([[examples.labels[i] for i in own] for own in members], IGNORED, rows, length)
        return Batch(inputs, torch.from_numpy(labels), shapes)

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _token_losses(logits[:, :-1], labels[:, 1:])


@dataclass(frozen=True)
class PromptedClassification(CausalLanguageModel):
    """One label for a text, asked of a language model: which of its `verbalizers` follows the prompt (MeZO, arXiv
    2305.17333, appendix E; LM-BFF, arXiv 2012.15723, §3).

    The loss is the cross-entropy over the verbalizers' first tokens, `words`, at the prompt's last position; all other
    tokens are left out of the softmax. A text that is too long loses its end, never the template.
    """

    template: str = "{text}"
    words: tuple[int, ...] = ()
    metric: Literal["accuracy", "perplexity"] = "accuracy"

    def encode(self, table: Table) -> Examples:
        before, after = self.template.split("{text}")
        tail = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        if len(tail) >= self.max_length:
            raise DataError(
                f"model.max_length = {self.max_length} leaves no room for a text: what follows {{text}} in model.template "
                f"has {len(tail)} tokens. Choose a larger max_length."
            )
        inputs = []
        for text in table["text"]:
            ids = self.tokenizer(before + text + after, verbose=False)["input_ids"]
            if ids[-1] == self.tokenizer.eos_token_id:  # what follows an end is no answer
                ids = ids[:-1]
            if len(ids) > self.max_length:
                ids = ids[: self.max_length - len(tail)] + ids[len(ids) - len(tail) :]
            inputs.append(np.array(ids, np.int64))
        return Examples(inputs, list(_labels(table)), np.arange(len(table)))

    def collate(self, examples: Examples, members: Sequence[Array]) -> Batch:
        inputs, shapes, rows, length = _token_batch(examples, members, self.pad)
        labels = np.full((len(members), rows, length), IGNORED, np.int64)
        for m, own in enumerate(members):
            labels[m, np.arange(len(own)), examples.lengths[own] - 1] = [examples.labels[i] for i in own]
        return Batch(inputs, torch.from_numpy(labels.reshape(-1, length)), shapes)

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _token_losses(logits[..., list(self.words)], labels)


def prompted(tokenizer: Any, model: Model) -> PromptedClassification:
    """The task of a spec with a template. Raises ModelError where the verbalizers' first tokens do not tell them apart."""
    template = str(model.template)
    words = tuple(_first_token(tokenizer, template, verbalizer) for verbalizer in model.verbalizers)
    if len(set(words)) < len(words) or tokenizer.unk_token_id in words:
        shown = ", ".join(f"{v!r} ({tokenizer.decode([w])!r})" for v, w in zip(model.verbalizers, words, strict=True))
        raise ModelError(
            f"model.verbalizers: the first tokens of {shown} do not tell them apart, and the loss looks at no more. "
            "Choose words that begin with different tokens; where the first token is the space before a word, let "
            "model.template end with one."
        )
    return PromptedClassification(
        tokenizer, model.max_length, tokenizer.pad_token_id or 0, template=template, words=words
    )


def _first_token(tokenizer: Any, template: str, verbalizer: str) -> int:
    """What a verbalizer begins with where it follows the template: a word alone may have other tokens."""
    context = "a" + template.split("{text}")[1]
    gap = "" if context[-1].isspace() else " "
    before, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, context + gap + verbalizer)
    )
    if whole[: len(before)] != before or len(whole) == len(before):
        raise ModelError(
            f"model.template = {template!r}: the tokenizer makes one token of its end and of the verbalizer "
            f"{verbalizer!r}. Let it not end with a space; one is put between the two."
        )
    return int(whole[len(before)])


@dataclass(frozen=True)
class ImageClassification:
    """One label for an image. `processor` is any Hugging Face image processor."""

    processor: Any
    metric: Literal["accuracy"] = "accuracy"

    def encode(self, table: Any) -> Examples:
        """`table` is a `datasets.Dataset`: images lie on disk, and are read as they are needed."""
        pixels = []
        for start in range(0, len(table), 256):
            images = [image.convert("RGB") for image in table[start : start + 256]["image"]]
            pixels += list(self.processor(images, return_tensors="np")["pixel_values"].astype(np.float32))
        return Examples(pixels, list(_labels(table)), np.arange(len(table)))

    def collate(self, examples: Examples, members: Sequence[Array]) -> Batch:
        rows = max(len(own) for own in members)
        first = examples.inputs[0]
        pixels = np.zeros((len(members), rows, *first.shape), np.float32)
        for m, own in enumerate(members):
            for i, index in enumerate(own):
                pixels[m, i] = examples.inputs[index]
        shapes = tuple((len(own), int(examples.lengths[0])) for own in members)
        inputs = {"pixel_values": torch.from_numpy(pixels).flatten(0, 1)}
        return Batch(inputs, _row_labels(examples, members, rows), shapes)

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _token_losses(logits, labels)


def _tokenize(tokenizer: Any, table: Table, column: str, max_length: int | None) -> list[Array]:
    """Token ids (n,) int64 of every row; the datasets library caches them where it has the table from a file."""
    settings = {"truncation": max_length is not None, "max_length": max_length, "verbose": False}
    lean = {"return_attention_mask": False, "return_token_type_ids": False}

    def ids_of(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, **settings, **lean)["input_ids"]
        return ids

    if isinstance(table, Table):
        batches = (table[column][start : start + BATCH] for start in range(0, len(table), BATCH))
        return [np.array(row, np.int64) for texts in batches for row in ids_of(texts)]

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"ids": [np.asarray(row, np.int32) for row in ids_of(batch[column])]}

    tokenizer("", **settings)  # sets the truncation that is part of the tokenizer's serialized form, hashed below
    form = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab().items()))
    fingerprint = sha256("|".join((table._fingerprint, column, str(max_length), form)).encode()).hexdigest()[:32]
    encoded = table.map(
        encode, batched=True, batch_size=BATCH, remove_columns=table.column_names, new_fingerprint=fingerprint
    )
    ids = encoded.with_format("arrow")[:]["ids"].combine_chunks()  # at once: row by row takes longer than tokenizing
    bounds = np.cumsum(ids.value_lengths().to_numpy())
    return np.split(ids.flatten().to_numpy().astype(np.int64), bounds[:-1]) if len(bounds) else []
