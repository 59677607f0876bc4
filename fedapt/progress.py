"""How a run shows itself: a live bar on a terminal, one line a round elsewhere, nothing for machines."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .svg import duration, size


class Watch(Protocol):
    """What a run tells while it goes on."""

    def start(self, name: str, rounds: int, done: int) -> None:
        """A run of so many rounds begins, some of them done already."""

    def portion(self, round_: int, share: float) -> None:
        """A share (0 … 1) of a round's nodes has answered."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A round is committed."""

    def say(self, text: str) -> None:
        """One line for the person who waits."""


class Silent:
    """Tells nothing: for machines, tests and library use."""

    def start(self, name: str, rounds: int, done: int) -> None: ...

    def portion(self, round_: int, share: float) -> None: ...

    def row(self, row: Mapping[str, Any]) -> None: ...

    def say(self, text: str) -> None: ...


class Lines:
    """One plain line a round, where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.name, self.rounds, self.moved = "", 0, 0

    def start(self, name: str, rounds: int, done: int) -> None:
        self.name, self.rounds, self.moved = name, rounds, 0

    def portion(self, round_: int, share: float) -> None: ...

    def row(self, row: Mapping[str, Any]) -> None:
        self.moved += row.get("bytes_down", 0) + row.get("bytes_up", 0)
        self.say(f"{self.name} round {row['round']}/{self.rounds} {summary(row)} moved {size(self.moved)}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Bar:
    """A bar with time left, loss and bytes; the bar moves within a round as nodes answer."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[summary]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.bar: TaskID | None = None
        self.moved = 0

    def start(self, name: str, rounds: int, done: int) -> None:
        self.moved = 0
        self.bar = self.progress.add_task(name, total=rounds, completed=done, summary="")

    def portion(self, round_: int, share: float) -> None:
        if self.bar is not None:
            self.progress.update(self.bar, completed=round(round_ - 1 + share, 2))

    def row(self, row: Mapping[str, Any]) -> None:
        self.moved += row.get("bytes_down", 0) + row.get("bytes_up", 0)
        if self.bar is not None:
            text = f"{summary(row)} · {size(self.moved)}"
            self.progress.update(self.bar, completed=row["round"], summary=text)

    def say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False)


@contextmanager
def watching(console: Console, quiet: bool) -> Iterator[Watch]:
    """The watch that fits: nothing when quiet, a bar on a terminal, else lines."""
    if quiet:
        yield Silent()
    elif not console.is_terminal:
        yield Lines(console)
    else:
        bar = Bar(console)
        with bar.progress:
            yield bar


def summary(row: Mapping[str, Any]) -> str:
    """A round in a few words: training loss, then what the evaluation says."""
    parts = [f"train loss {row['train_loss']:.3f}"] if "train_loss" in row else []
    parts += [f"{name} {value:.4g}" for name, value in row.get("evaluation", {}).items()]
    if "epsilon" in row:
        parts.append(f"ε {row['epsilon']:.3g}" + ("" if row["private"] else " (NOT private)"))
    if "simulated_seconds" in row:
        parts.append(f"clock {duration(row['simulated_seconds'])}")
    return " · ".join(parts)
