"""From spec to result: what is announced is what is counted, what is saved is what was evaluated."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedapt.client.evaluation import score
from fedapt.client.models import base_folder
from fedapt.planning import plan
from fedapt.protocols.errors import OutputError, SpecError
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.spec import RunSpec
from fedapt.simulation import run

SHORT = {"refresh": ["recipe.period=1"], "fedsvd": ["recipe.period=2"]}
"""So that two rounds hold a fresh start, and a round without a refactorization."""


@pytest.mark.parametrize(
    "overrides",
    [[f"recipe.name={name}", *SHORT.get(name, [])] for name in RECIPES]
    + [["recipe.name=fedit", f"wire.codec={codec}"] for codec in ("fp32", "bf16", "int8", "fp4", "top-k")]
    + [["recipe.name=ffa", "wire.codec=seed-projection", "wire.values=int8", "wire.coefficients=500"]]
    + [[f"recipe.name={name}", "recipe.aggregator=fisher"] for name in ("ffa", "rolora")]
    + [["recipe.name=fedsvd", "recipe.aggregator=greedy-soup"]]
    + [[f"recipe.name={name}", "adapter.ranks=[1, 2, 4]", "adapter.rank=4"] for name in ("flexlora", "fedsvd")],
    ids=" ".join,
)
def test_plan_announces_the_bytes_that_the_run_counts(tiny: Path, overrides: list[str]) -> None:
    spec = RunSpec.load(tiny, [*overrides, "wire.downlink=bf16"])
    announced, result = plan(spec), run(spec)
    assert announced.exact_total
    assert announced.down_total == sum(row.get("bytes_down", 0) for row in result.metrics)
    assert announced.up_total == sum(row.get("bytes_up", 0) for row in result.metrics)


# Frozen factors are a sum of their own in the run, and further terms of one sum in the saved adapter: the logits, up to 20
# in size, differ by some more roundings.
@pytest.mark.parametrize(("recipe", "tolerance"), [("fedsvd", 1e-5), ("refresh", 4e-5), ("fedex", 4e-5)])
def test_saved_adapter_gives_the_logits_of_the_runs_own_evaluation(
    tiny: Path, tmp_path: Path, recipe: str, tolerance: float
) -> None:
    result = run(RunSpec.load(tiny, [f"recipe.name={recipe}", *SHORT.get(recipe, [])]), tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(base_folder("builtin:byte-llama"), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    adapted, examples = result.federation.adapted, result.federation.evaluation
    adapted.write(result.outcome.adapter)
    batch = adapted.task.collate(examples, [np.arange(len(examples))])
    with torch.no_grad():
        expected, found = adapted.model(**batch.inputs).logits, loaded(**batch.inputs).logits
    assert (expected - found).abs().max() <= tolerance
    own = score(adapted, examples).metrics(adapted.task)
    assert result.best_round is not None
    assert own == pytest.approx(result.metrics[result.best_round]["evaluation"], rel=1e-6)
    base_alone = base.get_input_embeddings()
    assert base_alone is not None
    with torch.no_grad(), loaded.disable_adapter():
        assert (loaded(**batch.inputs).logits - expected).abs().max() > 1e-3  # the control: the adapter does something


def test_same_spec_and_seed_give_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    spec = RunSpec.load(tiny)
    first, second = run(spec, tmp_path / "a"), run(spec, tmp_path / "b")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = run(spec.set("run.seed=6"))
    assert not np.array_equal(first.outcome.adapter, other.outcome.adapter)
    assert second.outcome.complete


@pytest.mark.parametrize(
    "recipe", ["fedsvd", "refresh", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flora", "rolora"))]
)
def test_a_run_goes_on_where_it_was(tiny: Path, tmp_path: Path, recipe: str) -> None:
    spec = RunSpec.load(tiny, [f"recipe.name={recipe}", *SHORT.get(recipe, [])])
    run(spec.set("run.rounds=1"), tmp_path / "out")
    resumed = run(spec, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    whole = run(spec)
    assert np.array_equal(resumed.outcome.adapter, whole.outcome.adapter)
    with pytest.raises(SpecError, match="another spec"):
        run(spec.set("local.learning_rate=1e-4"), tmp_path / "out")


def test_perplexity_falls(tiny: Path) -> None:
    result = run(RunSpec.load(tiny, ["run.rounds=4", "local.steps=4", "recipe.name=fedit", "data.evaluation_limit=40"]))
    before, after = (result.metrics[i]["evaluation"]["perplexity"] for i in (0, -1))
    assert after < before
    assert math.isfinite(after)


def test_warm_start_begins_where_the_adapter_ended(tiny: Path, tmp_path: Path) -> None:
    first = run(RunSpec.load(tiny), tmp_path / "first")
    second = run(RunSpec.load(tiny, [f"adapter.start='{tmp_path / 'first' / 'adapter'}'"]))
    assert first.best_round is not None
    expected = first.metrics[first.best_round]["evaluation"]["loss"]
    assert second.metrics[0]["evaluation"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_output_that_cannot_be_written_is_known_before_anything_runs(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another --out"):
        run(RunSpec.load(tiny), tmp_path / "file" / "out")
