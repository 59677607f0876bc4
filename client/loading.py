"""A run's spec and this site's file together: the model on its device, the site's own data, and the client of both."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..protocols.errors import DataError, ModelError, SpecError
from ..protocols.spec import Local, Model, RunSpec
from .accounts import Accounts
from .adapted import AdaptedModel
from .checkpointed import checkpoint_blocks
from .client import Client, Sites
from .halfway import Halfway
from .models import load_model
from .private import require_whole_rows
from .site import NAME, Base, OwnData, Site, Train
from .sources import check_labels, encode_labels, load_table, string_labels
from .table import Table
from .tasks import Examples
from .trainer import Trainer


class SiteClient(Client):
    """A client of one node, whose long rounds are kept `halfway`, and that trains in the memory there is."""

    halfway: Halfway | None = None
    micro_batch: int | None = None

    def on(self, machine: Train, halfway: Halfway | None) -> "SiteClient":
        other = copy.copy(self)
        other.halfway, other.micro_batch = halfway, machine.micro_batch
        return other

    def _trainer(self, local: Local, round_: int) -> Trainer:
        # A round of Streaming DiLoCo is two trainings, and what is kept is halfway through one.
        halfway = None if self.recipe.streams else self.halfway
        return replace(super()._trainer(local, round_), halfway=halfway, micro_batch=self.micro_batch)


@dataclass(frozen=True)
class Loaded:
    """What a spec has become here. `evaluation` are the examples that scores come from: the site's own too."""

    client: Client
    evaluation: Examples

    @property
    def node(self) -> int:
        (node,) = self.client.sites.indices
        return node

    def scoring(self) -> Client:
        """The client over what scores come from."""
        return self.client.at(_alone(self.node, self.evaluation))


def load(site: Site, spec: RunSpec, node: int, accounts: Accounts, halfway: Halfway | None = None) -> Loaded:
    """Load what a spec names. Raises SpecError, ModelError or DataError; nothing of it is for the server to read."""
    own, local = site.require_data(), site.local(spec)
    _require_fitting(site.train, spec)
    base = site.base_of(spec.model.base)
    if base is not None:
        require_folder(base)
    train, evaluation = own_tables(own, spec.model)
    adapted = on_device(load_model(local, site.train.quantize), site.train)
    examples = _encoded(adapted, train, own.source)
    require_whole_rows(local, examples)
    scored = examples if evaluation is None else _encoded(adapted, evaluation, str(own.evaluation))
    client = SiteClient(spec, adapted, _alone(node, examples)).on(site.train, halfway)
    return Loaded(client.obeying(site.policy).keeping(accounts), scored)


def own_tables(own: OwnData, model: Model) -> tuple[Table, Table | None]:
    """Training and evaluation rows, their labels numbered. Raises DataError."""
    data = own.as_data()
    sources = [own.source, *([] if own.evaluation is None else [own.evaluation])]
    tables = [_numbered(load_table(data, source, model.task), own, model, source) for source in sources]
    return tables[0], tables[1] if len(tables) > 1 else None


def on_device(adapted: AdaptedModel, machine: Train) -> AdaptedModel:
    """The model where the site wants it. Raises ModelError where there is no GPU that it asks for."""
    gpu = torch.cuda.is_available()
    if machine.device == "cuda" and not gpu:
        raise ModelError(f'{NAME}: train.device = "cuda", and no GPU is here. Way out: device = "auto"')
    if gpu and machine.device != "cpu" and machine.quantize == "none":
        adapted.model.to("cuda")
    if machine.gradient_checkpointing and not checkpoint_blocks(adapted.model):
        raise ModelError(f"{NAME}: train.gradient_checkpointing = true, and this base has no blocks to run twice")
    return adapted


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and contents of a folder's files; hidden ones are not counted. Raises ModelError."""
    try:
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(folder)))
        if not files:
            raise ModelError(f"{folder}: no folder with a model in it")
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{own}\n".encode())
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def require_folder(base: Base) -> None:
    """Raises ModelError where a folder is not what its hash says."""
    if base.sha256 is not None and (found := folder_digest(base.folder)) != base.sha256:
        raise ModelError(
            f"{base.folder}: has SHA-256 {found}, and {NAME} says {base.sha256}. Way out: put back what was there, or "
            "import it again"
        )


def _numbered(table: Table, own: OwnData, model: Model, source: str) -> Table:
    """The rows with class numbers for labels. Raises DataError."""
    if model.labels is None:
        return table
    found = string_labels(table)
    if own.labels and len(own.labels) != model.labels:
        raise DataError(f"{NAME}: data.labels names {len(own.labels)} classes, and the run has {model.labels}")
    if found and not own.labels:
        raise DataError(
            f"{source}: the labels are words ({_listed(found)}), and only all sites together know their numbers. Way out: "
            f"data.labels = [...] in {NAME}, in the order that the sites have agreed on"
        )
    if found:
        table = encode_labels(table, own.labels, source)
    check_labels(table, model.labels, source)
    return table


def _encoded(adapted: AdaptedModel, table: Table, source: str) -> Examples:
    examples = adapted.task.encode(table)
    if len(examples) == 0:
        raise DataError(f"{source}: nothing is left of it after encoding")
    return examples


def _require_fitting(machine: Train, spec: RunSpec) -> None:
    if machine.micro_batch is not None and spec.adapter.dropout > 0:
        raise SpecError(
            f"adapter.dropout = {spec.adapter.dropout} with this site's train.micro_batch = {machine.micro_batch}: masks "
            "are drawn for whole batches. Way out: dropout = 0, or no micro_batch"
        )


def _alone(node: int, examples: Examples) -> Sites:
    return Sites(examples, {node: np.arange(len(examples), dtype=np.int64)})


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
