"""The ClientApp of a site behind Flower's own SuperNode, which is told where the site's `client.toml` lies:

    flower-supernode --node-config 'site="/srv/north"' ...

The spec comes in the run's config. It is checked as the resident checks it, the same policy is obeyed, and the same client
is built. What differs is that stock Flower starts a process for every message: the model is loaded for each, and what a
recipe keeps at a node between rounds would be lost, so a run that needs it is refused. `[server]` of the file is not
dialled, because the SuperNode is connected already.
"""

import logging
from datetime import datetime
from functools import cache, lru_cache
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from ..protocols.errors import DataError, FedaptError, ModelError, OutputError, PrivacyError, RunError, SpecError
from ..protocols.legality import recipe_of
from ..protocols.spec import RunSpec
from .accounts import SiteAccounts
from .app import client_app
from .client import Client
from .loading import Loaded, load
from .resident import ACCOUNTS
from .site import Site
from .status import is_paused

logger = logging.getLogger("flwr")


def client_of(context: Context) -> Client:
    """The site's client of the run's spec, loaded once a process.

    Raises SpecError for a spec that is not for sites, PrivacyError where the site's policy objects (before a model is
    loaded, if it can), RunError where the site rests, and DataError or ModelError, whose words are for the site alone.
    """
    return _ready(context).client


def scoring_of(context: Context) -> Client:
    """The same client over what scores come from. Raises what `client_of` does."""
    return _ready(context).scoring()


def discreet(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A mod for Flower: an exception's words go to the server, and those about data, model or files name rows, values and paths."""
    try:
        return call_next(message, context)
    except FedaptError as error:
        if not isinstance(error, DataError | ModelError | OutputError):
            raise
        logger.error("%s: %s", message.metadata.message_type, error)
        told = type(error).__name__
    except Exception as error:
        logger.exception("%s", message.metadata.message_type)
        told = type(error).__name__
    raise RunError(f"{told} at this site, which its operator finds in its log")


def _ready(context: Context) -> Loaded:
    folder = context.node_config.get("site")
    if not isinstance(folder, str):
        raise SpecError(
            f"site = {folder!r} in the node's config: start the SuperNode with --node-config 'site=\"FOLDER\"', the folder "
            "of its client.toml"
        )
    site = _site(Path(folder))
    if is_paused(Path(folder)) or not site.schedule.allows(datetime.now()):
        raise RunError("this site is paused, or outside its hours: nothing is begun here")
    return _loaded(Path(folder), _spec(context).to_json(), context.node_id)


def _spec(context: Context) -> RunSpec:
    """Raises SpecError where the config has no spec that a site may follow."""
    text = context.run_config.get("spec")
    if not isinstance(text, str) or "\n" not in text:
        raise SpecError(
            f"spec = {text!r} in the run's config: sites read TOML text under [tool.flwr.app.config], and no file that "
            "a server names"
        )
    spec = RunSpec.parse(text)
    if spec.data is not None:
        raise SpecError(f'data.source = "{spec.data.source}": a site names its data itself. Way out: leave out [data]')
    if recipe_of(spec).streams or spec.wire.codec == "top-k":
        raise SpecError(
            f'recipe.name = "{spec.recipe.name}", wire.codec = "{spec.wire.codec}": needs what a node keeps in memory '
            "between rounds, and a SuperNode starts a process for each. Way out: fedapt's own link, or another "
            "recipe and codec"
        )
    return spec


@cache
def _site(folder: Path) -> Site:
    try:
        return Site.load(folder)
    except SpecError as error:  # what is in the file is not the server's affair
        raise DataError(str(error)) from None


@lru_cache(maxsize=1)  # two models at once may not fit
def _loaded(folder: Path, text: str, node: int) -> Loaded:
    site, spec = _site(folder), RunSpec.model_validate_json(text)
    _require_allowed(site.problems(spec))
    if site.train.threads is not None:
        torch.set_num_threads(site.train.threads)
    found = load(site, spec, node, _accounts(folder))
    _require_allowed(found.client.objections)
    if site.base_of(spec.model.base) is not None:
        # Where a base lies here is nobody else's affair, and of no use to whoever reads the adapter's config.
        found.client.adapted.model.active_peft_config.base_model_name_or_path = spec.model.base
    return Loaded(found.client.affording(site.train.most_rank or 0), found.evaluation)


def _require_allowed(objections: list[str]) -> None:
    if objections:
        raise PrivacyError(" ".join(objections))


def _accounts(folder: Path) -> SiteAccounts:
    """The resident's, so that a folder that serves both ways has one cap."""
    try:
        return SiteAccounts(folder / ACCOUNTS)
    except PrivacyError as error:  # where the ledger lies, and what is wrong with it, is not the server's affair
        raise DataError(str(error)) from None


app = client_app(client_of, scoring_of, mods=[discreet])
