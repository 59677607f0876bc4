"""`adapter.layers`: the same blocks for every kind of adapter, and peft's own reading of them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from fedapt.client.blocks import block_of
from fedapt.client.models import load_model
from fedapt.protocols.errors import ModelError

from .test_adapters import LEGAL, folders, save, spec_for  # noqa: F401

WHOLE = ("prompt", "prefix", "head", "full")
by_base_and_method = pytest.mark.parametrize(("kind", "method"), [pair for pair in LEGAL if pair[1] not in WHOLE])
HEADS = ("base_model.model.classifier", "base_model.model.score")
segments = st.lists(st.sampled_from(["model", "layers", "0", "1", "2", "12", "q"]), min_size=1, max_size=6)


@by_base_and_method
def test_only_the_named_blocks_are_adapted(kind: str, method: str) -> None:
    """And those as in a run that adapts all: each tensor of the start is keyed by its own name."""
    whole = load_model(spec_for(kind, method))
    everything = whole.layout.split(whole.read())
    for layers in ([0], [1], [0, 1]):
        adapted = load_model(spec_for(kind, method, f"adapter.layers={layers}"))
        names = {t.name for t in adapted.layout.tensors if not t.name.startswith(HEADS)}
        assert {block_of(name) for name in names} == set(layers)
        assert names == {n for n in everything if block_of(n) in layers and not n.startswith(HEADS)}
        for name, values in adapted.layout.split(adapted.read()).items():
            assert np.array_equal(values, everything[name])


@by_base_and_method
def test_a_saved_adapter_of_one_block_comes_back(kind: str, method: str, tmp_path: Path) -> None:
    adapted = load_model(spec_for(kind, method, "adapter.layers=[1]"))
    adapted.write(adapted.read() + np.float32(0.05))
    save(adapted, tmp_path)
    again = load_model(spec_for(kind, method, f"adapter.start={tmp_path}"))
    assert again.layout == adapted.layout
    assert np.array_equal(again.read(), adapted.read())


def test_names_of_targets_and_the_word_agree() -> None:
    for method in ("lora", "ia3"):
        for targets in ('["query"]', '["intermediate.dense"]'):
            adapted = load_model(spec_for("bert", method, "adapter.layers=[1]", f"adapter.targets={targets}"))
            whole = load_model(spec_for("bert", method, "adapter.layers=[1]"))
            own = {t for t in adapted.layout.tensors if not t.name.startswith(HEADS)}
            assert own == {t for t in whole.layout.tensors if f".{targets.strip('[]')[1:-1]}." in t.name}


@given(segments, st.integers(0, 12))
def test_blocks_are_numbered_as_peft_numbers_them(segments: list[str], layer: int) -> None:
    name = ".".join(["base", *segments, "target"])
    config = LoraConfig(target_modules=["target"], layers_to_transform=[layer])
    assert (block_of(name) == layer) == bool(check_target_module_exists(config, name))


@pytest.mark.parametrize("method", ["lora", "ia3", "bias", "bottleneck"])
def test_a_block_beyond_the_last_is_refused(method: str) -> None:
    with pytest.raises(
        ModelError, match=r"adapter.layers = \[0, 2, 7\]: this base has 2 blocks.*Nearest legal: \[0, 1\]"
    ):
        load_model(spec_for("bert", method, "adapter.layers=[0, 2, 7]"))


@pytest.mark.parametrize("method", ["lora", "ia3", "bottleneck"])
def test_targets_outside_of_the_blocks_are_refused(method: str) -> None:
    with pytest.raises(ModelError, match=r"adapter.targets.*pooler"):
        load_model(spec_for("bert", method, "adapter.layers=[0]", 'adapter.targets=["pooler.dense"]'))
