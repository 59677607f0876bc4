from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DatabaseError

from fedapt.kernels.replica import Replica
from fedapt.privacy.chain import Tables as LedgerTables
from fedapt.protocols.errors import RunError
from fedapt.protocols.exchange import Step, Terms
from fedapt.protocols.scalars import SCALAR_CODES
from fedapt.server.log import ExchangeLog, MemoryLog, Row, SqlLog, genesis, replay, verified

from .crashing_store import EVENT

TERMS = Terms(5, "own", 4, SCALAR_CODES["int8"])
START = np.linspace(-1, 1, 150, dtype=np.float32)
FRESH = Replica.begin(TERMS, START)
GENESIS = genesis("{}", "version", "base")


def step_of(number: int) -> Step:
    codes = np.random.default_rng(number).integers(-127, 128, 4).astype(np.int8).tobytes()
    return Step(number, 1, -12, 5, -6, TERMS.body([(0, b"", codes)]))


def fill(log: ExchangeLog, count: int, run: str = "run") -> None:
    log.open(run, GENESIS)
    for number in range(1, count + 1):
        log.append(run, step_of(number), [EVENT])


class LogSuite(ABC):
    """How every log behaves."""

    @pytest.fixture
    @abstractmethod
    def log(self, tmp_path: Path) -> ExchangeLog | Iterator[ExchangeLog]: ...

    def test_it_begins_with_its_start(self, log: ExchangeLog) -> None:
        assert log.open("run", GENESIS) == Row(0, b"", GENESIS)
        assert log.open("run", GENESIS).number == 0
        with pytest.raises(RunError, match="began from another spec, adapter or base"):
            log.open("run", bytes(32))

    def test_it_gives_back_what_was_logged(self, log: ExchangeLog) -> None:
        fill(log, 300)
        fill(log, 2, "other")
        rows = list(log.rows("run"))
        assert [row.number for row in rows] == list(range(301))
        assert [Step.from_bytes(row.body) for row in rows[1:]] == [step_of(n) for n in range(1, 301)]
        assert list(log.rows("run", after=298)) == rows[299:]
        assert log.open("run", GENESIS) == rows[-1]
        assert len(list(verified(rows))) == 300

    def test_a_step_is_logged_once_and_in_its_turn(self, log: ExchangeLog) -> None:
        fill(log, 2)
        for number in (2, 4):
            with pytest.raises(RunError, match=f"step {number} does not follow row 2"):
                log.append("run", step_of(number))

    def test_a_step_and_its_charge_are_one(self, log: ExchangeLog) -> None:
        fill(log, 3)
        assert log.ledger("run").spent(1e-5).epsilon > 0
        assert log.ledger("other").empty
        before = log.ledger("run").spent(1e-5).epsilon
        with pytest.raises(RunError):
            log.append("run", step_of(9), [EVENT] * 50)
        assert log.ledger("run").spent(1e-5).epsilon == before

    def test_the_last_two_states_are_kept(self, log: ExchangeLog) -> None:
        log.open("run", GENESIS)
        for number in (10, 20, 30, 30):
            log.keep("run", number, str(number).encode())
        assert [log.kept("run", number) for number in (10, 20, 30)] == [None, b"20", b"30"]

    def test_a_replay_is_the_state(self, log: ExchangeLog) -> None:
        fill(log, 30)
        state = FRESH
        for number in range(1, 31):
            state = state.after(step_of(number))
        assert replay(FRESH, log.rows("run")).proof == state.proof


class TestMemoryLog(LogSuite):
    @pytest.fixture
    def log(self, tmp_path: Path) -> ExchangeLog:
        return MemoryLog()


class TestSqlLog(LogSuite):
    @pytest.fixture
    def log(self, tmp_path: Path) -> Iterator[ExchangeLog]:
        engine = create_engine(f"sqlite:///{tmp_path / 'log.sqlite'}")
        LedgerTables.metadata.create_all(engine)
        yield SqlLog(engine)
        engine.dispose()

    def test_a_run_that_is_served_twice_is_logged_once(self, log: SqlLog) -> None:
        other = SqlLog(log.engine)
        for own in (log, other):
            own.open("run", GENESIS)
        log.append("run", step_of(1), [EVENT])
        with pytest.raises(RunError, match="step 1 does not follow row 1: is it served twice"):
            other.append("run", step_of(1), [EVENT] * 50)
        spent = log.ledger("run").spent(1e-5).epsilon
        log.append("run", step_of(2))
        assert len(list(verified(log.rows("run")))) == 2
        assert log.ledger("run").spent(1e-5).epsilon == spent

    def test_it_only_grows(self, log: SqlLog) -> None:
        fill(log, 2)
        for change in ("UPDATE zeroth_log SET number = 9 WHERE number = 2", "DELETE FROM zeroth_log"):
            with pytest.raises(DatabaseError, match="append-only"), log.engine.begin() as connection:
                connection.execute(text(change))


def chain(count: int) -> list[Row]:
    log = MemoryLog()
    fill(log, count)
    return list(log.rows("run"))


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_row_that_was_changed_breaks_the_chain(number: int) -> None:
    rows = chain(5)
    body = rows[number].body
    rows[number] = replace(rows[number], body=body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(RunError, match=f"row {number} of the log is not what was written"):
        replay(FRESH, rows)


def test_a_row_that_is_missing_breaks_the_chain() -> None:
    with pytest.raises(RunError, match="row 3 of the log is not what was written"):
        replay(FRESH, [row for row in chain(5) if row.number != 3])
    with pytest.raises(RunError, match="row 0 is missing"):
        replay(FRESH, chain(5)[1:])


def test_a_proof_of_another_state_is_found() -> None:
    log = MemoryLog()
    log.open("run", GENESIS)
    log.append("run", replace(step_of(1), proof=bytes(32)))
    with pytest.raises(RunError, match="the state after step 1 is not the one"):
        replay(FRESH, log.rows("run"))
