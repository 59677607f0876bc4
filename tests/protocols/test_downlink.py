from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapt.protocols.downlink import initial_state, whole_adapter
from fedapt.protocols.errors import PayloadError
from fedapt.protocols.layout import A_SUFFIX, B_SUFFIX, ROTATION_SUFFIX, AdapterLayout, Flat, TensorSpec
from fedapt.protocols.recipes import RECIPES, Recipe

recipes = st.sampled_from(list(RECIPES.values()))
seeds = st.integers(0, 2**32 - 1)
Matrix = np.ndarray[Any, np.dtype[Any]]


def values(layout: AdapterLayout, seed: int) -> Flat:
    return np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)


def orthogonal(rank: int, random: np.random.Generator) -> Matrix:
    return np.linalg.qr(random.standard_normal((rank, rank)))[0] if rank else np.zeros((0, 0))


@given(recipes, st.from_type(AdapterLayout), seeds)
def test_the_initial_state_stands_for_the_start(recipe: Recipe, layout: AdapterLayout, seed: int) -> None:
    start = values(layout, seed)
    state = initial_state(recipe, layout, start)
    assert state.dtype == np.float32
    assert state.shape == (recipe.downlink(layout).size,)
    assert np.array_equal(whole_adapter(recipe, layout, start, state), start)


@given(recipes, st.from_type(AdapterLayout), seeds)
def test_what_travels_is_taken_and_the_rest_stays(recipe: Recipe, layout: AdapterLayout, seed: int) -> None:
    start, state = values(layout, seed), values(recipe.downlink(layout), seed + 1)
    kept, sent = start.copy(), recipe.downlink(layout).split(state)
    for name, tensor in layout.split(whole_adapter(recipe, layout, start, state)).items():
        module = name.removesuffix(A_SUFFIX)
        if name in sent:
            expected = sent[name]
        elif module + ROTATION_SUFFIX in sent:
            expected = sent[module + ROTATION_SUFFIX] @ layout.split(start)[name]
        else:
            expected = layout.split(start)[name]
        assert np.array_equal(tensor, expected)
    assert np.array_equal(start, kept)


@settings(max_examples=25)
@given(st.from_type(AdapterLayout), seeds)
def test_a_rotation_and_its_inverse_in_b_leave_every_product(layout: AdapterLayout, seed: int) -> None:
    recipe, random, start = RECIPES["fedsvd"], np.random.default_rng(seed), values(layout, seed)
    state = initial_state(recipe, layout, start)
    tensors, before = recipe.downlink(layout).split(state), layout.split(start)
    for pair in layout.pairs:
        rotation = orthogonal(pair.rank, random)
        tensors[pair.module + ROTATION_SUFFIX][...] = rotation
        tensors[pair.b.name][...] = tensors[pair.b.name] @ rotation.T
    after = layout.split(whole_adapter(recipe, layout, start, state))
    for pair in layout.pairs:
        product = before[pair.b.name] @ before[pair.a.name]
        np.testing.assert_allclose(after[pair.b.name] @ after[pair.a.name], product, atol=1e-5, rtol=1e-5)


def test_the_downlink_of_each_recipe() -> None:
    a, b = TensorSpec("q" + A_SUFFIX, (2, 5), "A"), TensorSpec("q" + B_SUFFIX, (3, 2), "B")
    layout = AdapterLayout([a, b, TensorSpec("score.weight", (4, 3), "other")])
    names = {name: [t.name for t in recipe.downlink(layout).tensors] for name, recipe in RECIPES.items()}
    assert names == {
        "fedsvd": [b.name, "q" + ROTATION_SUFFIX, "score.weight"],
        "ffa": [b.name, "score.weight"],
        "flexlora": [a.name, b.name, "score.weight"],
        "fedit": [a.name, b.name, "score.weight"],
    }


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_state_of_another_size_is_refused(recipe: Recipe, extra: int) -> None:
    layout = AdapterLayout(
        [TensorSpec("q" + A_SUFFIX, (2, 5), "A"), TensorSpec("q" + B_SUFFIX, (3, 2), "B")],
    )
    wrong = np.zeros(recipe.downlink(layout).size + extra, np.float32)
    with pytest.raises(PayloadError, match="does not fit a layout"):
        whole_adapter(recipe, layout, np.zeros(layout.size, np.float32), wrong)
