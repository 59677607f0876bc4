"""A privacy ledger for people: its rows, the ε that follows from them, and whether they are as they were written."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError
from sqlalchemy.orm import Session

from .outputs import STORE
from .presentation import table
from .privacy.accounting import Account
from .privacy.chain import Chain, Entry, Fault, read_chain
from .privacy.events import Event, Everyone, FixedSize, MatrixEvent, Poisson, Relation, Unit, from_json
from .privacy.ledger import Ledger
from .promise import NOT_PRIVATE
from .protocols.errors import DataError, OutputError


@dataclass(frozen=True)
class Statement:
    """What has been spent for one unit under one relation.

    Rows about single nodes protect the data of each alone: `node` is then the one that has spent most, of `nodes`.
    """

    unit: Unit
    relation: Relation
    node: str | None
    nodes: int
    account: Account
    simulated: bool

    def as_dict(self) -> dict[str, Any]:
        """An infinite ε is null: JSON has no word for it."""
        account = asdict(self.account) | {"consistent": self.account.consistent}
        account["epsilon"] = self.account.epsilon if isfinite(self.account.epsilon) else None
        account["crosschecks"] = {name: e if isfinite(e) else None for name, e in self.account.crosschecks.items()}
        fields = {"unit": self.unit, "relation": self.relation, "node": self.node, "nodes": self.nodes}
        return fields | account | {"simulated": self.simulated}

    def text(self) -> str:
        who = "" if self.node is None else f"; of {self.nodes} nodes, {self.node} has spent most"
        checks = ", ".join(f"{name} {epsilon:.4f}" for name, epsilon in self.account.crosschecks.items())
        line = f"ε = {self.account.epsilon:.4f} at δ = {self.account.delta:g}, {self.unit}-level, {self.relation}{who}"
        line += f"\n  method {self.account.method}" + (f"; crosschecks {checks}" if checks else "")
        if not self.account.consistent:
            line += "\n  The crosschecks do NOT agree with the method: do not rely on this ε, and report it."
        if not self.account.private:
            reason = "simulation noise" if self.simulated else "a release without noise"
            line += f"\n  {NOT_PRIVATE} ({reason}): the ε above is no promise."
        return line


@dataclass(frozen=True)
class Shown:
    """A ledger's rows (of one run, or all) and the statements that follow from them. `path`: a file, or a URL to show."""

    path: Path | str
    chain: Chain
    entries: Sequence[Entry]
    statements: Sequence[Statement]

    def as_dict(self) -> dict[str, Any]:
        head = self.chain.head
        return {
            "path": str(self.path),
            "rows": [asdict(entry) | {"event": _fields(entry.event)} for entry in self.entries],
            "spent": [statement.as_dict() for statement in self.statements],
            "head": None if head is None else {"count": head.count, "hash": head.hash},
        }

    def text(self) -> str:
        if not self.entries:
            return f"{self.path}: the ledger has no rows. Nothing was charged, and no privacy is claimed."
        lines = [table(["run", "node", "rounds", "releases", *_TITLES], list(_merged(self.entries)))]
        lines += [statement.text() for statement in self.statements]
        return "\n\n".join([*lines, _ending(self.chain)])


@dataclass(frozen=True)
class Verified:
    """Whether a ledger is as it was written, and what its events spend. `path`: a file, or a URL to show."""

    path: Path | str
    chain: Chain
    fault: Fault | None
    statements: Sequence[Statement]

    @property
    def sound(self) -> bool:
        """No row is wrong, and no two accountants disagree."""
        return self.fault is None and all(statement.account.consistent for statement in self.statements)

    def as_dict(self) -> dict[str, Any]:
        fault = None if self.fault is None else asdict(self.fault)
        statements = [statement.as_dict() for statement in self.statements]
        return {"path": str(self.path), "sound": self.sound, "fault": fault, "spent": statements}

    def text(self) -> str:
        if self.fault is not None:
            return f"{self.path}: BROKEN: {self.fault}."
        lines = [f"{self.path}: each row follows from the one before it, every event is canonical, the head agrees."]
        return "\n\n".join([*lines, *(statement.text() for statement in self.statements), _ending(self.chain)])


def show(path: Path | str, run: str | None, delta: float) -> Shown:
    """What a ledger holds: that of a run's folder, of a file, or of a server's store in PostgreSQL, named by its URL.

    Raises DataError where there is no sound ledger, or not of that run, PrivacyError for δ, OutputError for a URL.
    """
    file, chain = _read(path)
    if (fault := chain.verify()) is not None:
        raise DataError(f"{file}: {fault}. No ε follows from a broken ledger: restore the file from a sound copy")
    runs = sorted({entry.run for entry in chain.entries})
    if run is not None and run not in runs:
        known = f"it has {', '.join(runs)}" if runs else "it has no rows"
        raise DataError(f'{file}: no row of a run "{run}"; {known}')
    entries = [entry for entry in chain.entries if run in (None, entry.run)]
    return Shown(file, chain, entries, statements(entries, delta))


def verify(path: Path | str, delta: float, noted: str | None = None) -> Verified:
    """Recompute the chain and, where it is whole, every ε. Raises DataError for what holds no ledger, OutputError."""
    file, chain = _read(path)
    fault = chain.verify(noted)
    return Verified(file, chain, fault, [] if fault else statements(chain.entries, delta))


def statements(entries: Iterable[Entry], delta: float) -> list[Statement]:
    """One for each unit and relation: ε for one and for another of these do not add up."""
    accounts: dict[tuple[Unit, Relation], dict[str | None, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for entry in entries:
        event = from_json(entry.event)
        accounts[event.unit, event.relation][entry.node][entry.event] += 1
    return [_statement(unit, relation, nodes, delta) for (unit, relation), nodes in accounts.items()]


def _statement(unit: Unit, relation: Relation, nodes: dict[str | None, Counter[str]], delta: float) -> Statement:
    shared = nodes.pop(None, Counter())
    charged = {node: shared + own for node, own in nodes.items()} or {None: shared}
    spent = {content: Ledger(dict(content)).spent(delta).epsilon for content in {_content(c) for c in charged.values()}}
    worst = max(charged, key=lambda node: spent[_content(charged[node])])
    account = Ledger(charged[worst]).spent(delta, ("PRV", "RDP"))
    simulated = any(not from_json(text).secret for one in charged.values() for text in one)
    return Statement(unit, relation, worst, len(nodes), account, simulated)


def _content(charged: Counter[str]) -> frozenset[tuple[str, int]]:
    return frozenset(charged.items())


def _read(path: Path | str) -> tuple[Path | str, Chain]:
    if isinstance(path, str) and re.match(r"postgresql(\+\w+)?://", path):
        return _read_database(path)
    file = Path(path) / STORE if Path(path).is_dir() else Path(path)
    return file, read_chain(file)


def _read_database(where: str) -> tuple[str, Chain]:
    """The chain in a server's database, neither made nor changed by looking, and its URL without what may be secret."""
    try:
        url = make_url(where).set(drivername="postgresql+psycopg")
        engine = create_engine(url, hide_parameters=True)
    except (ArgumentError, ValueError):  # their texts repeat the URL
        raise OutputError(
            "the URL cannot be read; it looks like postgresql+psycopg://user@host:5432/database"
        ) from None
    except ImportError:
        raise OutputError("a ledger in PostgreSQL needs psycopg; pip install 'fedapt[postgres]'") from None
    shown = URL.create("postgresql", url.username, None, url.host, url.port, url.database).render_as_string()
    try:
        with Session(engine) as session:
            return shown, Chain.of(session)
    except DatabaseError as error:
        reason = " ".join(str(error.orig).split())
        for secret in filter(None, (url.password, url.query.get("password"))):
            reason = reason.replace(str(secret), "***")
        raise DataError(f"{shown}: holds no ledger that can be read ({reason})") from None
    finally:
        engine.dispose()


_TITLES = ("unit", "relation", "noise ÷ sensitivity", "drawn", "noise")


def _merged(entries: Iterable[Entry]) -> Iterable[list[str]]:
    """A line for the rows of one run and node whose events are equal in all that is charged."""
    merged: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for entry in entries:
        event = from_json(entry.event)
        count = 1 if isinstance(event, MatrixEvent) else event.count
        merged[entry.run, entry.node or "–", *_cells(event)].append((entry.round, count))
    for (run, node, *cells), rows in merged.items():
        first, last = min(rows)[0], max(rows)[0]
        rounds = str(first) if first == last else f"{first}–{last}"
        yield [run, node, rounds, f"{sum(count for _, count in rows):,}", *cells]


def _cells(event: Event) -> list[str]:
    noise = "secret" if event.secret else f"{NOT_PRIVATE} (simulation noise)"
    return [event.unit, event.relation, f"{event.noise_multiplier:.6g}", _drawn(event), noise]


def _drawn(event: Event) -> str:
    if isinstance(event, MatrixEvent):
        return f"{event.rounds} rounds, each one in {event.participations} at most, {event.separation} apart"
    match event.sampling:
        case Poisson(rate):
            return f"Poisson, rate {rate:g}"
        case FixedSize(size, population):
            return f"{size} of {population}"
        case Everyone():
            return "everyone"


def _fields(event: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(event)
    return fields


def _ending(chain: Chain) -> str:
    """The hash that is worth noting."""
    if chain.head is None or not chain.entries:
        return "The ledger has no rows."
    return (
        f"{chain.head.count} rows, the last on {chain.entries[-1].time[:19]} UTC. Note its hash elsewhere, and verify with "
        f"--noted: nobody can then rewrite the file unseen.\n{chain.head.hash}"
    )
