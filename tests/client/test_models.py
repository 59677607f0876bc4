"""Loading: local folders as transformers saves them, the builtin base, and what is said where loading fails."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from fedapt.client.adapted import AdaptedModel, adapt
from fedapt.client.evaluation import score
from fedapt.client.models import load_model
from fedapt.client.tasks import CausalLanguageModel, Examples, ImageClassification, SequenceClassification
from fedapt.client.trainer import Member, Trained, Trainer
from fedapt.kernels.cohort import Batched, fastest
from fedapt.protocols.errors import ModelError
from fedapt.protocols.spec import Local, RunSpec

from .tiny import SIZES

TEXT: dict[str, Any] = SIZES | {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {
    "bert": ("sequence-classification", ["query", "value"]),
    "roberta": ("sequence-classification", ["query", "value"]),
    "llama": ("sequence-classification", ["q_proj", "down_proj"]),
    "vit": ("image-classification", ["q_proj", "fc1"]),
}
CLASSIFIERS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")},
    "llama": {"score.weight"},
    "vit": {"classifier.weight", "classifier.bias"},
}


def tokenizer(pad: str | None) -> Any:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases without a head; the Llama has no padding token, as the published ones have none."""
    torch.manual_seed(0)
    bases: dict[str, Any] = {
        "bert": BertModel(BertConfig(**TEXT, pad_token_id=0)),
        "roberta": RobertaModel(RobertaConfig(**TEXT, pad_token_id=0)),
        "llama": LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2)),
        "vit": ViTModel(ViTConfig(**SIZES, image_size=8, patch_size=4)),
    }
    saved = {}
    for kind, base in bases.items():
        saved[kind] = tmp_path_factory.mktemp(kind)
        base.save_pretrained(saved[kind])
        if kind == "vit":
            ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(saved[kind])
        else:
            tokenizer(None if kind == "llama" else "<pad>").save_pretrained(saved[kind])
    return saved


def spec_for(base: object, kind: str = "bert", *overrides: str) -> RunSpec:
    task, targets = KINDS[kind]
    raw = {
        "model": {"base": str(base), "task": task, "labels": 3, "max_length": 16},
        "adapter": {"targets": targets, "rank": 2},
        "recipe": {"name": "fedit"},
    }
    return RunSpec.check(raw).set(*overrides)


def texts(*own: list[int]) -> Examples:
    return Examples([np.array(ids) for ids in own], [np.array(0)] * len(own), np.arange(len(own)))


def dense(adapted: AdaptedModel) -> dict[str, Any]:
    """The product `B·A` of each module."""
    tensors = adapted.layout.split(adapted.read())
    return {pair.module: tensors[pair.b.name] @ tensors[pair.a.name] for pair in adapted.layout.pairs}


def one_step(adapted: AdaptedModel, examples: Examples) -> Trained:
    names = [adapted.parameter_names[t.name] for t in adapted.layout.tensors]
    trainer = Trainer(adapted, Batched(adapted.model, names), adapted.layout, Local(optimizer="sgd"))
    return trainer.train(examples, [Member([np.arange(len(examples))], 0)])[0]


def refused(spec: RunSpec, *parts: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_classifier_is_drawn_from_the_seed_and_trained(kind: str, folders: dict[str, Path]) -> None:
    one, two, other = (load_model(spec_for(folders[kind], kind, f"run.seed={seed}")) for seed in (3, 3, 4))
    heads = {n.removeprefix("base_model.model."): n for n in one.layout.offsets if ".lora_" not in n}
    assert CLASSIFIERS[kind] <= set(heads)
    drawn, different = one.layout.split(one.read()), other.layout.split(other.read())
    assert np.array_equal(one.read(), two.read())
    assert one.base_digest() == two.base_digest() == other.base_digest()
    for short in CLASSIFIERS[kind]:
        name = heads[short]
        assert ".modules_to_save." in one.parameter_names[name]
        values = drawn[name]
        if short.endswith("bias"):
            assert not values.any()
        else:
            assert 0.01 < values.std() < 0.03
            assert not np.array_equal(values, different[name])
    for pair in one.layout.pairs:
        assert not drawn[pair.b.name].any()
        assert 0 < np.abs(drawn[pair.a.name]).max() <= pair.a.shape[1] ** -0.5
        assert not np.array_equal(drawn[pair.a.name], different[pair.a.name])


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_is_pefts_own(kind: str, folders: dict[str, Path]) -> None:
    adapted = load_model(spec_for(folders[kind], kind))
    own = get_peft_model_state_dict(adapted.model)
    assert {t.name: t.shape for t in adapted.layout.tensors} == {n: tuple(v.shape) for n, v in own.items()}
    values = np.random.default_rng(0).standard_normal(adapted.layout.size).astype(np.float32)
    adapted.write(values)
    assert np.array_equal(adapted.read(), values)
    written = get_peft_model_state_dict(adapted.model)
    for name, view in adapted.layout.split(values).items():
        assert np.array_equal(written[name].numpy(), view)
    assert not adapted.model.training


def test_the_digest_of_the_base_is_of_the_base_alone(folders: dict[str, Path]) -> None:
    first = load_model(spec_for(folders["bert"])).base_digest()
    adapted = load_model(spec_for(folders["bert"], "bert", 'adapter.targets=["dense"]', "run.seed=5"))
    pooled = {name for name in adapted.parameter_names.values() if "pooler" in name}
    assert adapted.base_digest() == first
    assert pooled
    adapted.write(np.ones(adapted.layout.size, np.float32))
    assert adapted.base_digest() == first
    with torch.no_grad():
        next(p for p in adapted.model.parameters() if not p.requires_grad)[0] += 1
    assert adapted.base_digest() != first


def test_all_linear_leaves_the_head_to_be_trained_whole(folders: dict[str, Path]) -> None:
    for kind in KINDS:
        adapted = load_model(spec_for(folders[kind], kind, 'adapter.targets="all-linear"'))
        assert {t.name for t in adapted.layout.tensors} == set(get_peft_model_state_dict(adapted.model))
        assert not [t.name for t in adapted.layout.tensors if "classifier" in t.name and "lora" in t.name]


def test_peft_loads_what_the_layout_and_the_config_say(folders: dict[str, Path], tmp_path: Path) -> None:
    adapted = load_model(spec_for(folders["bert"]))
    adapted.write(np.random.default_rng(0).standard_normal(adapted.layout.size).astype(np.float32))
    save_file(adapted.layout.split(adapted.read()), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapted.config()))
    torch.manual_seed(9)  # transformers draws a head of its own, which the adapter replaces
    base = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    pooler = "base_model.model.bert.pooler.dense.weight"
    assert pooler not in adapted.layout.offsets  # it came with the base
    assert torch.allclose(loaded(input_ids=ids).logits, adapted.model(input_ids=ids).logits, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_padding_does_not_reach_the_logits(kind: str, folders: dict[str, Path]) -> None:
    adapted = load_model(spec_for(folders[kind], kind))
    examples = texts([1, 5, 6], [1, 4, 7, 8, 9, 10, 5])
    together = score(adapted, examples).loss
    alone = [float(score(adapted, examples, np.array([i])).loss[0]) for i in range(2)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


def test_tasks_come_with_their_tokenizer_or_processor(folders: dict[str, Path]) -> None:
    llama = load_model(spec_for(folders["llama"], "llama")).task
    assert isinstance(llama, SequenceClassification)
    assert llama.pad == 2  # a base without a padding token pads with its end of text
    assert llama.tokenizer.padding_side == "right"
    assert isinstance(load_model(spec_for(folders["vit"], "vit")).task, ImageClassification)
    causal = spec_for(folders["llama"], "llama", "model.task=causal-lm")
    assert isinstance(load_model(causal).task, CausalLanguageModel)


def test_a_classifier_of_another_size_is_drawn_anew(folders: dict[str, Path], tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=5).save_pretrained(tmp_path)
    tokenizer("<pad>").save_pretrained(tmp_path)
    adapted = load_model(spec_for(tmp_path))
    weight = adapted.layout.split(adapted.read())["base_model.model.classifier.weight"]
    assert weight.shape == (3, 32)
    again = load_model(spec_for(tmp_path))
    assert np.array_equal(again.read(), adapted.read())


def test_the_builtin_base_speaks() -> None:
    raw = {"model": {"base": "builtin:byte-llama", "task": "causal-lm"}, "recipe": {"name": "fedsvd"}}
    adapted = load_model(RunSpec.check(raw))
    assert adapted.layout.pairs
    assert isinstance(adapted.task, CausalLanguageModel)
    text = np.array(adapted.task.tokenizer("The return value of the function is a list of strings.")["input_ids"])
    scores = score(adapted, Examples([text], [text], np.arange(1)))
    assert scores.metrics(adapted.task)["loss"] < 0.5 * np.log(256)


def test_a_bf16_base_keeps_fp32_adapters(folders: dict[str, Path]) -> None:
    for kind in ("bert", "llama"):
        adapted = load_model(spec_for(folders[kind], kind, "model.precision=bf16"))
        own = set(adapted.parameter_names.values())
        precisions = {name in own: p.dtype for name, p in adapted.model.named_parameters()}
        assert precisions == {True: torch.float32, False: torch.bfloat16}
        assert all(p.dtype == torch.float32 for p in adapted.parameters.values())
        examples = texts([1, 5, 6], [1, 4, 7, 8, 9])
        trained = one_step(adapted, examples)
        assert np.isfinite(trained.change).all()
        assert trained.change.dtype == np.float32
        assert trained.change.any()
        batch = adapted.task.collate(examples, [np.arange(2), np.arange(2)])
        assert isinstance(fastest(adapted.model, list(own), batch.inputs), Batched)


def test_a_warm_start_is_what_was_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    first = load_model(spec_for(folders["bert"]))
    first.write(np.random.default_rng(1).standard_normal(first.layout.size).astype(np.float32))
    first.model.save_pretrained(tmp_path)
    start = f"adapter.start={tmp_path}"
    again = load_model(spec_for(folders["bert"], "bert", start))
    assert again.layout == first.layout
    assert np.array_equal(again.read(), first.read())
    assert all(p.requires_grad for p in again.parameters.values())
    orthonormal = load_model(spec_for(folders["bert"], "bert", start, "recipe.name=fedsvd"))
    for module, product in dense(orthonormal).items():
        assert np.allclose(product, dense(first)[module], atol=1e-5)
    assert one_step(again, texts([1, 5, 6])).change.any()


@pytest.mark.parametrize("rank", [1, 2, 32])
def test_orthonormal_factors(rank: int, folders: dict[str, Path]) -> None:
    adapted = load_model(spec_for(folders["bert"], "bert", "recipe.name=fedsvd", f"adapter.rank={rank}"))
    tensors = adapted.layout.split(adapted.read())
    assert adapted.layout.pairs
    for pair in adapted.layout.pairs:
        a = tensors[pair.a.name]
        assert np.abs(a @ a.T - np.eye(rank)).max() < 1e-5
        assert not tensors[pair.b.name].any()


def test_somebodys_own_model_has_to_train_something(folders: dict[str, Path]) -> None:
    model = load_model(spec_for(folders["bert"])).model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match=r"no trainable parameter.*get_peft_model"):
        adapt(model, SequenceClassification(None, 16))


def test_what_is_no_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    refused(spec_for(tmp_path / "nowhere"), str(tmp_path / "nowhere"), "no such folder")
    refused(spec_for("./nowhere"), "no such folder")
    refused(spec_for(tmp_path), "no Hugging Face model", "no config.json")
    refused(spec_for("nobody/no-such-model"), "nobody/no-such-model", "no network", "name its folder")
    refused(spec_for("builtin:nothing"), "builtin:nothing", "builtin:byte-llama")
    (tmp_path / "config.json").write_text((folders["bert"] / "config.json").read_text())
    refused(spec_for(tmp_path), "no Hugging Face model")  # a config and no weights


def test_a_base_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path)
    refused(spec_for(tmp_path), "no tokenizer")


def test_an_impossible_adapter_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    bert = folders["bert"]
    refused(spec_for(bert, "bert", 'adapter.targets=["nothing"]'), "adapter.targets", "nothing")
    refused(spec_for(bert, "bert", "recipe.name=fedsvd", "adapter.rank=33"), "adapter.rank = 33", "32 inputs")
    refused(spec_for(bert, "bert", f"adapter.start={tmp_path}"), "adapter.start", "adapter_config.json")
    load_model(spec_for(folders["llama"], "llama")).model.save_pretrained(tmp_path / "llama")
    refused(spec_for(bert, "bert", f"adapter.start={tmp_path / 'llama'}"), "adapter.start", "does not fit")


@pytest.mark.parametrize("model_type", ["bert", "planted"])
def test_code_beside_a_model_is_never_run(model_type: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "code was run"
    folder.mkdir()
    for file in folders["bert"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "planted.Config", "AutoModelForSequenceClassification": "planted.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": auto}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["planted.Tokens", "planted.Tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "planted.py").write_text(f"open({str(marker)!r}, 'w')\n")
    if model_type == "planted":
        refused(spec_for(folder), "no Hugging Face model")
    else:
        assert load_model(spec_for(folder)).layout.pairs  # by the class that transformers has
    assert not marker.exists()
