"""The command line. Each command is a few lines around a function that does the work; nothing heavy is imported here."""

import gc
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

# Before anything imports these libraries: no telemetry, no update checks, no bars and no lines of their own.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import click
import typer

from .client_commands import clients
from .protocols.errors import FedaptError, OutputError
from .server_commands import nodes, run_commands, servers, tokens

INTERRUPTED, USAGE = 130, 2

app = typer.Typer(
    name="fedapt",
    help="Federated fine-tuning of adapters: one frozen base, data that stays where it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
adapters = typer.Typer(
    no_args_is_help=True, help="Look at an adapter folder, merge several, or merge one into its base."
)
app.add_typer(adapters, name="adapter")
runs = typer.Typer(no_args_is_help=True, help="Look at runs that have been made.")
run_commands(runs)
app.add_typer(runs, name="runs")
app.add_typer(servers, name="server")
app.add_typer(tokens, name="token")
app.add_typer(nodes, name="node")
app.add_typer(clients, name="client")
ledgers = typer.Typer(no_args_is_help=True, help="What a run's releases, or a site's, have spent of its privacy.")
app.add_typer(ledgers, name="ledger")

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The run's spec (TOML); `fedapt init` writes one.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a key; repeatable.")]
LedgerPath = Annotated[
    str,
    typer.Argument(
        metavar="PATH", help="A run's folder, a site's ledger file, or the URL of a server's PostgreSQL store."
    ),
]
Delta = Annotated[float, typer.Option(help="At which ε is stated; below 1 / the number of those who are protected.")]
Engine = Literal["local", "ray"]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines, and nothing else.")]


def main() -> None:
    """Run the command line: exit codes 0 (done), 1 (a check failed), 2 (wrong use or input), 130 (interrupted)."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        sys.exit(app(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except FedaptError as error:
        print(f"fedapt: {error}", file=sys.stderr)
        sys.exit(USAGE)
    except (click.Abort, KeyboardInterrupt):
        print("fedapt: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def version(asked: bool) -> None:
    if asked:
        from . import __version__

        print(f"fedapt {__version__}")
        raise typer.Exit


@app.callback()
def common(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of all commands."""


@app.command(epilog="Example: fedapt demo --out demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and the adapters.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """The whole thing on this machine, offline, in about a minute: adapt a small language model to Python's code."""
    from .demo import run_demo

    with _watching(as_json) as watch:
        summary = run_demo(out, watch)
    _emit(summary, as_json, summary["text"])
    _leave_if_interrupted(bool(summary["complete"]))


@app.command(epilog="Example: fedapt init --recipe fedsvd spec.toml")
def init(
    path: Annotated[Path, typer.Argument(metavar="SPEC", help="The file to write.")] = Path("spec.toml"),
    recipe: Annotated[str, typer.Option(help="One of `fedapt recipes`.")] = "fedsvd",
) -> None:
    """Write a commented spec that runs as it is."""
    from .outputs import write_text
    from .starter import starter_spec

    text = starter_spec(recipe)
    if path.exists():
        raise OutputError(f"{path}: exists already; name another file, or delete it first.")
    write_text(path, text)
    print(f"{path} written. Next: fedapt plan {path}; fedapt simulate {path} --out runs/first")


@app.command(epilog="Example: fedapt plan spec.toml --set run.rounds=100")
def plan(spec: SpecPath, settings: Settings = None, as_json: Json = False) -> None:
    """What a run will cost before it runs: bytes, parameters, memory."""
    from .planning import plan as make_plan
    from .presentation import plan_text
    from .protocols.spec import RunSpec

    figures = make_plan(RunSpec.load(spec, settings or ()))
    _emit(figures.as_dict(), as_json, plan_text(figures))


@app.command(epilog="Example: fedapt simulate spec.toml --out runs/first --set local.learning_rate=1e-3")
def simulate(
    spec: SpecPath,
    settings: Settings = None,
    *,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report, metrics and adapter; a run there goes on.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that train clients; 0: one a core.")] = 1,
    engine: Annotated[Engine, typer.Option(help="Where workers are: here, or on a Ray cluster.")] = "local",
    baselines: Annotated[bool, typer.Option(help="Also train centrally and alone, for comparison.")] = False,
    as_json: Json = False,
) -> None:
    """Run a federation of virtual clients on this machine. Ctrl-C saves what is done; the same command goes on."""
    if engine == "local" and workers != 1:
        from .sim.forking import prepare

        prepare()
    with _importing():
        from .presentation import result_json, result_text
        from .protocols.spec import RunSpec
        from .simulation import run

    checked = RunSpec.load(spec, settings or ())
    folder = out or Path("runs") / checked.run.name
    with _watching(as_json) as watch:
        result = run(checked, folder, watch, workers=workers, engine=engine)
        if baselines and result.outcome.complete:
            from .baselines import centralized, local_only

            result.curves.append(centralized(checked, result.federation, watch))
            result.curves.append(local_only(checked, result.federation, watch))
            result.report(folder / "report.html")
    _emit(result_json(result, folder), as_json, result_text(result, folder))
    _leave_if_interrupted(result.outcome.complete)


@app.command(epilog="Example: fedapt sweep spec.toml --grid local.learning_rate=1e-3,2e-3 --grid adapter.rank=4,8")
def sweep(
    spec: SpecPath,
    axes: Annotated[list[str], typer.Option("--grid", metavar="A.B=C,D", help="Values to try; repeatable.")],
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the points; those finished there are not repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a small grid, one folder a point, and print one table. Stopped, it goes on where it was."""
    from .presentation import sweep_table
    from .protocols.spec import RunSpec
    from .sweeping import grid
    from .sweeping import sweep as run_sweep

    checked = RunSpec.load(spec, settings or ())
    folder = out or Path("runs") / f"{checked.run.name}-sweep"
    points = grid(checked, axes)
    with _watching(as_json) as watch:
        done = list(run_sweep(points, folder, watch))
    rows = [
        {"overrides": list(point.overrides), "folder": str(folder / point.folder), **(row or {})} for point, row in done
    ]
    _emit({"points": rows}, as_json, sweep_table(rows))


@app.command(epilog="Example: fedapt audit spec.toml --set privacy.noise_multiplier=1.0")
def audit(
    spec: SpecPath,
    settings: Settings = None,
    trials: Annotated[int, typer.Option(min=1000, help="Canaries to guess: more see a smaller fault.")] = 200_000,
    membership: Annotated[int, typer.Option(min=0, help="Also attack the adapters of so many shadow runs.")] = 0,
    as_json: Json = False,
) -> None:
    """Attack a spec's private mechanism through the code that a run uses. Exit code 1 if its claim is refuted."""
    from .auditing import audit as make_audit
    from .protocols.spec import RunSpec

    found = make_audit(RunSpec.load(spec, settings or ()), trials, membership)
    _emit(found.as_dict(), as_json, found.text())
    if not found.sound:
        raise typer.Exit(1)


@app.command(epilog="Example: fedapt recipes fedsvd")
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this one alone.")] = None, as_json: Json = False
) -> None:
    """What each recipe does, cites, needs and sends; and the adapter methods, with what each is linear in."""
    from .presentation import method_rows, method_text, recipe_rows, recipe_text

    rows = recipe_rows(name)
    if name is not None:
        _emit({"recipes": rows}, as_json, recipe_text(rows))
        return
    methods = method_rows()
    _emit({"recipes": rows, "methods": methods}, as_json, f"{recipe_text(rows)}\n\n{method_text(methods)}")


@app.command(epilog="Example: fedapt doctor")
def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, processor, GPU, memory, disk. Exit code 1 if something would fail."""
    from .doctor import checks, checks_text

    found = checks()
    _emit({"checks": [check.as_dict() for check in found]}, as_json, checks_text(found))
    if any(check.status == "fails" for check in found):
        raise typer.Exit(1)


@adapters.command("show", epilog="Example: fedapt adapter show runs/first/adapter")
def adapter_show(
    folder: Annotated[Path, typer.Argument(help="A folder in peft's format.")], as_json: Json = False
) -> None:
    """Tensors, sizes, ranks and norms of an adapter."""
    from .adapters import describe_adapter, describe_text

    facts = describe_adapter(folder)
    _emit(facts, as_json, describe_text(facts))


@adapters.command(
    "merge", epilog="Example: fedapt adapter merge runs/a/adapter runs/b/adapter --out both --weights 1,2 --rank 16"
)
def adapter_merge(
    folders: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="LoRA folders in peft's format.")],
    *,
    out: Annotated[Path, typer.Option(help="The folder to write: an adapter of the same base.")],
    method: Annotated[str, typer.Option(help="mean, soup, ties, breadcrumbs, pcb, greedy-soup or fisher.")] = "mean",
    weights: Annotated[str | None, typer.Option(metavar="W,W", help="One for each adapter; equal if left out.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the result; the inputs' largest if left out.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that ties, breadcrumbs, pcb keep.")] = None,
    scale: Annotated[float, typer.Option(help="Factor on the change; breadcrumbs adds adapters up, so try 1/K.")] = 1.0,
    data: Annotated[Path | None, typer.Option(help="Held-out rows, which greedy-soup and fisher look at.")] = None,
    as_json: Json = False,
) -> None:
    """Merge LoRA adapters of one base into one: their products B·A, not their factors. Reports what the rank loses."""
    from .merging import merge_adapters, merged_text, parse_weights

    numbers = parse_weights(weights)
    facts = merge_adapters(folders, out, method, weights=numbers, rank=rank, density=density, scale=scale, data=data)
    _emit(facts, as_json, merged_text(facts))


@adapters.command("export", epilog="Example: fedapt adapter export runs/first/adapter merged")
def adapter_export(
    folder: Annotated[Path, typer.Argument(help="A folder in peft's format.")],
    target: Annotated[Path, typer.Argument(help="The folder to write: an ordinary Hugging Face model.")],
    base: Annotated[str | None, typer.Option(help="The base, if it has moved since the run.")] = None,
) -> None:
    """Merge an adapter into its base and save the whole model."""
    from .adapters import merge_into_base

    merge_into_base(folder, target, base)
    print(f"{target} written: load it with transformers' from_pretrained; no peft is needed.")


@runs.command("compare", epilog="Example: fedapt runs compare runs/fedsvd runs/fedit --out comparison.html")
def runs_compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that simulate --out has written.")],
    out: Annotated[Path, typer.Option(help="The page to write: table and plot, self-contained.")] = Path(
        "comparison.html"
    ),
    as_json: Json = False,
) -> None:
    """Runs of one task side by side: what each reached, its bytes and its aggregation error, and a plot of the two."""
    from .comparing import compare
    from .outputs import write_text

    found = compare(folders)
    write_text(out, found.html())
    _emit(found.as_dict() | {"page": str(out)}, as_json, f"{found.text()}\n{out} written.")


@ledgers.command("show", epilog="Example: fedapt ledger show runs/first --delta 1e-6")
def ledger_show(
    path: LedgerPath,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Only the rows of this run.")] = None,
    delta: Delta = 1e-5,
    as_json: Json = False,
) -> None:
    """The rows of a ledger, equal ones as one, and the ε that follows from them, crosschecked by other accountants."""
    from .ledgers import show

    shown = show(path, run, delta)
    _emit(shown.as_dict(), as_json, shown.text())


@ledgers.command("verify", epilog="Example: fedapt ledger verify runs/first")
def ledger_verify(
    path: LedgerPath,
    noted: Annotated[str | None, typer.Option(metavar="HASH", help="A hash that the ledger had, noted before.")] = None,
    delta: Delta = 1e-5,
    as_json: Json = False,
) -> None:
    """Recompute a ledger's chain of hashes and its ε. Exit code 1, and the first bad row, if it is not as written."""
    from .ledgers import verify

    verified = verify(path, delta, noted)
    _emit(verified.as_dict(), as_json, verified.text())
    if not verified.sound:
        raise typer.Exit(1)


@contextmanager
def _importing() -> Iterator[None]:
    """Without looking for garbage: imports make a million objects and no garbage, and to look takes a sixth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _watching(as_json: bool) -> Any:
    from rich.console import Console

    from .progress import watching

    return watching(Console(stderr=True), quiet=as_json)


def _emit(document: Mapping[str, Any], as_json: bool, text: str) -> None:
    """The result on standard output: JSON for machines, text for people."""
    if as_json:
        print(json.dumps({key: value for key, value in document.items() if key != "text"}, indent=2))
    else:
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(text, markup=False)


def _leave_if_interrupted(complete: bool) -> None:
    if not complete:
        raise typer.Exit(INTERRUPTED)


if __name__ == "__main__":
    main()
