from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.client.feedback import Feedback
from fedapt.protocols.codecs import CODECS, Codec, TopK
from fedapt.protocols.errors import PayloadError
from fedapt.protocols.layout import B_SUFFIX, AdapterLayout, Flat, TensorSpec
from fedapt.protocols.update import Assignment

LAYOUT = AdapterLayout(
    [
        TensorSpec("q" + B_SUFFIX, (6, 3), "B"),
        TensorSpec("still" + B_SUFFIX, (4, 2), "B"),
        TensorSpec("head", (5,), "other"),
    ]
)
TOP_K = TopK(0.2, CODECS["fp32"])
Rotation = Mapping[str, np.ndarray[tuple[int, int], np.dtype[np.float32]]]


LATER = 1000
"""A round after all others: what is left before it is the last residual."""


def changes(rounds: int, seed: int = 0) -> list[Flat]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(LAYOUT.size).astype(np.float32) for _ in range(rounds)]


def rotations(rounds: int) -> list[Rotation]:
    """A random orthogonal basis for `q` in each round; `still` keeps its own."""
    random = np.random.default_rng(1)
    return [{"q": np.linalg.qr(random.standard_normal((3, 3)))[0].astype(np.float32)} for _ in range(rounds)]


def in_first_basis(flat: Flat, rotation: Rotation) -> Flat:
    """Multiplied out: B·A = (B·rotation)·A₀."""
    tensors = LAYOUT.split(flat.copy())
    for module, matrix in rotation.items():
        tensors[module + B_SUFFIX][...] = tensors[module + B_SUFFIX] @ matrix
    return LAYOUT.join(tensors)


def asked(node: int, round_: int, run: str = "run") -> Assignment:
    return Assignment(run, round_, 1, node, "version", b"")


def imbalance(turns: list[Rotation], told: list[Rotation], codec: Codec = TOP_K) -> float:
    """max |Σ sent − (Σ changes − last residual)| in the basis of A₀, where the feedback is told of `told`."""
    feedback, sent, moved = Feedback(LAYOUT), np.zeros(LAYOUT.size), np.zeros(LAYOUT.size)
    for key, (change, turn, heard) in enumerate(zip(changes(len(turns)), turns, told, strict=True)):
        payload = feedback.encode(asked(7, key), change, heard, codec, key)
        sent += in_first_basis(codec.decode(payload, LAYOUT), turn)
        moved += in_first_basis(change, turn)
    residual = feedback.corrected(asked(7, LATER), np.zeros(LAYOUT.size, np.float32), {})
    assert np.abs(residual).max() > 0.1, "something must have been left out"
    return float(np.abs(sent - (moved - residual)).max())


STILL: list[Rotation] = [{}] * 30


@pytest.mark.parametrize("inner", CODECS)
def test_what_is_sent_is_what_has_moved_minus_the_last_residual(inner: str) -> None:
    assert imbalance(STILL, STILL, TopK(0.2, CODECS[inner])) < 1e-5


def test_the_residual_turns_with_the_basis() -> None:
    turns = rotations(30)
    assert imbalance(turns, turns) < 1e-5


def test_a_residual_that_does_not_turn_is_seen() -> None:
    """The negative controls: rotations that feedback is not told of, or told of too late."""
    turns = rotations(30)
    assert imbalance(turns, STILL) > 0.1
    assert imbalance(turns, [{}, *turns[:-1]]) > 0.1


def test_without_feedback_most_is_lost() -> None:
    """Why it exists: one and the same change in each round arrives whole in the mean with it, and never without."""
    change, feedback = changes(1)[0], Feedback(LAYOUT)
    rounds = range(300)
    fed = [TOP_K.decode(feedback.encode(asked(0, n), change, {}, TOP_K, 0), LAYOUT) for n in rounds]
    alone = TOP_K.decode(TOP_K.encode(change, LAYOUT, 0), LAYOUT)
    assert np.abs(np.mean(fed, axis=0) - change).max() < 0.1
    assert np.abs(alone - change).max() > 0.5


@given(st.from_type(AdapterLayout), st.integers(0, 2**32))
def test_any_layout_balances(layout: AdapterLayout, seed: int) -> None:
    random, feedback = np.random.default_rng(seed), Feedback(layout)
    sent, moved = np.zeros(layout.size), np.zeros(layout.size)
    for number in range(3):
        change = random.standard_normal(layout.size).astype(np.float32)
        sent += TOP_K.decode(feedback.encode(asked(0, number), change, {}, TOP_K, 0), layout)
        moved += change
    residual = feedback.corrected(asked(0, LATER), np.zeros(layout.size, np.float32), {})
    assert np.allclose(sent, moved - residual, atol=1e-5)


def test_nodes_have_residuals_of_their_own_and_inputs_stay_as_they_are() -> None:
    feedback, (first, second) = Feedback(LAYOUT), changes(2)
    before = first.copy()
    feedback.encode(asked(1, 1), first, {}, TOP_K, 0)
    assert np.array_equal(feedback.corrected(asked(2, LATER), second, {}), second)
    assert not np.array_equal(feedback.corrected(asked(1, LATER), second, {}), second)
    assert np.array_equal(first, before)


def test_a_change_that_is_not_finite_leaves_the_residual_as_it_was() -> None:
    feedback, (first, second) = Feedback(LAYOUT), changes(2)
    feedback.encode(asked(1, 1), first, {}, TOP_K, 0)
    before = feedback.corrected(asked(1, LATER), second, {})
    payload = feedback.encode(asked(1, 2), np.full_like(first, np.nan), {}, TOP_K, 0)
    with pytest.raises(PayloadError, match="NaN"):
        TOP_K.decode(payload, LAYOUT)
    assert np.array_equal(feedback.corrected(asked(1, LATER), second, {}), before)


def test_a_residual_that_is_not_finite_is_not_kept() -> None:
    """Each value fits in fp32 and is sent as it is; a row of what is left, turned into another basis, does not."""
    feedback, (first, _) = Feedback(LAYOUT), changes(2)
    feedback.encode(asked(1, 1), first, {}, TOP_K, 0)
    before = feedback.corrected(asked(1, LATER), first, {})
    turn = np.linalg.qr(np.ones((3, 3)) + np.eye(3))[0].astype(np.float32)
    payload = feedback.encode(asked(1, 2), np.full_like(first, 3e38), {"q": turn}, TOP_K, 0)
    assert np.isfinite(TOP_K.decode(payload, LAYOUT)).all()
    assert np.array_equal(feedback.corrected(asked(1, LATER), first, {}), before)


def test_a_nan_of_a_gpu_is_refused_where_it_arrives_and_kept_nowhere() -> None:
    feedback, codec = Feedback(LAYOUT), TopK(0.2, CODECS["bf16"])
    first, second = changes(2)
    feedback.encode(asked(1, 1), first, {}, codec, 0)
    before = feedback.corrected(asked(1, LATER), first, {})
    second.view(np.uint32)[3] = 0x7FFFFFFF
    payload = feedback.encode(asked(1, 2), second, {}, codec, 0)
    with pytest.raises(PayloadError, match="NaN"):
        codec.decode(payload, LAYOUT)
    assert np.array_equal(feedback.corrected(asked(1, LATER), first, {}), before)


def test_a_round_that_is_asked_for_again_sends_the_same_bytes() -> None:
    feedback, (first, second) = Feedback(LAYOUT), changes(2)
    feedback.encode(asked(1, 1), first, {}, TOP_K, 0)
    once = feedback.encode(asked(1, 2), second, {}, TOP_K, 0)
    assert feedback.encode(asked(1, 2), second, {}, TOP_K, 0) == once
    assert feedback.encode(asked(1, 3), second, {}, TOP_K, 0) != once


def test_another_run_starts_without_a_residual() -> None:
    feedback, (first, second) = Feedback(LAYOUT), changes(2)
    feedback.encode(asked(1, 1), first, {}, TOP_K, 0)
    assert feedback.encode(asked(1, 2, "another"), second, {}, TOP_K, 0) == TOP_K.encode(second, LAYOUT, 0)
