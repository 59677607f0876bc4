import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.client.batches import _quantile_order, plan_batches
from fedapt.client.tasks import Indices
from fedapt.protocols.spec import Local

lengths_of = st.lists(st.integers(1, 50), min_size=1, max_size=60).map(lambda own: np.array(own, np.int64))
batch_sizes = st.integers(1, 20)
seeds = st.integers(0, 2**40)


def plan(
    lengths: Indices,
    *,
    batch_size: int = 4,
    steps: int | None = None,
    epochs: float | None = None,
    seed: int = 0,
    round_: int = 1,
    node: int = 0,
) -> list[Indices]:
    return plan_batches(lengths, Local(batch_size=batch_size, steps=steps, epochs=epochs), seed, round_, node)


def same(one: list[Indices], two: list[Indices]) -> bool:
    return len(one) == len(two) and all(np.array_equal(x, y) for x, y in zip(one, two, strict=True))


@given(lengths_of, batch_sizes, st.integers(1, 3), seeds)
def test_an_epoch_has_every_example_once(lengths: Indices, batch_size: int, epochs: int, seed: int) -> None:
    batches = plan(lengths, batch_size=batch_size, epochs=epochs, seed=seed)
    steps = -(-len(lengths) // batch_size)
    assert len(batches) == epochs * steps
    for epoch in range(epochs):
        seen = np.concatenate(batches[epoch * steps : (epoch + 1) * steps])
        assert sorted(seen) == list(range(len(lengths)))


@given(lengths_of, batch_sizes, st.floats(0.01, 1), seeds)
def test_a_part_of_an_epoch_is_its_beginning(lengths: Indices, batch_size: int, share: float, seed: int) -> None:
    part, whole = (plan(lengths, batch_size=batch_size, epochs=e, seed=seed) for e in (share, 1.0))
    assert same(part, whole[: len(part)])
    assert len(part) == max(1, int(np.ceil(len(whole) * share)))


@given(lengths_of, batch_sizes)
def test_one_epoch_is_what_nothing_said_means(lengths: Indices, batch_size: int) -> None:
    assert same(plan(lengths, batch_size=batch_size), plan(lengths, batch_size=batch_size, epochs=1))


@given(lengths_of, batch_sizes, st.integers(1, 30), seeds)
def test_sizes(lengths: Indices, batch_size: int, steps: int, seed: int) -> None:
    batches = plan(lengths, batch_size=batch_size, steps=steps, seed=seed)
    assert len(batches) == steps
    smallest = len(lengths) // -(-len(lengths) // batch_size)
    for batch in batches:
        assert smallest <= len(batch) <= min(batch_size, smallest + 1)
        assert len(set(batch)) == len(batch)


@given(lengths_of, st.integers(1, 30), seeds)
def test_fewer_steps_are_a_beginning(lengths: Indices, steps: int, seed: int) -> None:
    assert same(plan(lengths, steps=steps, seed=seed), plan(lengths, steps=steps + 5, seed=seed)[:steps])


def test_a_node_with_less_than_a_batch_uses_all_of_it_in_each_step() -> None:
    batches = plan(np.array([5, 9, 2]), batch_size=8, steps=4)
    assert [sorted(batch) for batch in batches] == [[0, 1, 2]] * 4


@pytest.mark.parametrize(("steps", "epochs"), [(None, None), (5, None), (None, 3)])
def test_no_examples_give_no_batches(steps: int | None, epochs: int | None) -> None:
    assert plan(np.array([], np.int64), steps=steps, epochs=epochs) == []


@given(lengths_of, seeds)
def test_a_plan_is_repeatable(lengths: Indices, seed: int) -> None:
    assert same(plan(lengths, seed=seed, epochs=2), plan(lengths, seed=seed, epochs=2))


def test_a_plan_is_keyed_by_run_round_node_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 80)
    plans = [
        plan(lengths),
        plan(lengths, seed=1),
        plan(lengths, round_=2),
        plan(lengths, node=1),
        plan(lengths, epochs=2)[20:],
    ]
    for i, one in enumerate(plans):
        assert not any(same(one, other) for other in plans[i + 1 :])


def padded(lengths: Indices, batches: list[Indices]) -> int:
    """Tokens of all batches after padding."""
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


@pytest.mark.parametrize("seed", range(5))
def test_like_lengths_share_a_batch(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.lognormal(3, 0.8, 200).astype(np.int64) + 1
    unordered = np.array_split(random.permutation(200), 25)
    waste, waste_unordered = (padded(lengths, b) - lengths.sum() for b in (plan(lengths, batch_size=8), unordered))
    assert waste < 0.3 * waste_unordered


@pytest.mark.parametrize("seed", range(5))
def test_nodes_visit_their_lengths_in_one_order(seed: int) -> None:
    """So a cohort pads less than if each node shuffled its batches for itself."""
    random = np.random.default_rng(seed)
    nodes = [random.lognormal(3, 0.8, count).astype(np.int64) + 1 for count in (120, 90, 150, 60)]
    plans = [plan(lengths, batch_size=6, steps=10, node=node) for node, lengths in enumerate(nodes)]
    longest = [[int(own[b].max()) for b in batches] for own, batches in zip(nodes, plans, strict=True)]
    together = sum(max(step) for step in zip(*longest, strict=True))
    shuffled = [random.permutation(own) for own in longest]
    assert together < sum(max(step) for step in zip(*shuffled, strict=True))


@given(st.integers(1, 300), st.floats(0, 1, exclude_max=True))
def test_the_order_of_quantiles_is_a_permutation(count: int, start: float) -> None:
    assert sorted(_quantile_order(count, start)) == list(range(count))


@given(st.integers(20, 60), st.integers(20, 60), st.floats(0, 1, exclude_max=True))
def test_quantiles_are_near_each_other_whatever_the_count(few: int, many: int, start: float) -> None:
    one, two = (_quantile_order(count, start)[:10] / count for count in (few, many))
    assert np.abs(one - two).max() < 0.2
