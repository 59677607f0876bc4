"""Merging by scores and by certainty, beside transformers' and peft's own models of the same adapters."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedapt.adapters import read_adapter
from fedapt.client.models import load_model
from fedapt.kernels.lowrank import Matrix
from fedapt.merging import merge_adapters
from fedapt.protocols.errors import DataError, ModelError
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Description
from fedapt.server.export import save_adapter

from ..sim import conftest as sim
from .running import in_process

SpecOf = Callable[..., RunSpec]
PREFIX = "base_model.model."
folder, spec_of = sim.folder, sim.spec_of  # the fixtures: a tiny BERT, and rows for it


@pytest.fixture
def adapters(spec_of: SpecOf, tmp_path: Path) -> list[Path]:
    """Five of two ranks that have gone anywhere from the base, heads too."""
    folders = []
    for number in range(5):
        adapted = load_model(spec_of(f"adapter.rank={2 + 2 * (number % 2)}", "recipe.name=fedit"))
        noise = np.random.default_rng(number).standard_normal(adapted.layout.size).astype(np.float32)
        start = adapted.read()
        description = Description(adapted.layout, start, adapted.config(), "")
        folders.append(tmp_path / f"a{number}")
        save_adapter(folders[-1], description, start + np.float32(0.3) * noise)
    return folders


@pytest.fixture
def rows(folder: Path) -> Path:
    return folder / "test.jsonl"


def stock(base: Path, adapter: Path) -> torch.nn.Module:
    """The base with the adapter in its weights."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True)
    merged: torch.nn.Module = PeftModel.from_pretrained(model, adapter).eval().merge_and_unload()
    return merged


def losses_and_hits(model: torch.nn.Module, base: Path, rows: Path) -> list[tuple[torch.Tensor, bool]]:
    """The loss of each row alone, and whether it is told right."""
    tokenizer, found = AutoTokenizer.from_pretrained(base), []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        logits = model(**tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=128)).logits
        label = torch.tensor([row["label"]])
        found.append((functional.cross_entropy(logits, label), int(logits.argmax()) == row["label"]))
    return found


def accuracy(base: Path, adapter: Path, rows: Path) -> float:
    with torch.no_grad():
        return float(np.mean([hit for _, hit in losses_and_hits(stock(base, adapter), base, rows)]))


def test_a_greedy_soup_takes_in_what_lowers_no_score(
    folder: Path,
    rows: Path,
    adapters: list[Path],
    tmp_path: Path,
) -> None:
    """The recipe of the paper, over adapters that were merged and loaded one after another."""
    rank = max(read_adapter(adapter)[0]["r"] for adapter in adapters)
    own = [accuracy(folder / "base", adapter, rows) for adapter in adapters]
    order = sorted(range(len(adapters)), key=lambda k: -own[k])
    taken, best = order[:1], own[order[0]]
    for candidate in order[1:]:
        merge_adapters([adapters[k] for k in [*taken, candidate]], tmp_path / f"with{candidate}", rank=rank)
        if (reached := accuracy(folder / "base", tmp_path / f"with{candidate}", rows)) >= best:
            taken, best = [*taken, candidate], reached
    assert 1 < len(taken) < len(adapters), "some must be taken, and some left"

    facts = merge_adapters(adapters, tmp_path / "out", "greedy-soup", data=rows)
    assert facts["weights"] == [1 / len(taken) if k in taken else 0 for k in range(len(adapters))]
    assert facts["evaluation"]["accuracy"] == pytest.approx(best)
    merge_adapters([adapters[k] for k in sorted(taken)], tmp_path / "mean", rank=rank)
    for name, values in read_adapter(tmp_path / "mean")[1].items():
        if ".lora_" not in name:
            assert np.allclose(values, read_adapter(tmp_path / "out")[1][name], atol=1e-6)


def changes(adapter: Path) -> dict[str, Matrix]:
    """s·B·A by module, and the head, float64."""
    config, tensors = read_adapter(adapter)
    found = {}
    for name, values in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            scaling = config["lora_alpha"] / config["r"]
            found[module] = scaling * tensors[module + ".lora_B.weight"].astype(np.float64) @ values
        elif ".lora_" not in name:
            found[name] = values.astype(np.float64)
    return found


def information(base: Path, adapter: Path, rows: Path) -> dict[str, Matrix]:
    """The mean of squared gradients, one row after another, with respect to the weights of the merged model."""
    model, names = stock(base, adapter), list(changes(adapter))
    weights = [n.removeprefix(PREFIX) + ("" if n.endswith((".weight", ".bias")) else ".weight") for n in names]
    parameters = [model.get_parameter(weight).requires_grad_() for weight in weights]
    total = {name: np.zeros(parameter.shape) for name, parameter in zip(names, parameters, strict=True)}
    found = losses_and_hits(model, base, rows)
    for loss, _ in found:
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            total[name] += gradient.double().numpy() ** 2 / len(found)
    return total


def test_fisher_weighs_each_entry_of_the_change_with_what_adapters_know_of_it(
    folder: Path,
    rows: Path,
    adapters: list[Path],
    tmp_path: Path,
) -> None:
    members, weights = adapters[:3], [1.0, 2.0, 1.0]
    merge_adapters(members, tmp_path / "out", "fisher", data=rows, weights=weights, rank=32)
    merge_adapters(members, tmp_path / "mean", weights=weights, rank=32)
    merged, mean = changes(tmp_path / "out"), changes(tmp_path / "mean")
    own = [changes(adapter) for adapter in members]
    known = [information(folder / "base", adapter, rows) for adapter in members]
    for name in own[0]:
        sure = np.stack([facts[name] for facts in known])
        pull = np.maximum(sure, 1e-6 * sure.mean()) * np.reshape(weights, (-1, *[1] * (sure.ndim - 1)))
        expected = (pull * np.stack([change[name] for change in own])).sum(axis=0) / pull.sum(axis=0)
        assert np.linalg.norm(merged[name] - expected) <= 1e-3 * np.linalg.norm(expected)
        assert np.linalg.norm(mean[name] - expected) > 0.02 * np.linalg.norm(expected)  # the control


def test_the_command_scores_a_language_model_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, folders = tmp_path / "rows.jsonl", []
    rows.write_text('{"text": "def first(items):\\n    return items[0]"}\n{"text": "for line in lines: print(line)"}\n')
    raw = {
        "model": {"base": "builtin:byte-llama", "task": "causal-lm"},
        "adapter": {"rank": 2, "targets": ["q_proj"]},
        "recipe": {"name": "fedit"},
    }
    for number, scale in enumerate([0.0, 0.5]):
        adapted = load_model(RunSpec.check(raw))
        start = adapted.read()
        noise = np.random.default_rng(number).standard_normal(start.size).astype(np.float32)
        folders.append(tmp_path / str(number))
        description = Description(adapted.layout, start, adapted.config(), "")
        save_adapter(folders[-1], description, start + np.float32(scale) * noise)
    options = ["--data", rows, "--out", tmp_path / "soup", "--method", "greedy-soup"]
    code, text, _ = in_process(capsys, "adapter", "merge", *folders, *options)
    assert code == 0
    assert f"in the soup: {folders[0]}; together loss" in text
    options = ["--data", rows, "--out", tmp_path / "fisher", "--method", "fisher", "--json"]
    code, text, _ = in_process(capsys, "adapter", "merge", *folders, *options)
    assert code == 0
    assert json.loads(text)["method"] == "fisher"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "w1", "label": "yes"}\n{"text": "w2", "label": "no"}', "2 different words, and the adapter has 3"),
        ('{"text": "w1", "label": 3}', "label 3 is not in the legal range 0..2"),
        ('{"text": "w1"}', 'no column "label"'),
        ("", "is empty"),
    ],
)
def test_rows_that_cannot_be_used(adapters: list[Path], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError) as caught:
        merge_adapters(adapters, tmp_path / "out", "fisher", data=tmp_path / "rows.jsonl")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_there(adapters: list[Path], rows: Path, tmp_path: Path) -> None:
    for adapter in adapters:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    with pytest.raises(ModelError, match=r"\./gone.*no such folder"):
        merge_adapters(adapters, tmp_path / "out", "greedy-soup", data=rows)
