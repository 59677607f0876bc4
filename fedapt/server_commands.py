"""`fedapt server`, `fedapt token` and `fedapt node`: what an operator types. Nothing heavy is imported here."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .printing import columns, emit

Folder = Annotated[Path, typer.Option("--folder", help="The server's folder: its file, certificates, store and runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines, and nothing else.")]
HERE = Path("federation")

servers = typer.Typer(no_args_is_help=True, help="Operate a federation: make its certificates, serve its runs.")
tokens = typer.Typer(no_args_is_help=True, help="One-time tokens with which sites join.")
nodes = typer.Typer(no_args_is_help=True, help="The sites that have joined.")


@servers.command("init", epilog="Example: fedapt server init --name fl.example.org")
def server_init(
    names: Annotated[
        list[str],
        typer.Option("--name", help="A DNS name or IP address that sites dial; repeatable, the first counts."),
    ],
    folder: Folder = HERE,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7443,
    own: Annotated[
        Path | None, typer.Option("--authority", help="A folder with your own ca.pem and ca-key.pem.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a certificate authority, the server's certificate and a commented `server.toml`."""
    from .serving import init

    made = init(folder, names, port, own)
    text = (
        f"{made['settings']} and {folder}/certificates written. Keep the folder secret, and back it up.\n"
        f"Next: fedapt token create --folder {folder} --name SITE; fedapt server start --folder {folder} SPEC"
    )
    emit(made, as_json, text)


@servers.command("start", epilog="Example: fedapt server start spec.toml --folder federation")
def server_start(
    specs: Annotated[list[Path] | None, typer.Argument(metavar="SPEC...", help="Runs to serve, side by side.")] = None,
    *,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a key of all specs; repeatable.")
    ] = None,
    folder: Folder = HERE,
    plaintext: Annotated[
        str | None, typer.Option(metavar="127.0.0.1:PORT", help="Without certificates, on a loopback address alone.")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option(help="Score each evaluated round here, on the spec's [data]; loads the model.")
    ] = False,
    until_done: Annotated[bool, typer.Option(help="Leave when all runs have ended.")] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="One JSON object a line.")] = False,
    as_json: Json = False,
) -> None:
    """Serve runs, and what was running before. Ctrl-C leaves them where they are; the same command goes on."""
    from .serving import Place, serve

    rows = serve(
        Place.at(folder),
        specs or [],
        settings or (),
        plaintext=plaintext,
        evaluate=evaluate,
        until_done=until_done,
        json_lines=log_json,
    )
    emit({"runs": rows}, as_json, _rows(rows, "no runs"))


@servers.command("status", epilog="Example: fedapt server status --folder federation")
def server_status(folder: Folder = HERE, as_json: Json = False) -> None:
    """The runs and the nodes of a federation, as its store has them."""
    from .serving import Place, node_rows, run_rows

    place = Place.at(folder)
    found = {"runs": run_rows(place), "nodes": node_rows(place)}
    emit(found, as_json, f"{_rows(found['runs'], 'no runs')}\n\n{_rows(found['nodes'], 'no nodes')}")


@tokens.command("create", epilog="Example: fedapt token create --name hospital-a --expires 24h")
def token_create(
    name: Annotated[str, typer.Option(help="What the site is called here.")],
    expires: Annotated[str, typer.Option(help="How long it can be used: 30m, 24h, 7d.")] = "24h",
    folder: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Print a token with which one site can join once. Whoever has it can join: hand it over as you would a password."""
    from .serving import Place, create_token, parse_lifetime

    token = create_token(Place.at(folder), name, parse_lifetime(expires))
    document = {"id": token.id, "name": token.name, "expires": token.expires.isoformat(), "token": token.encode()}
    emit(document, as_json, document["token"])


@tokens.command("list", epilog="Example: fedapt token list")
def token_list(folder: Folder = HERE, as_json: Json = False) -> None:
    """All tokens: open, used, expired or revoked."""
    from .serving import Place, token_rows

    rows = token_rows(Place.at(folder))
    emit({"tokens": rows}, as_json, _rows(rows, "no tokens"))


@tokens.command("revoke", epilog="Example: fedapt token revoke 9f86d081884c7d65")
def token_revoke(identity: Annotated[str, typer.Argument(metavar="ID")], folder: Folder = HERE) -> None:
    """Nobody joins with this token any more. A site that has joined stays: see `fedapt node revoke`."""
    from .serving import Place

    with Place.at(folder).registry() as registry:
        registry.revoke_token(identity)
    print(f"token {identity} is revoked")


@nodes.command("list", epilog="Example: fedapt node list")
def node_list(folder: Folder = HERE, as_json: Json = False) -> None:
    """All nodes, with when they were last seen."""
    from .serving import Place, node_rows

    rows = node_rows(Place.at(folder))
    emit({"nodes": rows}, as_json, _rows(rows, "no nodes"))


@nodes.command("revoke", epilog="Example: fedapt node revoke 1311768467463790320")
def node_revoke(
    node: Annotated[int, typer.Argument(metavar="ID", min=0, max=2**64 - 1)], folder: Folder = HERE
) -> None:
    """Shut a node out for good: a stream that it has open is closed within a second."""
    from .serving import Place

    with Place.at(folder).registry() as registry:
        registry.revoke_node(node)
    print(f"node {node} is revoked")


def run_commands(runs: typer.Typer) -> None:
    """Add what concerns the server's runs to the group that compares runs."""

    @runs.command("list", epilog="Example: fedapt runs list --folder federation")
    def runs_list(folder: Folder = HERE, as_json: Json = False) -> None:
        """The runs of a server: how they stand and how far they are."""
        from .serving import Place, run_rows

        rows = run_rows(Place.at(folder))
        emit({"runs": rows}, as_json, _rows(rows, "no runs"))

    @runs.command("show", epilog="Example: fedapt runs show sst2 --folder federation")
    def runs_show(name: str, folder: Folder = HERE, as_json: Json = False) -> None:
        """The rounds of one run."""
        from .serving import Place, round_rows

        rows = round_rows(Place.at(folder), name)
        emit({"rounds": rows}, as_json, "\n".join(str(row) for row in rows))

    @runs.command("stop", epilog="Example: fedapt runs stop sst2 --folder federation")
    def runs_stop(name: str, folder: Folder = HERE) -> None:
        """Stop a run after what it is doing; nothing is lost."""
        from .serving import Place, change_run

        change_run(Place.at(folder), name, "stopping")
        print(f"{name} stops")

    @runs.command("replay", epilog="Example: fedapt runs replay runs/onebyte")
    def runs_replay(
        path: Annotated[Path, typer.Argument(metavar="PATH", help="A run's folder, or a server's store.sqlite.")],
        run: Annotated[str | None, typer.Option("--run", metavar="NAME", help="Where there are several.")] = None,
        as_json: Json = False,
    ) -> None:
        """Rebuild a one-byte run's adapter from its log, and compare hashes. Exit code 1 where they differ."""
        from .replaying import replay

        found = replay(path, run)
        emit(found.as_dict(), as_json, found.text())
        if not found.same:
            raise typer.Exit(1)

    @runs.command("resume", epilog="Example: fedapt runs resume sst2 --folder federation")
    def runs_resume(name: str, folder: Folder = HERE) -> None:
        """Let a run go on that was stopped or has failed, in the server that is running or the next one."""
        from .serving import Place, change_run

        change_run(Place.at(folder), name, "running")
        print(f"{name} goes on")


def _rows(rows: list[dict[str, Any]], none: str) -> str:
    return columns(rows) if rows else none
