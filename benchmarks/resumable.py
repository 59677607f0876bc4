"""The command of a table whose rows take minutes each: what is there is not run again, and work can stop at any time."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
SEEDS = (1, 2, 3)
"""Of the tests; tuning has seed 0."""


class Point(NamedTuple):
    """One run of a table. A row of it starts with these values, under these names."""

    phase: str
    method: str
    rate: float
    seed: int


def done(rows: list[Row]) -> set[Point]:
    return {Point(*(row[name] for name in Point._fields)) for row in rows}


@dataclass(frozen=True)
class Sweep:
    """The runs of a table: each method is tuned over its rates, and tested at the best.

    `tuned_as` names the method whose rate a method takes, and `merit` of a row is largest for the best.
    """

    methods: Iterable[str]
    tuned_as: Callable[[str], str]
    rates_of: Callable[[str], tuple[float, ...]]
    merit: Callable[[Row], Any]

    def todo(self, rows: list[Row]) -> Iterator[Point]:
        """What is still to run, a method at a time: it is tested when its tuning is whole."""
        known = done(rows)
        for method in self.methods:
            tuned = self.tuned_as(method)
            best = self.best_rate(rows, tuned)
            points = [Point("tune", tuned, rate, 0) for rate in self.rates_of(tuned)]
            points += [Point("test", method, best, seed) for seed in SEEDS] if best else []
            yield from (point for point in points if point not in known)

    def best_rate(self, rows: list[Row], method: str) -> float | None:
        """The best of the rates that are to be tried, when all are; rows of other rates may be there from an earlier grid."""
        rates = self.rates_of(method)
        own = [row for row in rows if (row["phase"], row["method"]) == ("tune", method) and row["rate"] in rates]
        return float(max(own, key=self.merit)["rate"]) if len(own) == len(rates) else None

    def tested(self, rows: list[Row], method: str) -> list[Row]:
        """The tests of a method at its rate, or, while that is not known, at the last one that it was tested at."""
        own = [row for row in rows if (row["phase"], row["method"]) == ("test", method)]
        rate = self.best_rate(rows, self.tuned_as(method)) or (own[-1]["rate"] if own else None)
        return [row for row in own if row["rate"] == rate]


def scores(rows: list[Row]) -> str:
    """Rate, mean ± sd of the accuracy in percent, and number of seeds, as cells of a table."""
    accuracy = [100 * row["accuracy"] for row in rows]
    spread = f" ± {statistics.stdev(accuracy):.1f}" if len(rows) > 1 else ""
    return f"{rows[0]['rate']:g} | {statistics.mean(accuracy):.1f}{spread} | {len(rows)}"


def command(
    about: str | None,
    name: str,
    todo: Callable[[list[Row]], Iterator[Point]],
    measure: Callable[[Point, Path, Path], Row],
    table: Callable[[list[Row]], str],
) -> None:
    """Run what `todo` says is missing from results/NAME.jsonl, one point after another, and print `table`.

    `measure(point, model, data)` gives the row of a point. Two processes can share the work: each with its own
    `--only`, and `--rows` of one file, since a row is added in one write and read again before the next point.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of an ordinary Hugging Face encoder")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and the other tables")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run later than this")
    parser.add_argument("--only", action="append", help="a method; may be given more than once")
    parser.add_argument("--rows", type=Path, default=RESULTS / f"{name}.jsonl")
    parser.add_argument("--table", action="store_true", help="print the table of the rows that are there")
    options = parser.parse_args()
    if not options.table and not (options.model and options.data):
        parser.error("--model and --data are needed, or --table")
    began = time.monotonic()
    while not options.table and time.monotonic() - began < 60 * options.minutes:
        wanted = (point for point in todo(_read(options.rows)) if not options.only or point.method in options.only)
        point = next(wanted, None)
        if point is None:
            break
        started = time.perf_counter()
        row = point._asdict() | measure(point, options.model.resolve(), options.data.resolve())
        row["seconds"] = round(time.perf_counter() - started, 1)
        with options.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{' '.join(map(str, point))}: {row['accuracy']:.4f} in {row['seconds']:.0f} s", flush=True)
    print(table(_read(options.rows)))


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
