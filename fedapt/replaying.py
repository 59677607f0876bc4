"""A zeroth-order run from its log alone: the base's start and the bytes that were sent make the adapter, bit for bit."""

from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from .kernels.replica import Replica
from .outputs import STORE
from .protocols.errors import DataError
from .protocols.exchange import terms_of
from .protocols.legality import recipe_of
from .protocols.spec import RunSpec
from .server.log import SqlLog
from .server.log import replay as replayed
from .server.store import SqlStore, open_store


@dataclass(frozen=True)
class Replayed:
    """What a log leads to. `state` is the hash after `exchanges`, `stored` the one that the run had written down."""

    run: str
    exchanges: int
    state: str
    stored: str

    @property
    def same(self) -> bool:
        return self.state == self.stored

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"same": self.same}

    def text(self) -> str:
        found = f"run {self.run}: {self.exchanges} exchanges, replayed from their log, lead to state {self.state[:16]}…"
        return f"{found}\n{'the run has the same' if self.same else f'the run has ANOTHER: {self.stored[:16]}…'}"


def replay(path: Path, run: str | None = None) -> Replayed:
    """Replay a run of a folder that `simulate --out` has written, or of a server's store.

    Raises DataError where there is no such run or it is not of zeroth order, RunError where the log is broken.
    """
    file = path / STORE if path.is_dir() else path
    if not file.is_file():  # opening it would make one
        raise DataError(f"{file}: no such file; name a run's folder, or a server's store")
    store = open_store(str(file))
    try:
        return _replayed(store, run or _only(store, path))
    finally:
        store.close()


def _replayed(store: SqlStore, run: str) -> Replayed:
    found = store.find(run)
    if found is None:
        raise DataError(f"run {run!r}: there is none of this name; there are: {_names(store)}")
    spec, description = RunSpec.model_validate_json(found[0]), found[1]
    recipe = recipe_of(spec)
    if not recipe.zeroth:
        raise DataError(f"run {run!r} has no log of exchanges: its recipe, {recipe.name}, sends updates")
    layout = description.layout
    start = layout.cut(description.start, layout.select(recipe.trains))
    last = store.rows(run)[-1]
    rows = takewhile(lambda row: row.number <= last["round"], SqlLog(store.engine).rows(run))
    state = replayed(Replica.begin(terms_of(spec), start), rows)
    return Replayed(run, state.number, state.proof.hex(), str(last.get("state", "")))


def _only(store: SqlStore, path: Path) -> str:
    runs = store.runs()
    if len(runs) != 1:
        raise DataError(f"{path} holds {len(runs)} runs: name one with --run. There are: {_names(store)}")
    return runs[0].name


def _names(store: SqlStore) -> str:
    return ", ".join(state.name for state in store.runs()) or "none"
