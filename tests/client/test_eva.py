"""EVA: A starts as the leading directions of its layer's inputs, on public data and on no other."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapt.client import eva
from fedapt.client.adapted import AdaptedModel
from fedapt.client.eva import Directions, directions_reference, input_directions, public_examples
from fedapt.client.models import CLASSES, load_model
from fedapt.protocols.errors import DataError, ModelError
from fedapt.protocols.layout import A_SUFFIX
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.spec import RunSpec

from .test_adapters import FOLDERS, TASKS, folders, logits_of, spec_for  # noqa: F401

WORDS = np.array(list("abcdefgh"))
LONG = "recipe.initial_a=eva", "adapter.rank=4"


def texts(count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS[:5], random.integers(1, 13))) for _ in range(count)]


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """Texts without labels."""
    file = tmp_path / "public.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts(40, 0)))
    return file


def spec_of(kind: str, public: object, *overrides: str) -> RunSpec:
    return spec_for(kind, "lora", *LONG, f"adapter.public={public}", *overrides)


def rows_of(seed: int, counts: list[int], inputs: int, span: int) -> list[Any]:
    random = np.random.default_rng(seed)
    base = random.standard_normal((span, inputs))
    return [(random.standard_normal((n, span)) @ base).astype(np.float32) for n in counts]


def kept(rows: Any, vectors: Any) -> float:
    """The share of the rows' energy that lies in these orthonormal directions."""
    total = float((rows.astype(np.float64) ** 2).sum())
    return float(((rows.astype(np.float64) @ vectors.astype(np.float64).T) ** 2).sum()) / (total or 1.0)


def seen(batches: list[Any], inputs: int, keep: int) -> Directions:
    found = Directions.none(inputs)
    for rows in batches:
        found = found.after(rows, keep)
    return found


@settings(deadline=None)
@given(
    st.integers(0, 99),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 4),
    st.integers(1, 5),
)
def test_batch_by_batch_is_all_at_once(seed: int, counts: list[int], inputs: int, span: int, rank: int) -> None:
    batches = rows_of(seed, counts, inputs, span)
    everything = np.concatenate(batches)
    found = seen(batches, inputs, keep=max(rank, span)).vectors[:rank]
    expected = directions_reference(everything, rank)
    assert found.shape == expected.shape or len(everything) > len(found) >= min(rank, span)
    assert np.allclose(found @ found.T, np.eye(len(found)), atol=1e-5)
    assert kept(everything, found) == pytest.approx(kept(everything, expected), abs=1e-5)


def test_what_is_forgotten_on_the_way_is_little() -> None:
    """Spans far wider than what is kept; random directions are the control."""
    random = np.random.default_rng(0)
    mixing = np.geomspace(1, 1e-2, 64)[:, None] * np.linalg.qr(random.standard_normal((64, 64)))[0]
    batches = [(random.standard_normal((100, 64)) @ mixing).astype(np.float32) for _ in range(10)]
    everything = np.concatenate(batches)
    best = kept(everything, directions_reference(everything, 4))
    assert kept(everything, seen(batches, 64, 2 * 4 + eva.MARGIN).vectors[:4]) >= 0.999 * best
    assert kept(everything, np.linalg.qr(random.standard_normal((64, 4)))[0].T) < 0.5 * best


def factors(adapted: AdaptedModel) -> dict[str, Any]:
    return {
        n.removesuffix(A_SUFFIX): a for n, a in adapted.layout.split(adapted.read()).items() if n.endswith(A_SUFFIX)
    }


def inputs_of(kind: str, module: str, examples: Any) -> Any:
    """The inputs of a layer of the stock base, each example alone and so without padding."""
    base = CLASSES[TASKS[kind]].from_pretrained(FOLDERS[kind], **({} if kind == "llama" else {"num_labels": 3})).eval()
    rows: list[Any] = []
    layer = base.get_submodule(module.removeprefix("base_model.model."))
    layer.register_forward_pre_hook(lambda _, x: rows.append(x[0].detach().flatten(0, -2).numpy()))
    for example in examples.inputs:
        with torch.no_grad():
            base(torch.from_numpy(example)[None])
    return np.concatenate(rows)


@pytest.mark.parametrize("kind", ["bert", "llama", "llama-head", "vit"])
def test_a_keeps_most_of_what_its_layer_sees(kind: str, public: Path) -> None:
    source = "builtin:digits" if kind == "vit" else public
    spec = spec_of(kind, source)
    adapted = load_model(spec)
    examples = public_examples(spec, adapted.task)
    assert 0 < len(examples) <= eva.EXAMPLES
    for module, a in list(factors(adapted).items())[::3]:
        rows = inputs_of(kind, module, examples)
        assert np.allclose(a @ a.T, np.eye(4), atol=1e-5)
        best = kept(rows, directions_reference(rows, 4))
        assert kept(rows, a) >= 0.999 * best
        random = np.linalg.qr(np.random.default_rng(0).standard_normal(a.T.shape))[0].T
        assert kept(rows, random) < 0.9 * best


def test_training_begins_at_the_base(public: Path) -> None:
    base = CLASSES[TASKS["bert"]].from_pretrained(FOLDERS["bert"], num_labels=3)
    adapted = load_model(spec_of("bert", public))
    assert torch.allclose(logits_of(adapted.model, "bert"), logits_of(base, "bert"), atol=1e-6)


def test_only_the_public_file_is_read(public: Path, tmp_path: Path) -> None:
    """A node's own data may be absent, or any: A is the same. Other public data gives another A."""
    alone = load_model(spec_of("bert", public)).read()
    for own in (tmp_path / "absent.jsonl", tmp_path / "own.jsonl"):
        (tmp_path / "own.jsonl").write_text('{"text": "h h h", "label": 0}')
        assert np.array_equal(load_model(spec_of("bert", public, f"data.source={own}")).read(), alone)
    public.write_text("\n".join(json.dumps({"text": text}) for text in texts(40, 1)))
    assert not np.allclose(load_model(spec_of("bert", public)).read(), alone, atol=1e-3)


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if not recipe.streams])
def test_every_recipe_starts_from_the_same_a(recipe: str, public: Path) -> None:
    expected = factors(load_model(spec_of("bert", public)))
    found = factors(load_model(spec_of("bert", public, f"recipe.name={recipe}")))
    assert all(np.array_equal(found[module], a) for module, a in expected.items())


def test_the_sample_is_drawn_by_key_and_bounded(tmp_path: Path) -> None:
    public = tmp_path / "long.csv"
    public.write_text("\n".join(["text", *texts(eva.EXAMPLES + 50, 0)]))
    specs = [spec_of("bert", public, f"run.seed={seed}") for seed in (0, 0, 1)]
    task = load_model(spec_for("bert", "lora")).task
    one, two, other = (public_examples(spec, task) for spec in specs)
    assert len(one) == len(other) == eva.EXAMPLES
    assert one.rows.tolist() == two.rows.tolist()
    assert [x.tolist() for x in one.inputs] == [x.tolist() for x in two.inputs]
    assert [x.tolist() for x in one.inputs] != [x.tolist() for x in other.inputs]


def test_what_cannot_be_is_refused(public: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"adapter.public: .*absent.jsonl: no such file"):
        load_model(spec_of("bert", tmp_path / "absent.jsonl"))
    with pytest.raises(ModelError, match=r"adapter.rank = 40: .* has only 32 inputs"):
        load_model(spec_of("bert", public, "adapter.rank=40"))
    public.write_text('{"text": "a b"}')
    with pytest.raises(DataError, match=r"only [13] inputs, and adapter.rank = 4 needs as many. Name a larger source"):
        load_model(spec_of("bert", public))


def test_no_hook_stays(public: Path) -> None:
    adapted = load_model(spec_of("bert", public))
    before = factors(adapted)
    logits_of(adapted.model, "bert")
    found = input_directions(adapted, public_examples(spec_of("bert", public), adapted.task))
    assert set(found) == set(before)
    assert not any(m._forward_pre_hooks for n, m in adapted.model.named_modules() if n.endswith(("query", "value")))
