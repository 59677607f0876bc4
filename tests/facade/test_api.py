"""The Python way: somebody's own model and datasets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

import fedapt
from fedapt.client.models import base_folder
from fedapt.protocols.errors import DataError, ModelError, SpecError

TEXTS = [["def f(x):\n    return x + 1", "import os"], ["class A:\n    pass", "for i in range(3):"], []]


def language_model(config: PeftConfig | None = None) -> tuple[Any, Any]:
    folder = base_folder("builtin:byte-llama")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = config or LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    return get_peft_model(base, config), AutoTokenizer.from_pretrained(folder)


def one_round(config: PeftConfig, recipe: str = "fedit", **sections: Any) -> fedapt.Result:
    model, tokenizer = language_model(config)
    return fedapt.simulate(
        model=model, clients=[[tokenizer("x = 1")]], recipe=recipe, rounds=1, steps=1, sections=sections
    )


def lora_config(**options: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **options)


def ia3_config() -> IA3Config:
    return IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])


@pytest.mark.parametrize("recipe", ["fedsvd", "fedit"])
def test_own_language_model(tmp_path: Path, recipe: str) -> None:
    model, tokenizer = language_model()
    clients = [[tokenizer(text) for text in site] for site in TEXTS]
    result = fedapt.simulate(
        model=model, clients=clients, recipe=recipe, rounds=3, evaluation=clients[0], learning_rate=1e-2, seed=1
    )
    assert [row["round"] for row in result.metrics] == [0, 1, 2, 3]
    assert result.metrics[1]["nodes"] == 2  # the third has no data
    assert result.metrics[-1]["evaluation"]["loss"] < result.metrics[0]["evaluation"]["loss"]
    base = AutoModelForCausalLM.from_pretrained(base_folder("builtin:byte-llama"), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, result.save(tmp_path / "adapter")).eval()
    rows = torch.tensor([tokenizer("import os")["input_ids"]])
    with torch.no_grad():
        assert (loaded(rows).logits - model(rows).logits).abs().max() <= 1e-5  # the model holds the result
    assert "<svg" in result.report(tmp_path / "report.html").read_text()
    assert set(result.adapter) == set(result.outcome.description.layout.offsets)


def test_own_classifier_trains_its_head() -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    model = get_peft_model(
        BertForSequenceClassification(config), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    )
    site = [{"input_ids": [1, 2, 3 + i], "labels": i} for i in range(3)]
    result = fedapt.simulate(model=model, clients=[site, site[:1]], recipe="flexlora", rounds=1, steps=2)
    assert any("classifier" in name for name in result.adapter)
    assert result.spec.model.labels == 3


def test_wrong_objects_are_named() -> None:
    model, tokenizer = language_model()
    with pytest.raises(ModelError, match="get_peft_model"):
        fedapt.simulate(model=model.get_base_model().model, clients=[[tokenizer("x = 1")]])
    with pytest.raises(DataError, match=r"clients\[1\]\[0\].*input_ids"):
        fedapt.simulate(model=model, clients=[[tokenizer("x = 1")], [{"text": "x"}]])
    with pytest.raises(DataError, match="none of them has an example"):
        fedapt.simulate(model=model, clients=[[], []])
    with pytest.raises(SpecError, match="fedsvd"):
        fedapt.simulate(model=model, clients=[[tokenizer("x = 1")]], recipe="fedsdv")
    with pytest.raises(SpecError, match="wire"):
        fedapt.simulate(model=model, clients=[[tokenizer("x = 1")]], sections={"wrie": {}})


def test_a_recipe_on_factors_needs_a_model_that_has_them() -> None:
    with pytest.raises(SpecError, match=r'adapter\.method = "ia3".*Nearest legal: "fedit"'):
        one_round(ia3_config(), "fedsvd")
    model, tokenizer = language_model()
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    with pytest.raises(SpecError, match=r"^model: .*lora_B\.weight of shape \(\d+, 2\) is in no pair.*both trainable"):
        fedapt.simulate(model=model, clients=[[tokenizer("x = 1")]], recipe="flexlora", rounds=1)


def test_without_factors_neither_a_rank_nor_an_error_is_reported() -> None:
    result = one_round(ia3_config())
    assert result.spec.adapter.method == "ia3"
    assert result.metrics[1]["effective_rank"] is None
    assert result.metrics[1]["aggregation_error"] is None


@pytest.mark.parametrize(
    ("config", "method", "rank", "alpha"),
    [
        (lora_config(r=2, lora_alpha=6), "lora", 2, 6.0),
        (lora_config(r=2, lora_alpha=6, rank_pattern={"q_proj": 3}), "lora", 3, 6.0),
        (lora_config(r=3, use_dora=True), "dora", 3, 8.0),
    ],
)
def test_the_adapter_is_the_models_own(config: PeftConfig, method: str, rank: int, alpha: float) -> None:
    adapter = one_round(config).spec.adapter
    assert (adapter.method, adapter.rank, adapter.alpha) == (method, rank, alpha)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"rank": 4}, r"adapter\.rank = 4: the model that you pass has 2\."),
        ({"rank": 2, "alpha": 16.0}, r"adapter\.alpha = 16\.0: the model that you pass has 6\."),
        ({"method": "dora"}, r"adapter\.method = 'dora': the model that you pass has 'lora'\."),
        ({"ranks": [1, 4]}, "rank = 2 is not the largest of ranks"),
    ],
)
def test_an_adapter_that_the_model_does_not_have(stated: dict[str, Any], message: str) -> None:
    config = lora_config(r=2, lora_alpha=6)
    with pytest.raises(SpecError, match=message):
        one_round(config, "flexlora", adapter=stated)


def test_what_is_stated_may_be_what_the_model_has() -> None:
    stated = {"method": "lora", "rank": 2, "alpha": 6, "ranks": [1, 2]}
    assert one_round(lora_config(r=2, lora_alpha=6), "flexlora", adapter=stated).spec.adapter.ranks == (1, 2)


def test_public_names() -> None:
    assert fedapt.__all__ == ["Result", "RunSpec", "__version__", "run", "simulate", "strategy"]
    for name in fedapt.__all__:
        assert getattr(fedapt, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = fedapt.nothing
