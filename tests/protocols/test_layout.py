import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.errors import PayloadError
from fedapt.protocols.layout import (
    A_SUFFIX,
    B_SUFFIX,
    FROZEN_A_SUFFIX,
    FROZEN_B_SUFFIX,
    ROTATION_SUFFIX,
    AdapterLayout,
    Role,
    TensorSpec,
)

layouts = st.from_type(AdapterLayout)
roles: st.SearchStrategy[Role] = st.sampled_from(["A", "B", "frozen", "other"])
ranks = st.integers(0, 6)


def lora(module: str, rank: int = 2, inputs: int = 3, outputs: int = 4) -> list[TensorSpec]:
    return [
        TensorSpec(module + A_SUFFIX, (rank, inputs), "A"),
        TensorSpec(module + B_SUFFIX, (outputs, rank), "B"),
    ]


def flat_of(layout: AdapterLayout) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.arange(layout.size, dtype=np.float32)


@given(layouts)
def test_split_and_join_invert_each_other(layout: AdapterLayout) -> None:
    flat = flat_of(layout)
    tensors = layout.split(flat)
    assert {name: view.shape for name, view in tensors.items()} == {t.name: t.shape for t in layout.tensors}
    assert np.array_equal(layout.join(tensors), flat)


@given(layouts)
def test_tensors_lie_by_name_without_gaps(layout: AdapterLayout) -> None:
    assert [t.name for t in layout.tensors] == sorted(t.name for t in layout.tensors)
    ends = [layout.offsets[t.name] + t.size for t in layout.tensors]
    assert [layout.offsets[t.name] for t in layout.tensors] == [0, *ends][: len(ends)]
    assert layout.size == (ends[-1] if ends else 0)


@given(layouts, st.randoms(use_true_random=False))
def test_the_order_of_the_tensors_given_does_not_matter(layout: AdapterLayout, random: Random) -> None:
    tensors = list(layout.tensors)
    random.shuffle(tensors)
    again = AdapterLayout(tensors)
    assert again == layout
    assert hash(again) == hash(layout)
    assert again.digest == layout.digest


@given(layouts, st.sets(roles))
def test_select_keeps_the_roles_asked_for(layout: AdapterLayout, roles: set[Role]) -> None:
    selected = layout.select(roles)
    assert selected.tensors == tuple(t for t in layout.tensors if t.role in roles)
    part, whole = selected.split(selected.join(layout.split(flat_of(layout)))), layout.split(flat_of(layout))
    assert all(np.array_equal(part[name], whole[name]) for name in part)


@given(layouts)
def test_pairs_are_the_modules_with_both_factors(layout: AdapterLayout) -> None:
    names = {t.name for t in layout.tensors}
    both = {n.removesuffix(A_SUFFIX) for n in names if n.endswith(A_SUFFIX)}
    assert {p.module for p in layout.pairs} == {m for m in both if m + B_SUFFIX in names}
    assert all(p.rank == p.a.shape[0] == p.b.shape[1] for p in layout.pairs)


@given(layouts)
def test_rotations_stand_in_for_the_factors_a(layout: AdapterLayout) -> None:
    rotated = layout.with_rotations()
    assert not any(t.role == "A" for t in rotated.tensors)
    rotations = {t.name: t.shape for t in rotated.tensors if t.name.endswith(ROTATION_SUFFIX)}
    assert rotations == {p.module + ROTATION_SUFFIX: (p.rank, p.rank) for p in layout.pairs}
    kept = [t for t in rotated.tensors if t.name not in rotations]
    assert kept == [t for t in layout.tensors if t.role != "A"]


@given(layouts, ranks)
def test_at_a_rank_each_factor_has_its_leading_components(layout: AdapterLayout, rank: int) -> None:
    for whole in (layout, layout.with_rotations()):
        smaller, flat = whole.at_rank(rank), flat_of(whole)
        assert [t.name for t in smaller.tensors] == [t.name for t in whole.tensors]
        cut, tensors = smaller.split(whole.cut(flat, smaller)), whole.split(flat)
        for t in whole.tensors:
            expected = tensors[t.name]
            if rank and t.name.endswith((A_SUFFIX, ROTATION_SUFFIX)):
                expected = expected[:rank]
            elif rank and t.name.endswith(B_SUFFIX):
                expected = expected[:, :rank]
            assert np.array_equal(cut[t.name], expected)


@given(layouts, ranks)
def test_what_is_cut_and_padded_is_zero_beyond_the_rank(layout: AdapterLayout, rank: int) -> None:
    smaller, flat = layout.at_rank(rank), flat_of(layout) + 1
    padded = layout.pad(layout.cut(flat, smaller), smaller)
    assert np.array_equal(layout.cut(padded, smaller), layout.cut(flat, smaller))
    assert set(np.unique(padded[padded != flat])) <= {0.0}
    assert np.count_nonzero(padded) == smaller.size
    if rank == 0 or rank >= 5:
        assert smaller == layout
        assert np.array_equal(padded, flat)


def test_a_part_pads_to_the_whole_as_well() -> None:
    layout = AdapterLayout([*lora("m"), TensorSpec("s", (), "other")])
    part = layout.select({"B", "other"})
    padded = layout.pad(flat_of(part) + 1, part)
    assert np.array_equal(layout.cut(padded, part), flat_of(part) + 1)
    assert not layout.split(padded)["m" + A_SUFFIX].any()
    with pytest.raises(PayloadError, match="does not fit"):
        layout.pad(np.zeros(part.size + 1, np.float32), part)


@given(layouts, ranks, ranks)
def test_frozen_factors_stand_beside_each_pair(layout: AdapterLayout, budget: int, filled: int) -> None:
    whole = layout.with_frozen(budget)
    assert whole.pairs == layout.pairs
    assert AdapterLayout(t for t in whole.tensors if t.role != "frozen") == layout
    shapes = {t.name: t.shape for t in whole.select({"frozen"}).tensors}
    assert shapes == {
        name: shape
        for pair in layout.pairs
        for name, shape in (
            (pair.module + FROZEN_B_SUFFIX, (pair.b.shape[0], budget)),
            (pair.module + FROZEN_A_SUFFIX, (budget, pair.a.shape[1])),
        )
    }
    assert all(pair.frozen[0] in shapes and pair.frozen[1] in shapes for pair in layout.pairs)
    assert whole.frozen_at(filled) == layout.with_frozen(min(budget, filled))
    assert whole.at_rank(2) == layout.at_rank(2).with_frozen(budget), "a node's rank is of what it trains"


def test_a_tensor_that_is_no_factor_keeps_its_shape_at_any_rank() -> None:
    for spec in (
        TensorSpec("m" + A_SUFFIX, (7, 3), "other"),  # a factor of DoRA, say
        TensorSpec("m" + A_SUFFIX, (7, 3, 3), "A"),
        TensorSpec("score.weight", (7, 7), "other"),
    ):
        assert spec.at_rank(2) == spec


@given(layouts)
def test_json_round_trip(layout: AdapterLayout) -> None:
    again = AdapterLayout.from_json(layout.to_json())
    assert again == layout
    assert again.digest == layout.digest


@pytest.mark.parametrize(
    "change", [{"name": "m.lora_B.weights"}, {"shape": (2, 4)}, {"shape": (8,)}, {"role": "other"}], ids=str
)
def test_any_change_changes_the_digest(change: dict[str, str]) -> None:
    a, b = lora("m")
    assert AdapterLayout([a, replace(b, **change)]).digest != AdapterLayout([a, b]).digest  # type: ignore[arg-type]
    assert AdapterLayout([a]).digest != AdapterLayout([a, b]).digest


def test_repeated_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"repeat in the layout.*m\.lora_A\.weight"):
        AdapterLayout([*lora("m"), *lora("m")])


@pytest.mark.parametrize("shape", [(13,), (15,), (14, 1), (2, 7), ()])
def test_split_refuses_a_wrong_length(shape: tuple[int, ...]) -> None:
    with pytest.raises(PayloadError, match="does not fit a layout of 14 values"):
        AdapterLayout(lora("m")).split(np.zeros(shape, np.float32))


def test_join_ignores_other_names_and_needs_its_own() -> None:
    layout = AdapterLayout(lora("m"))
    tensors = layout.split(flat_of(layout))
    assert np.array_equal(layout.join({**tensors, "foreign": np.zeros(3)}), flat_of(layout))
    with pytest.raises(KeyError, match="lora_A"):
        layout.join({})


ROW = {"name": "m", "shape": [1], "role": "A"}
BAD_JSON = {
    "not JSON": "{",
    "a number": "5",
    "null": "null",
    "a list of numbers": "[1]",
    "a string": '"ab"',
    "no name": json.dumps([{"shape": [1], "role": "A"}]),
    "no shape": json.dumps([{"name": "m", "role": "A"}]),
    "no role": json.dumps([{"name": "m", "shape": [1]}]),
    "an unknown role": json.dumps([{**ROW, "role": "C"}]),
    "a role that is a list": json.dumps([{**ROW, "role": ["A"]}]),
    "a negative axis": json.dumps([{**ROW, "shape": [2, -1]}]),
    "an infinite axis": json.dumps([{**ROW, "shape": [float("inf")]}]),
    "an axis that is NaN": json.dumps([{**ROW, "shape": [float("nan")]}]),
    "an axis that is a word": json.dumps([{**ROW, "shape": ["x"]}]),
    "a shape that is a number": json.dumps([{**ROW, "shape": 3}]),
    "a repeated name": json.dumps([ROW, ROW]),
    "an abyss": "[" * 100_000,
}


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_bad_json_is_a_payload_error(text: str) -> None:
    with pytest.raises(PayloadError, match="not an adapter layout"):
        AdapterLayout.from_json(text)


@given(st.from_type(AdapterLayout))
def test_a_view_is_the_tensor_of_the_split(layout: AdapterLayout) -> None:
    flat = np.arange(layout.size, dtype=np.float32)
    for name, tensor in layout.split(flat).items():
        assert np.array_equal(layout.view(flat, name), tensor)
        assert np.shares_memory(layout.view(flat, name), flat) or not tensor.size
