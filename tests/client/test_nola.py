"""NOLA: the sums are what the paper says, the bases are the same everywhere, and only the coefficients travel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from fedapt.adapters import merge_into_base
from fedapt.client.models import CLASSES, load_adapted_folder, load_model
from fedapt.client.nola import PREFIX, Combination, Nola, NolaConfig
from fedapt.kernels.cohort import Vmapped, fastest
from fedapt.protocols.errors import ModelError
from fedapt.protocols.keys import derive
from fedapt.protocols.philox import signs_reference

from .test_adapters import FOLDERS, TASKS, folders, logits_of, moved, names_of, save, spec_for  # noqa: F401
from .test_trainer import examples_for

sizes = st.integers(1, 5)
KINDS = ("bert", "llama", "llama-head", "vit")


def combination(out: int, into: int, rank: int, bases: int, key: int = 7) -> Combination:
    change = Combination((out, into), rank, bases, 0.5, key)
    with torch.no_grad():
        for number, coefficients in enumerate((change.a, change.b)):
            coefficients.copy_(torch.from_numpy(np.random.default_rng(number).standard_normal(bases)))
    return change


def reference(change: Combination, out: int, into: int, rank: int, key: int) -> torch.Tensor:
    """ΔW (out, in) in float64, one base after another."""
    bases = len(change.a)
    factors = []
    for stream, (coefficients, shape) in enumerate(((change.a, (rank, into)), (change.b, (out, rank)))):
        drawn = signs_reference(key, bases, shape[0] * shape[1], stream).reshape(bases, *shape)
        total = np.zeros(shape)
        for coefficient, base in zip(coefficients.detach().double().numpy(), drawn, strict=True):
            total += coefficient * base / np.sqrt(bases)
        factors.append(total)
    return torch.from_numpy(0.5 * factors[1] @ factors[0])


@settings(deadline=None)
@given(sizes, sizes, sizes, sizes, st.integers(0, 3), st.integers(0, 2**64 - 1))
def test_the_change_is_the_product_of_two_sums(  # noqa: PLR0917
    out: int, into: int, rank: int, bases: int, rows: int, key: int
) -> None:
    change = combination(out, into, rank, bases, key)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((rows, into)).astype(np.float32))
    expected = x.double() @ reference(change, out, into, rank, key).mT
    assert torch.allclose(change(x).double(), expected, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), Conv1D(4, 6)], ids=["linear", "conv1d"])
def test_it_is_added_to_a_frozen_layer_of_either_orientation(layer: nn.Linear | Conv1D) -> None:
    change = NolaConfig(r=2, lora_alpha=4, bases=3).combination("layer", layer)
    with torch.no_grad():
        change.b.fill_(1.0)
        change.a.fill_(1.0)
    x = torch.linspace(-1, 1, 12).view(2, 6)
    a, b = change.factors()
    assert torch.allclose(Nola(layer, change)(x), layer(x) + 2 * x @ a.mT @ b.mT, atol=1e-6)


def test_linear_in_each_sum_but_not_in_both() -> None:
    """What `fedapt recipes` says of its mean."""
    x = torch.eye(6)
    one, two, mean = (combination(4, 6, 2, 3) for _ in range(3))
    with torch.no_grad():
        two.b.mul_(-3.0)
        mean.b.copy_((one.b + two.b) / 2)
        assert torch.allclose(mean(x), (one(x) + two(x)) / 2, atol=1e-6)
        two.a.mul_(-2.0)
        mean.a.copy_((one.a + two.a) / 2)
        assert not torch.allclose(mean(x), (one(x) + two(x)) / 2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_coefficients_travel_and_are_saved(kind: str, tmp_path: Path) -> None:
    adapted = moved(kind, "nola")
    modules = [name for name, module in adapted.model.named_modules() if isinstance(module, Nola)]
    own = {t.name: t for t in adapted.layout.tensors if PREFIX in t.name}
    assert set(own) == {f"{module}{PREFIX}{part}" for module in modules for part in ("a", "b")}
    assert {t.shape for t in own.values()} == {(5,)}
    assert {t.role for t in own.values()} == {"other"}
    save(adapted, tmp_path)
    assert {name for name in load_file(tmp_path / "adapter_model.safetensors") if PREFIX in name} == set(own)


def test_the_bases_are_philox_signs_keyed_by_run_and_module() -> None:
    adapted = moved("llama", "nola")
    name = "model.layers.1.self_attn.v_proj"
    key = derive(derive(0, "nola") % 2**63, "nola", name) % 2**64
    found = {n: b for n, b in adapted.model.named_buffers() if f"{name}{PREFIX}" in n}
    (a,) = (b for n, b in found.items() if n.endswith("signs_a"))
    assert np.array_equal(a.numpy(), signs_reference(key, 5, 2 * 32, 0).reshape(5, 2, 32))
    others = [b for n, b in adapted.model.named_buffers() if n.endswith("q_proj.nola.signs_a")]
    assert all(not torch.equal(a, other) for other in others)


def test_the_sum_starts_like_the_a_of_lora() -> None:
    adapted = load_model(spec_for("bert", "nola", "adapter.bases=64", "adapter.rank=16"))
    with torch.no_grad():
        entries = [m.nola.factors() for m in adapted.model.modules() if isinstance(m, Nola)]
    scaled = torch.cat([(a * (3 * a.shape[1]) ** 0.5).flatten() for a, _ in entries])
    assert float(scaled.square().mean()) == pytest.approx(1, abs=0.1)
    assert not any(b.any() for _, b in entries)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cohort_is_traced_and_not_looped(kind: str) -> None:
    """Without a padding mask, which vmap cannot trace in the text models of transformers, whatever the adapter."""
    adapted = moved(kind, "nola")
    rows = [np.array([0, 1]), np.array([0, 1])]
    inputs = adapted.task.collate(examples_for(kind, 9, 0), rows).inputs
    inputs.pop("attention_mask", None)
    assert isinstance(fastest(adapted.model, names_of(adapted), inputs), Vmapped)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_one_is_a_plain_lora_for_stock_peft(kind: str, tmp_path: Path) -> None:
    adapted = moved(kind, "nola")
    save(adapted, tmp_path)
    labels = None if kind == "llama" else 3
    loaded, _ = load_adapted_folder(tmp_path, str(FOLDERS[kind]), adapted.config(), labels)
    loaded.save_pretrained(tmp_path / "lora")
    base = CLASSES[TASKS[kind]].from_pretrained(FOLDERS[kind], **({} if labels is None else {"num_labels": labels}))
    again = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert torch.allclose(logits_of(again, kind), logits_of(adapted.model, kind), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_it_is_merged_into_the_base(kind: str, tmp_path: Path) -> None:
    adapted = moved(kind, "nola")
    (tmp_path / "adapter").mkdir()
    save(adapted, tmp_path / "adapter")
    merge_into_base(tmp_path / "adapter", tmp_path / "merged", str(FOLDERS[kind]))
    auto = AutoModelForCausalLM if kind == "llama" else AutoModelForSequenceClassification
    merged = auto.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits_of(merged, kind), logits_of(adapted.model, kind), atol=1e-5)


def test_the_head_of_a_language_model_is_left_alone() -> None:
    names = {t.name for t in moved("llama", "nola").layout.tensors}
    assert not any("lm_head" in name for name in names)
    assert len(names) == 2 * 2 * 7


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter.targets.*no such linear layer.*Nearest legal: \"all-linear\""):
        load_model(spec_for("bert", "nola", 'adapter.targets=["nothing"]'))
    with pytest.raises(ModelError, match=r"no such linear layer in the layers \[0\]"):
        load_model(spec_for("bert", "nola", "adapter.layers=[0]", 'adapter.targets=["pooler.dense"]'))
    adapted = moved("bert", "nola")
    save(adapted, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lost = next(name for name in tensors if PREFIX in name)
    save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter.start.*does not fit.*nola"):
        load_model(spec_for("bert", "nola", f"adapter.start={tmp_path}"))
    with pytest.raises(ModelError, match=r"cannot take it.*nola"):
        load_adapted_folder(tmp_path, str(FOLDERS["bert"]), adapted.config(), 3)
    save(adapted, tmp_path)
    with pytest.raises(ModelError, match=r"adapter.start.*does not fit"):
        load_model(spec_for("llama-head", "nola", f"adapter.start={tmp_path}"))
