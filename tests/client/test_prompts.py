"""Classification by asking a language model: what is asked, what counts as the answer, and that it trains."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedapt.client.evaluation import score
from fedapt.client.models import load_model
from fedapt.client.sources import load_tables
from fedapt.client.tasks import PromptedClassification, member_losses, prompted
from fedapt.protocols.errors import DataError, ModelError, SpecError
from fedapt.protocols.spec import Model, RunSpec
from fedapt.simulation import run

from .tiny import SIZES

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "it", "was", "great", "bad", "good", "film", "a", "dull"]
TASK = {"task": "prompted-classification", "labels": 2, "template": "{text} it was", "verbalizers": ("bad", "great")}


def tokenizer_of(*, ends: bool = False) -> Any:
    """Whole words, behind a first token and, where asked for, before a last one."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def task_of(tokenizer: Any = None, max_length: int = 12, **own: Any) -> PromptedClassification:
    model = Model.check({"base": "m", "max_length": max_length, **TASK, **own})
    return prompted(tokenizer or tokenizer_of(), model)


def table(*texts: str) -> Dataset:
    return Dataset.from_dict({"text": list(texts), "label": [i % 2 for i in range(len(texts))]})


@pytest.mark.parametrize("ends", [False, True])
def test_the_prompt_ends_where_the_answer_begins(ends: bool) -> None:
    task = task_of(tokenizer_of(ends=ends))
    examples = task.encode(table("a film", "dull"))
    assert [own.tolist() for own in examples.inputs] == [[1, 10, 9, 4, 5], [1, 11, 4, 5]]
    assert task.words == (7, 6)
    batch = task.collate(examples, [np.array([0, 1]), np.array([1])])
    assert batch.labels.tolist() == [
        [-100] * 4 + [0],
        [-100] * 3 + [1, -100],
        [-100] * 3 + [1, -100],
        [-100] * 5,
    ]


def test_a_text_that_is_too_long_loses_its_end_and_never_the_template() -> None:
    (own,) = task_of(max_length=5).encode(table("a good film a good film")).inputs
    assert own.tolist() == [1, 10, 8, 4, 5]
    with pytest.raises(DataError, match="leaves no room for a text"):
        task_of(max_length=2).encode(table("a"))


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_the_loss_is_the_cross_entropy_over_the_verbalizers_at_the_last_position(
    lengths: Sequence[int], seed: int
) -> None:
    """MeZO's way, one row at a time."""
    task = task_of()
    examples = task.encode(table(*(" ".join(["film"] * length) for length in lengths)))
    batch = task.collate(examples, [np.arange(len(lengths))])
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch.labels.shape, len(WORDS), generator=random)
    loss, counted, correct = task.losses(logits, batch.labels)
    assert counted.tolist() == [1] * len(lengths)
    for row, ids in enumerate(examples.inputs):
        own = logits[row, len(ids) - 1, list(task.words)]
        label = int(examples.labels[row])
        assert loss[row].item() == pytest.approx(functional.cross_entropy(own, torch.tensor(label)).item(), abs=1e-6)
        assert bool(correct[row]) == (int(own.argmax()) == label)
    assert member_losses(task, logits, batch.labels, 1)[0].item() == pytest.approx(loss.mean().item(), abs=1e-6)


def test_a_verbalizer_of_many_tokens_is_known_by_its_first() -> None:
    """Of single bytes: a word's first, or the space before it, which tells nothing apart."""
    tokenizer = AutoTokenizer.from_pretrained(str(files("fedapt.client") / "builtin" / "byte-llama"))
    task = task_of(tokenizer, template="{text} It was ", max_length=64)
    assert tokenizer.decode(task.words) == "bg"
    assert tokenizer.decode(task.encode(table("Yes.")).inputs[0]) == "Yes. It was "
    with pytest.raises(ModelError, match=r"'bad' \(' '\), 'great' \(' '\) do not tell them apart"):
        task_of(tokenizer, template="{text} It was")
    with pytest.raises(ModelError, match=r"'bad' .*, 'baffling'"):
        task_of(tokenizer, template="{text} It was ", verbalizers=("bad", "baffling"))


def test_a_word_that_the_tokenizer_does_not_know_is_refused() -> None:
    with pytest.raises(ModelError, match="'splendid'"):
        task_of(verbalizers=("bad", "splendid"))


def test_a_template_that_runs_into_the_answer_is_refused() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "x": 1, " ": 2, "b": 3, " b": 4, "c": 5}, [(" ", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ModelError, match="makes one token of its end and of the verbalizer 'b'"):
        task_of(tokenizer, template="{text}x ", verbalizers=("b", "c"))
    assert task_of(tokenizer, template="{text}x", verbalizers=("b", "c")).words == (4, 2)


@pytest.mark.parametrize(
    ("own", "problem"),
    [
        ({"template": None}, "has to hold {text} once"),
        ({"template": "it was"}, "has to hold {text} once"),
        ({"template": "{text} {text}"}, "has to hold {text} once"),
        ({"verbalizers": ("bad",)}, "does not have 2 different words, one for each of labels = 2"),
        ({"verbalizers": ("bad", "bad")}, "does not have 2 different words"),
        ({"labels": 3}, "does not have 3 different words"),
        ({"labels": None}, "labels is missing"),
        ({"task": "causal-lm", "labels": None}, "template and verbalizers are of task"),
    ],
)
def test_what_does_not_fit_is_said(own: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError) as raised:
        Model.check({"base": "m", **TASK, **own})
    assert problem in str(raised.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama small enough to make here, and rows that it can learn to answer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": len(WORDS), "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    random = np.random.default_rng(0)
    rows = [("dull", "good")[i % 2] + " film" * int(random.integers(1, 4)) for i in range(48)]
    table(*rows).to_json(folder / "rows.jsonl")
    return folder


def spec_of(base: Path, recipe: str, *overrides: str) -> RunSpec:
    raw = {
        "model": {"base": str(base), "max_length": 12, **TASK},
        "adapter": {"rank": 4, "targets": ["q_proj", "v_proj"]},
        "recipe": {"name": recipe},
        "data": {"source": str(base / "rows.jsonl"), "holdout": 0.25, "partition": {"clients": 3}},
    }
    return RunSpec.check(raw).set(*overrides)


FIRST_ORDER = ("run.rounds=6", "local.learning_rate=0.03", "local.batch_size=8", "local.steps=4")
ZEROTH = (
    "recipe.weighting=uniform",
    "run.rounds=60",
    "run.evaluate_every=30",
    "zeroth.directions=8",
    "zeroth.radius=1e-2",
    "local.learning_rate=0.1",
    "local.batch_size=8",
)


@pytest.mark.parametrize(("recipe", "own"), [("fedit", FIRST_ORDER), ("onebyte", ZEROTH)])
def test_it_trains_with_gradients_and_without(recipe: str, own: Sequence[str], base: Path, tmp_path: Path) -> None:
    rows = run(spec_of(base, recipe, *own), tmp_path / "out").metrics
    first, last = rows[0]["evaluation"], rows[-1]["evaluation"]
    assert last["loss"] < 0.7 * first["loss"]
    assert last["accuracy"] == 1.0 > first["accuracy"]


def test_its_scores_are_those_of_the_bare_model(base: Path) -> None:
    spec = spec_of(base, "fedit")
    adapted = load_model(spec)
    assert spec.data is not None
    rows = load_tables(spec.data, spec.model, 0).train
    found = score(adapted, adapted.task.encode(rows)).metrics(adapted.task)
    own, tokenizer, right = LlamaForCausalLM.from_pretrained(base), tokenizer_of(), []
    for row in rows:
        ids = torch.tensor([tokenizer(row["text"] + " it was")["input_ids"]])
        bad, great = own(ids).logits[0, -1, [7, 6]].tolist()
        right.append((great > bad) == bool(row["label"]))
    assert found["accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_do_not_move_the_last_position(method: str, base: Path) -> None:
    adapted = load_model(spec_of(base, "fedit", f"adapter.method={method}", "adapter.virtual_tokens=3"))
    examples = adapted.task.encode(table("a film", "dull"))
    batch = adapted.batch(examples, [np.arange(2)])
    logits = adapted.model(**batch.inputs).logits
    assert logits.shape[:2] == batch.labels.shape
