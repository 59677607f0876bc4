"""Servers and nodes that are killed at random: no round is lost, nothing counts twice, and no release is uncharged."""

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedapt.protocols.spec import RunSpec
from fedapt.server.store import Snapshot, SqliteStore

from .federation import layout_of, recomputed, spec_of
from .nursery import Nursery, Process, free_port, nursery

NODES, WIDTH = [1, 2, 3], 40
PRIVATE = (
    "privacy.unit=client",
    "privacy.epsilon=100",
    "privacy.noise_multiplier=30.0",
    "privacy.clip=0.25",
    "privacy.population=3",
    "recipe.name=ffa",
    "recipe.weighting=uniform",
    "participation.sampling=poisson",
    "participation.rate=0.7",
    "participation.minimum=0",
)
ENDLESS = 10_000


@pytest.fixture(scope="module")
def _nursery() -> Iterator[Nursery]:
    with nursery() as children:
        yield children


@pytest.fixture
def children(_nursery: Nursery) -> Iterator[Nursery]:
    """One that is empty: its start takes longer than most lives in it."""
    yield _nursery
    _nursery.close()


def spec_with(rounds: int, *, private: bool) -> RunSpec:
    return spec_of(len(NODES), rounds, *(PRIVATE if private else ()), "run.evaluate_every=1000")


def released(folder: Path) -> dict[int, set[str]]:
    """What was published of each round, all lives of the server together; a last line can be cut off."""
    found: dict[int, set[str]] = {}
    path = folder / "published"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            round_, content = line.split()
            found.setdefault(int(round_), set()).add(content)
    return found


def check(folder: Path, *, private: bool) -> int:
    """The invariants that hold after every kill; the number of rounds."""
    store = SqliteStore(folder / "run.sqlite")
    try:
        with store.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall() == []
            hashes = connection.exec_driver_sql("SELECT round, hash FROM releases ORDER BY round").fetchall()
            twice = "SELECT count(*) FROM contributions GROUP BY run, round, node HAVING count(*) > 1"
            assert connection.exec_driver_sql(twice).fetchall() == []
        if store.find("run") is None:
            return 0
        rows = store.rows("run")
        last = len(rows) - 1
        assert [row["round"] for row in rows] == list(range(last + 1)), "rounds are contiguous"
        assert [round_ for round_, _ in hashes] == list(range(1, last + 1)), "each has one release"
        charged = Counter(entry.round for entry in store.chain().entries)
        if private:
            assert all(charged[round_] >= 1 for round_ in range(1, last + 1)), "released, and not charged"
        assert set(charged) == (set(range(1, last + 1)) if private else set())
        published = released(folder)
        assert set(published) <= set(range(1, last + 1))
        assert all(len(contents) == 1 for contents in published.values()), "a release that differs"
        if last in published:
            assert published[last] == {store.snapshot("run").to_bytes().hex()}
        if not private:
            state = store.snapshot("run").state
            assert np.allclose(state, recomputed(layout_of(WIDTH), NODES, last), rtol=0, atol=1e-5)
        return last
    finally:
        store.close()


def nodes_of(children: Nursery, folder: Path, port: int, seconds: float = 0.0) -> list[Process]:
    """Each in a process of its own."""
    return [
        children.start("attend", folder=str(folder), port=port, nodes=[node], width=WIDTH, seconds=seconds)
        for node in NODES
    ]


def kill_servers(children: Nursery, folder: Path, kills: int, *, private: bool, mutant: bool = False) -> int:
    """Kill one server after the other at random moments; the rounds that all of them came to."""
    chance, port, rounds = random.Random(kills + private), free_port(), 0
    spec = spec_with(ENDLESS, private=private).to_json()
    if private:
        children.warm(spec)
    nodes_of(children, folder, port)
    for _ in range(kills):
        server = children.start("serve", folder=str(folder), port=port, spec=spec, mutant=mutant)
        assert not server.has_ended(chance.uniform(0.05, 0.9)), "a server ended by itself"
        server.kill()
        now = check(folder, private=private)
        assert now >= rounds
        rounds = now
    return rounds


def test_servers_killed(children: Nursery, tmp_path: Path) -> None:
    assert kill_servers(children, tmp_path, 6, private=False) > 1


@pytest.mark.slow
@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_servers_killed_a_hundred_times(children: Nursery, tmp_path: Path, private: bool) -> None:
    """Together two hundred."""
    assert kill_servers(children, tmp_path, 100, private=private) > 20


def kill_at_each_write(children: Nursery, folder: Path, *, mutant: bool = False) -> int:
    """Kill a server at its first write, another one at its second, …, until one lives through its run; the writes.

    Each run is then ended by another server.
    """
    spec, port = spec_with(2, private=True).to_json(), free_port()
    children.warm(spec)
    nodes_of(children, folder, port)
    for point in itertools.count(1):
        own = folder / f"point-{point}"
        own.mkdir()
        SqliteStore(own / "run.sqlite").close()  # kills while tables are made are a test of the store
        arguments = {"folder": str(own), "port": port, "spec": spec, "mutant": mutant}
        assert children.start("serve", point=point, **arguments).has_ended(60)
        if check(own, private=True) == 2:
            return point
        assert children.start("serve", **arguments).has_ended(60)
        assert check(own, private=True) == 2
    raise AssertionError


@pytest.mark.slow
def test_servers_killed_at_each_write(children: Nursery, tmp_path: Path) -> None:
    assert kill_at_each_write(children, tmp_path) > 20


@pytest.mark.slow
def test_a_server_that_charges_after_the_release_is_caught(children: Nursery, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="released, and not charged"):
        kill_at_each_write(children, tmp_path, mutant=True)


def kill_nodes(children: Nursery, folder: Path, kills: int, rounds: int) -> bytes:
    """A run whose nodes are killed while they work, one at a time, and started again."""
    chance, port = random.Random(kills), free_port()
    nodes = nodes_of(children, folder, port, seconds=0.02)
    server = children.start("serve", folder=str(folder), port=port, spec=spec_with(rounds, private=False).to_json())
    for _ in range(kills):
        time.sleep(chance.uniform(0.0, 0.15))
        which = chance.randrange(len(NODES))
        nodes[which].kill()
        nodes[which] = children.start(
            "attend", folder=str(folder), port=port, nodes=[NODES[which]], width=WIDTH, seconds=0.02
        )
    assert server.has_ended(120), "the run comes to its end"
    assert check(folder, private=False) == rounds
    return last(folder).to_bytes()


def last(folder: Path) -> Snapshot:
    store = SqliteStore(folder / "run.sqlite")
    try:
        return store.snapshot("run")
    finally:
        store.close()


def test_nodes_killed(children: Nursery, tmp_path: Path) -> None:
    """The state is the same, to the bit, as where nobody is killed."""
    for name in ("killed", "clean"):
        (tmp_path / name).mkdir()
    killed, clean = (kill_nodes(children, tmp_path / name, kills, 10) for name, kills in (("killed", 8), ("clean", 0)))
    assert killed == clean


@pytest.mark.slow
def test_nodes_killed_two_hundred_times(children: Nursery, tmp_path: Path) -> None:
    kill_nodes(children, tmp_path, 200, 200)


def test_a_rolling_upgrade(children: Nursery, tmp_path: Path) -> None:
    """The server is renewed first, in the middle of a run, and its nodes are of yesterday."""
    port, rounds = free_port(), 12
    spec = spec_with(rounds, private=False).to_json()
    nodes_of(children, tmp_path, port, seconds=0.05)
    old = children.start("serve", folder=str(tmp_path), port=port, spec=spec)
    while len(released(tmp_path)) < 3:
        assert not old.has_ended(0.01)
    old.kill()
    assert 3 <= check(tmp_path, private=False) < rounds
    new = children.start("serve", folder=str(tmp_path), port=port, spec=spec, protocols=2)
    assert new.has_ended(60)
    assert check(tmp_path, private=False) == rounds
    assert json.loads(spec)["run"]["rounds"] == len(released(tmp_path))
