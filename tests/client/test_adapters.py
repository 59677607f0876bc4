"""Every kind of adapter on every kind of base: it starts alike, trains as the stock model would, and can be loaded."""

import copy
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import save_file
from transformers import ViTImageProcessor

from fedapt.client.adapted import AdaptedModel, adapt
from fedapt.client.evaluation import score
from fedapt.client.models import CLASSES, load_adapted_folder, load_model
from fedapt.client.tasks import Examples
from fedapt.client.trainer import Trainer
from fedapt.kernels.cohort import Forward, Looped, fastest
from fedapt.protocols.errors import ModelError, SpecError
from fedapt.protocols.spec import RunSpec

from .test_models import tokenizer
from .test_trainer import BASES, SGD, cohort_of, examples_for, relative, stock_batch

TASKS = {
    "bert": "sequence-classification",
    "llama": "causal-lm",
    "llama-head": "sequence-classification",
    "vit": "image-classification",
}
METHODS = ("lora", "dora", "adalora", "vera", "nola", "ia3", "prompt", "prefix", "bottleneck", "bias", "head", "full")
ILLEGAL = {
    ("llama", "bias"): "ia3",
    ("llama", "head"): "lora",
    ("llama-head", "bias"): "head",
    ("llama-head", "prompt"): "prefix",
    ("vit", "prompt"): "bottleneck",
    ("vit", "prefix"): "bottleneck",
}
LEGAL = [(kind, method) for kind in BASES for method in METHODS if (kind, method) not in ILLEGAL]
LANGUAGE = [(kind, method) for kind, method in LEGAL if kind != "vit"]
by_base_and_method = pytest.mark.parametrize(
    ("kind", "method"),
    [pair if pair[0] in ("bert", "llama") else pytest.param(*pair, marks=pytest.mark.slow) for pair in LEGAL],
)


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Whole models, heads included; the models of the tests are kept until the last one."""
    torch.manual_seed(0)
    for kind, (make, _, _, _) in BASES.items():
        FOLDERS[kind] = tmp_path_factory.mktemp(kind)
        make().save_pretrained(FOLDERS[kind])
        if kind == "vit":
            ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(FOLDERS[kind])
        else:
            tokenizer("<pad>").save_pretrained(FOLDERS[kind])
    yield FOLDERS
    moved.cache_clear()
    FOLDERS.clear()


FOLDERS: dict[str, Path] = {}


def spec_for(kind: str, method: str, *overrides: str) -> RunSpec:
    model: dict[str, Any] = {"base": str(FOLDERS[kind]), "task": TASKS[kind], "max_length": 16}
    if kind != "llama":
        model["labels"] = 3
    adapter = {"method": method, "rank": 2, "bases": 5, "virtual_tokens": 3, "bottleneck": 4}
    return RunSpec.check({"model": model, "adapter": adapter, "recipe": {"name": "fedit"}}).set(*overrides)


@cache
def moved(kind: str, method: str) -> AdaptedModel:
    """A model away from its start, where many tensors are zero and others have no gradient for that."""
    adapted = load_model(spec_for(kind, method))
    noise = np.random.default_rng(0).standard_normal(adapted.layout.size).astype(np.float32)
    adapted.write(adapted.read() + np.float32(0.05) * noise)
    return adapted


def names_of(adapted: AdaptedModel) -> list[str]:
    return [adapted.parameter_names[t.name] for t in adapted.layout.tensors]


def chosen(adapted: AdaptedModel, examples: Examples) -> Forward:
    rows = [np.array([0, 1]), np.array([0, 1])]
    return fastest(adapted.model, names_of(adapted), adapted.task.collate(examples, rows).inputs)


def stock_loss(model: Any, batch: dict[str, torch.Tensor], method: str) -> torch.Tensor:
    """Hugging Face's own loss; of AdaLoRA by hand, because peft adds a penalty to it that shapes no function."""
    if method != "adalora":
        loss: torch.Tensor = model(**batch).loss
        return loss
    labels = batch["labels"]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    if labels.dim() == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels)


def alone(kind: str, method: str, examples: Examples, batches: Any) -> Any:
    """One member's update by the stock model and torch.optim, in the layout's order."""
    adapted = moved(kind, method)
    model = copy.deepcopy(adapted.model).eval()
    own = [model.get_parameter(name) for name in names_of(adapted)]
    before = [parameter.detach().clone() for parameter in own]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=SGD.learning_rate)
    for batch in batches:
        optimizer.zero_grad()
        torch.autograd.backward(stock_loss(model, stock_batch(kind, examples, batch), method))
        optimizer.step()
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(own, before, strict=True)]).numpy()


@by_base_and_method
def test_a_cohort_gives_the_updates_of_training_one_after_another(kind: str, method: str) -> None:
    adapted = moved(kind, method)
    examples = examples_for(kind, 9, 0)
    cohort = cohort_of(examples, [1, 5, 3], SGD)
    expected = [alone(kind, method, examples, member.batches) for member in cohort]
    forward = chosen(adapted, examples)
    if os.environ.get("SHOW"):
        print("CHOSEN", kind, method, type(forward).__name__)
    for own in (forward, Looped(adapted.model)):
        results = Trainer(adapted, own, adapted.layout, SGD).train(examples, cohort)
        for result, change in zip(results, expected, strict=True):
            assert relative(result.change, change) <= 1e-5


@by_base_and_method
def test_every_tensor_is_trained(kind: str, method: str) -> None:
    adapted = moved(kind, method)
    examples = examples_for(kind, 6, 1)
    (result,) = Trainer(adapted, Looped(adapted.model), adapted.layout, SGD).train(
        examples, cohort_of(examples, [6], SGD)
    )
    still = {name for name, change in adapted.layout.split(result.change).items() if not change.any()}
    # A key's bias moves all scores of a query alike, and softmax does not see that.
    assert not {name for name in still if not name.endswith("key.bias") and not name.endswith("k_proj.bias")}


def logits_of(model: Any, kind: str) -> Any:
    """Of two rows as a user passes them; of the text alone, where a language model gives some for a prompt too."""
    examples = examples_for(kind, 2, 3)
    batch = stock_batch(kind, examples, [0, 1])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    return logits[:, -labels.shape[1] :] if kind == "llama" else logits


@by_base_and_method
def test_the_start_is_drawn_from_the_seed_alone(kind: str, method: str) -> None:
    """Two nodes have the same start, and compute the same from it, wherever their global generators stand."""
    models = []
    for state, seed in ((1, 3), (2, 3), (1, 4)):
        torch.manual_seed(state)
        models.append(load_model(spec_for(kind, method, f"run.seed={seed}")))
    starts = [model.read() for model in models]
    assert np.array_equal(starts[0], starts[1])
    assert np.array_equal(starts[0], starts[2]) == (method in {"vera", "ia3", "bias", "head", "full"})
    # What is frozen has to agree too: VeRA's projections and NOLA's bases are in no layout.
    for model in models:
        model.write(starts[0] + np.float32(0.1))
    one, two, other = (logits_of(model.model, kind) for model in models)
    assert torch.equal(one, two)
    assert torch.equal(one, other) == (method not in ("vera", "nola"))


@pytest.mark.parametrize(("kind", "method"), [pair for pair in LEGAL if pair[1] not in ("prompt", "prefix")])
def test_a_run_starts_from_the_function_of_the_base(kind: str, method: str) -> None:
    sizes = {} if kind == "llama" else {"num_labels": 3}
    base = CLASSES[TASKS[kind]].from_pretrained(FOLDERS[kind], **sizes)
    adapted = load_model(spec_for(kind, method))
    assert torch.allclose(logits_of(adapted.model, kind), logits_of(base, kind), atol=1e-6)
    assert not torch.allclose(logits_of(moved(kind, method).model, kind), logits_of(base, kind), atol=1e-3)


@by_base_and_method
def test_names_are_pefts_own(kind: str, method: str) -> None:
    adapted = moved(kind, method)
    own = {tensor.name for tensor in adapted.layout.tensors}
    copies = (".original_module.", ".modules_to_save.")  # a head's bias, which peft saves under its own name already
    saved = {name for name in get_peft_model_state_dict(adapted.model) if not any(c in name for c in copies)}
    if method in ("bottleneck", "nola", "full"):  # peft takes them for the base's
        model = dict(adapted.model.named_parameters())
        saved |= {name for name in own if name in model}
    assert own == saved
    roles = {tensor.role for tensor in adapted.layout.tensors}
    assert roles - {"other"} == ({"A", "B"} if method == "lora" else set())


@by_base_and_method
def test_a_saved_adapter_comes_back(kind: str, method: str, tmp_path: Path) -> None:
    """Stock peft loads every kind but bottleneck and NOLA, which it refuses; we load all, and a run starts from each."""
    adapted = moved(kind, method)
    save(adapted, tmp_path)
    expected = logits_of(adapted.model, kind)
    labels = None if kind == "llama" else 3
    loaded, processor = load_adapted_folder(tmp_path, str(FOLDERS[kind]), adapted.config(), labels)
    assert processor is not None
    assert torch.allclose(logits_of(loaded, kind), expected, atol=1e-5)
    again = load_model(spec_for(kind, method, f"adapter.start={tmp_path}"))
    assert again.layout == adapted.layout
    assert np.array_equal(again.read(), adapted.read())
    assert json.dumps(again.config(), sort_keys=True) == json.dumps(adapted.config(), sort_keys=True)
    base = CLASSES[TASKS[kind]].from_pretrained(FOLDERS[kind], **({} if labels is None else {"num_labels": labels}))
    if method in ("bottleneck", "nola"):
        with pytest.raises((KeyError, ValueError), match=method.upper()):
            PeftModel.from_pretrained(base, tmp_path)
    elif method != "vera":  # whose warning about projections is an error here
        assert torch.allclose(logits_of(PeftModel.from_pretrained(base, tmp_path), kind), expected, atol=1e-5)


def save(adapted: AdaptedModel, folder: Path) -> None:
    save_file(adapted.layout.split(adapted.read()), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapted.config()))


@pytest.mark.parametrize(("kind", "method"), LANGUAGE)
def test_padding_does_not_reach_the_loss(kind: str, method: str) -> None:
    adapted = moved(kind, method)
    ids = [np.array([1, 5, 6]), np.array([1, 4, 7, 8, 9, 10, 5])]
    examples = Examples(ids, ids if kind == "llama" else [np.array(0)] * 2, np.arange(2))
    together = score(adapted, examples).loss
    alone = [float(score(adapted, examples, np.array([i])).loss[0]) for i in range(2)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize(("kind", "method"), [pair for pair in LEGAL if pair[1] not in ("bias", "full")])
def test_a_bf16_base_keeps_fp32_adapters(kind: str, method: str) -> None:
    adapted = load_model(spec_for(kind, method, "model.precision=bf16"))
    own = {id(parameter) for parameter in adapted.parameters.values()}
    assert {p.dtype for p in adapted.model.parameters() if id(p) not in own and p.dim() > 1} == {torch.bfloat16}
    assert {p.dtype for p in adapted.parameters.values()} == {torch.float32}
    examples = examples_for(kind, 4, 0)
    forward = chosen(adapted, examples)
    (result,) = Trainer(adapted, forward, adapted.layout, SGD).train(examples, cohort_of(examples, [4], SGD))
    assert np.isfinite(result.change).all()
    assert result.change.any()


@pytest.mark.parametrize("kind", BASES)
def test_the_digest_of_the_base_is_the_same_for_every_adapter(kind: str) -> None:
    """Of the kinds that leave the base alone; what the others train is not frozen, and so is not in it."""
    methods = [m for k, m in LEGAL if k == kind and m not in ("bias", "full")]
    assert len({moved(kind, method).base_digest() for method in methods}) == 1


@pytest.mark.parametrize(("kind", "method"), ILLEGAL)
def test_what_a_base_cannot_carry_is_refused_with_the_nearest_legal(kind: str, method: str) -> None:
    nearest = ILLEGAL[kind, method]
    with pytest.raises(ModelError, match=f'"{method}" is illegal.*Nearest legal: "{nearest}"'):
        load_model(spec_for(kind, method))
    load_model(spec_for(kind, nearest))


def test_what_else_is_refused(tmp_path: Path) -> None:
    for method in ("bias", "full"):
        with pytest.raises(ModelError, match=r'precision = "bf16" is illegal.*Nearest legal: "fp32"'):
            load_model(spec_for("bert", method, "model.precision=bf16"))
    for method in ("prompt", "prefix"):
        with pytest.raises(ModelError, match=r"512 positions. Nearest legal: max_length = 12"):
            load_model(spec_for("bert", method, "adapter.virtual_tokens=500"))
    with pytest.raises(ModelError, match=r"adapter.targets.*Name the last layer"):
        load_model(spec_for("bert", "bottleneck", 'adapter.targets=["nothing"]'))
    with pytest.raises(ModelError, match=r"adapter.targets.*nothing"):
        load_model(spec_for("bert", "ia3", 'adapter.targets=["nothing"]'))
    save(moved("bert", "ia3"), tmp_path)
    with pytest.raises(ModelError, match=r'adapter.start.*Set adapter.method = "ia3"'):
        load_model(spec_for("bert", "lora", f"adapter.start={tmp_path}"))
    save(moved("bert", "bottleneck"), tmp_path)
    with pytest.raises(ModelError, match=r"adapter.start.*does not fit"):
        load_model(spec_for("llama-head", "bottleneck", f"adapter.start={tmp_path}"))


def test_a_prompt_that_does_not_reach_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "peft.PeftModelForSequenceClassification.get_prompt",
        lambda self, batch_size, **_: torch.zeros(batch_size, 3, 32),
    )
    with pytest.raises(ModelError, match=r'"prompt" is illegal with Bert.*does not reach.*Nearest legal: "bottleneck"'):
        load_model(spec_for("bert", "prompt"))


def test_the_spec_names_the_nearest_method() -> None:
    with pytest.raises(SpecError, match=r'did you mean "dora"\?'):
        spec_for("bert", "dore")
    with pytest.raises(SpecError, match=r'dropout = 0.1 is illegal with method = "ia3".*Nearest legal: dropout = 0'):
        spec_for("bert", "ia3", "adapter.dropout=0.1")


def test_ranks_of_adalora_stay_as_they_are() -> None:
    adapted = moved("bert", "adalora")
    shapes = {t.shape[0] for t in adapted.layout.tensors if t.name.endswith((".lora_A", ".lora_E"))}
    assert shapes == {2}


def test_somebodys_own_dora_has_no_pairs() -> None:
    """B·A is not what DoRA adds to the weight: no recipe may refactor it."""
    for dora, count in ((True, 0), (False, 4)):
        model = get_peft_model(BASES["bert"][0](), LoraConfig(r=2, target_modules=["query", "value"], use_dora=dora))
        assert len(adapt(model, BASES["bert"][1]).layout.pairs) == count
