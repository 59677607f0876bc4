"""`fedapt client …`: a site joins a federation, trains for it, and looks after its own process."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .printing import emit
from .protocols.errors import FedaptError, SpecError

clients = typer.Typer(no_args_is_help=True, help="Take part in a federation with this site's data.")

Folder = Annotated[Path, typer.Option(help="The site's folder: client.toml, keys, ledger, results.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines, and nothing else.")]
Here = Path()


@clients.command(epilog="Example: fedapt client join token.txt --folder site")
def join(
    token: Annotated[str, typer.Argument(help="The token, a file that holds it, or - to read it from standard input.")],
    folder: Folder = Here,
    proxy: Annotated[str | None, typer.Option(help="An HTTP proxy, as http://host:port.")] = None,
    as_json: Json = False,
) -> None:
    """Enrol this site: makes a key that never leaves it, gets its certificate, writes client.toml."""
    from .protocols.identity import Token, tls13_only

    tls13_only()
    from .client.dialling import ask_to_join
    from .client.enrolment import enrol
    from .client.site import NAME

    invitation = Token.decode(_token(token))
    _makes(folder)
    site = enrol(invitation, folder / "keys", folder / NAME, ask_to_join(invitation, proxy))
    facts = {
        "name": invitation.name,
        "node": site.peer.node,
        "server": invitation.address,
        "authority": invitation.authority_fingerprint,
        "expires": site.peer.expires.isoformat(),
    }
    text = (
        f"Joined {invitation.address} as {invitation.name} (node {site.peer.node}).\n"
        f"The authority's fingerprint, to be compared with the operator: {invitation.authority_fingerprint}\n"
        f"Next: name your data in {folder / NAME}, and read the policy there; then fedapt client start"
    )
    emit(facts, as_json, text)


@clients.command(epilog="Example: fedapt client start --dry-run --spec spec.toml")
def start(
    *,
    folder: Folder = Here,
    once: Annotated[bool, typer.Option(help="Leave when one round is trained and taken.")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Train one step of --spec, show what would leave, send nothing.")
    ] = False,
    spec: Annotated[Path | None, typer.Option(help="The run's spec, for --dry-run.")] = None,
    log_json: Annotated[bool, typer.Option(help="Log one JSON object a line.")] = False,
    as_json: Json = False,
) -> None:
    """Stay connected and train what the server asks, as far as client.toml allows. Ctrl-C keeps what is done.

    Exit code 2: somebody has to look, because another try ends the same way. The certificate has run out (`fedapt client
    status` warns a month before; join again with a new token), the site was shut out, or client.toml is wrong.
    """
    from .protocols.identity import tls13_only

    tls13_only()
    from .client.site import Site
    from .logs import log_to

    log_to(sys.stderr, as_json=log_json)
    site = Site.load(folder)
    if dry_run:
        _rehearse(site, spec, as_json)
        return
    if spec is not None:
        raise SpecError("--spec is for --dry-run: a site that trains gets its specs from the server")
    site.require_data()
    from .client.serving import serve
    from .client.status import alone_in
    from .server.export import save_adapter

    with alone_in(folder):
        serve(site, folder, save_adapter, once=once)


@clients.command(epilog="Example: fedapt client status --json")
def status(folder: Folder = Here, as_json: Json = False) -> None:
    """Connected or not, what it works on, the last rounds, what was spent of its privacy, when the certificate ends."""
    from .standing import standing, standing_text

    facts = standing(folder)
    emit(facts, as_json, standing_text(facts))


@clients.command(epilog="Example: fedapt client pause")
def pause(folder: Folder = Here) -> None:
    """Begin nothing new; what is being trained is finished. The connection stays."""
    from .client.status import pause as set_pause

    set_pause(folder)
    print("paused: nothing new is begun until fedapt client resume")


@clients.command(epilog="Example: fedapt client resume")
def resume(folder: Folder = Here) -> None:
    """Go on after a pause."""
    from .client.status import resume as end_pause

    print("goes on" if end_pause(folder) else "it was not paused")


@clients.command("import", epilog="Example: fedapt client import FacebookAI/roberta-base /models/roberta")
def import_base(
    base: Annotated[str, typer.Argument(help="What specs call the base.")],
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Where it lies on this machine.")],
    folder: Folder = Here,
    as_json: Json = False,
) -> None:
    """Name the folder that holds a base here, and note its hash in client.toml: other content is then refused."""
    from .client.loading import folder_digest
    from .client.site import import_base as note

    sha256 = folder_digest(source)
    note(folder, base, source.absolute(), sha256)
    emit({"base": base, "folder": str(source), "sha256": sha256}, as_json, f"{base} is {source} (SHA-256 {sha256})")


def _rehearse(site: Any, path: Path | None, as_json: bool) -> None:
    from .client.rehearsal import rehearse
    from .protocols.spec import RunSpec

    if path is None:
        raise SpecError("--dry-run needs the run's spec: --spec FILE, which the federation's operator can give you")
    found = rehearse(site, RunSpec.load(path))
    emit(found.as_dict(), as_json, found.text())


def _token(given: str) -> str:
    try:
        is_file = given == "-" or Path(given).is_file()
    except OSError:  # a token is longer than a file's name may be
        is_file = False
    if not is_file and not given.strip().startswith("fedapt"):
        raise SpecError("TOKEN: neither a token, which begins with fedapt, nor a file that is there")
    if not is_file:
        return given
    try:
        return sys.stdin.read() if given == "-" else Path(given).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SpecError(f"{given}: is no text, so it holds no token") from None
    except OSError as error:
        raise SpecError(f"{given}: cannot be read ({error.strerror})") from None


def _makes(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FedaptError(f"{folder}: cannot be made ({error.strerror})") from None
