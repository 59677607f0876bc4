import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.keys import derive, generator

Name = tuple[int, str, tuple[int | str, ...]]

parts = st.lists(st.integers() | st.text(max_size=5), max_size=4).map(tuple)
names = st.tuples(st.integers(0, 2), st.sampled_from(["", "a", "ab"]), parts)


def key_of(name: Name) -> int:
    seed, purpose, tail = name
    return derive(seed, purpose, *tail)


def test_known_keys() -> None:
    """A changed key would change every run that was ever recorded."""
    assert derive(7, "batches", 3, "a") == 0x62090E27874E1AEEC30CC466D8E169BC
    assert generator(derive(7, "batches")).integers(0, 2**32, 3).tolist() == [2762152794, 503656516, 2694892234]


@given(names, names)
def test_two_names_never_share_a_key(first: Name, second: Name) -> None:
    assert (key_of(first) == key_of(second)) == (first == second)


def test_parts_do_not_run_together() -> None:
    """The cases that joining the parts as text would confuse."""
    confusable: list[tuple[int | str, ...]] = [("ab",), ("a", "b"), ("a", "b", ""), ("",), (), (12,), ("12",), (1, 2)]
    assert len({derive(0, "x", *p) for p in confusable}) == len(confusable)
    assert derive(0, "x", "y") != derive(0, "xy")
    assert derive(1, "x", 2) != derive(2, "x", 1)


@given(st.integers(0, 2**128 - 1))
def test_a_generator_depends_on_its_key_alone(key: int) -> None:
    draws = generator(key).random(4)
    np.random.default_rng(0).random(3)
    assert np.array_equal(generator(key).random(4), draws)
    assert not np.array_equal(generator(key ^ 1).random(4), draws)


@given(st.integers(), st.text(max_size=5), parts)
def test_a_key_has_128_bits(seed: int, purpose: str, tail: tuple[int | str, ...]) -> None:
    assert 0 <= derive(seed, purpose, *tail) < 2**128
