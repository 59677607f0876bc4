"""The site's own file, `client.toml`: where the server is, what is trained on and with what, when, and what is allowed.

The server names a base and columns never: a spec arrives without `[data]`, and names of folders in it mean nothing here
but through `[model]`.
"""

import re
import tomllib
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import AfterValidator, Field, model_validator

from ..protocols.errors import DataError, OutputError, SpecError
from ..protocols.identity import TrustError, checked_address
from ..protocols.link import MOST_RANK
from ..protocols.spec import Data, Positive, RunSpec, Section
from .policy import Policy

NAME = "client.toml"

LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\]):\d+")


def _address(text: str) -> str:
    try:
        return checked_address(text)
    except TrustError as error:
        raise ValueError(str(error)) from None


def _hours(text: str) -> str:
    try:
        begin, end = (time.fromisoformat(part.strip()) for part in text.split("-"))
    except ValueError:
        raise ValueError(f'{text!r}: write it as "20:00-06:00"') from None
    if begin == end or begin.tzinfo or end.tzinfo:
        raise ValueError(f"{text!r}: begins when it ends; leave [schedule] out to train at all hours")
    return text


class Server(Section):
    """`address` is host:port; `keys` the folder that `fedapt client join` filled. `proxy` is an HTTP proxy's URL, where
    the environment's (https_proxy) is not meant. `plaintext` names this site to a server on the same machine, without
    keys: for trials."""

    address: Annotated[str, AfterValidator(_address)]
    keys: Path = Path("keys")
    proxy: Annotated[str, Field(pattern=r"^http://")] | None = None
    plaintext: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _plaintext_on_loopback(self) -> Self:
        if self.plaintext is not None and not LOOPBACK.fullmatch(self.address):
            raise ValueError(
                f'plaintext = "{self.plaintext}" is for a server on this machine, and {self.address} is none: join it '
                "with a token"
            )
        return self


class OwnData(Section):
    """What is trained on: as `[data]` of a spec, without a partition. `evaluation` is where scores come from; without it
    they come from `source`.

    `labels` are the names of the classes, in the order on which all sites have agreed: a site that numbered its own
    names would number them differently from a site that lacks one of them.
    """

    source: str
    evaluation: str | None = None
    labels: tuple[str, ...] = ()
    limit: Positive | None = None
    text: str = "text"
    label: str = "label"
    prompt: str | None = None
    response: str | None = None
    image: str = "image"

    def as_data(self) -> Data:
        return Data.check(self.model_dump(exclude={"labels"}), where=NAME)


class Base(Section):
    """A base in a folder here. `sha256` is `folder_digest` of it, noted by whoever put it there."""

    folder: Path
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None


class OwnModel(Section):
    """`bases` has, for what specs call a base (or an adapter to start from), the folder where it lies here.

    Builtin bases need no entry, and neither do those that `[policy] hub` allows to download. A name that is a path needs
    one: a server has no say in which of this machine's files are read.
    """

    bases: dict[str, Base] = Field(default_factory=dict)


class Train(Section):
    """How this machine trains. `auto` takes a GPU where there is one.

    `precision` and `quantize` are of the frozen base, in place of the spec's precision; the adapter is fp32 always.
    `micro_batch` is how many examples run at once: a step still learns from its whole batch. `checkpoint_seconds` is how
    much of a round is lost at most when this machine goes down.

    `most_rank` is the largest rank of an adapter that this machine can afford, to train and to send. The server is told it,
    and sends the best part of the adapter that fits; a run that has none is not trained here.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] | None = None
    quantize: Literal["none", "nf4", "int8"] = "none"
    threads: Positive | None = None
    most_rank: Annotated[Positive, Field(le=MOST_RANK)] | None = None
    micro_batch: Positive | None = None
    gradient_checkpointing: bool = False
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0


class Schedule(Section):
    """`hours` in which work is begun, in this machine's time; what has begun is finished."""

    hours: Annotated[str, AfterValidator(_hours)] | None = None

    def allows(self, now: datetime) -> bool:
        """The end of the hours is not part of them; hours may go over midnight."""
        if self.hours is None:
            return True
        begin, end = (time.fromisoformat(part.strip()) for part in self.hours.split("-"))
        clock = now.time()
        return begin <= clock < end if begin < end else clock >= begin or clock < end


class Site(Section):
    """The whole file. Relative paths in it are taken from its own folder."""

    server: Server
    data: OwnData | None = None
    model: OwnModel = OwnModel()
    train: Train = Train()
    schedule: Schedule = Schedule()
    policy: Policy

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The site in `folder`. Raises SpecError naming file, key, value and way out."""
        path = folder / NAME
        if folder.is_dir() and not path.exists():
            raise SpecError(
                f"{path}: no such file; `fedapt client join TOKEN` writes it, and --folder says where it is"
            )
        policy = Policy.load(path)  # it says what is wrong with the file as a whole
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        return cls.check({**raw, "policy": policy}, where=str(path))._resolved(folder.absolute())

    def require_data(self) -> OwnData:
        """Raises DataError where the file does not say yet what to train on."""
        if self.data is None:
            raise DataError(f'{NAME}: [data] is missing: name what is trained on, for example source = "train.jsonl"')
        return self.data

    def problems(self, spec: RunSpec) -> list[str]:
        """Why this site takes no part in the run, as far as that is known before anything is loaded or downloaded."""
        base, public = spec.model.base, spec.adapter.public
        problems = self.policy.problems(spec, None)
        if _is_of_hub(base) and self.base_of(base) is None:
            problems += self.policy.of_download("model.base", base)
        if public is not None and _is_of_hub(public) and public not in (self.policy.public or ()):
            problems += self.policy.of_download("adapter.public", public)
        return problems

    def local(self, spec: RunSpec) -> RunSpec:
        """The spec as this site runs it: its bases, its precision. Raises SpecError for a name that has no place here."""
        base, start = self._place("model.base", spec.model.base), spec.adapter.start
        precision = self.train.precision or spec.model.precision
        model = spec.model.model_copy(update={"base": base, "precision": precision})
        adapter = spec.adapter
        if start is not None:
            adapter = adapter.model_copy(update={"start": self._place("adapter.start", start)})
        public = spec.adapter.public
        if public is not None and _is_path(public) and public not in (self.policy.public or ()):
            raise SpecError(
                f'adapter.public = "{public}" would be a file of this machine. Way out: [policy] public = ["{public}"] '
                f"in {NAME}, if anybody may see it"
            )
        return spec.model_copy(update={"model": model, "adapter": adapter, "data": None})

    def base_of(self, name: str) -> Base | None:
        return self.model.bases.get(name)

    def _place(self, key: str, name: str) -> str:
        known = self.base_of(name)
        if known is not None:
            return str(known.folder)
        if key == "adapter.start" or _is_path(name):
            raise SpecError(
                f'{key} = "{name}" is a folder of another machine. Way out: `fedapt client import` names the one that '
                "holds it here"
            )
        return name

    def _resolved(self, folder: Path) -> Self:
        def at(path: Path) -> Path:
            return folder / path.expanduser()

        def source(name: str | None) -> str | None:
            found = name is not None and not name.startswith("builtin:") and at(Path(name)).exists()
            return str(at(Path(str(name)))) if found else name

        server = self.server.model_copy(update={"keys": at(self.server.keys)})
        bases = {name: base.model_copy(update={"folder": at(base.folder)}) for name, base in self.model.bases.items()}
        paths = {"source", "evaluation"}
        data = self.data and self.data.model_copy(update={key: source(getattr(self.data, key)) for key in paths})
        update: dict[str, Any] = {"server": server, "data": data, "model": OwnModel(bases=bases)}
        return self.model_copy(update=update)


def _is_of_hub(name: str) -> bool:
    """Whether a name in a spec would be looked for in the hub."""
    return not name.startswith("builtin:") and not _is_path(name)


def _is_path(name: str) -> bool:
    """Whether a name in a spec can only be, or happens to be, a file or folder of this machine."""
    builtin = name.startswith("builtin:")
    hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:\w+)?", name) and not name.startswith(".")
    return not builtin and (not hub or Path(name).exists())


def import_base(folder: Path, name: str, source: Path, sha256: str) -> None:
    """Add a base to the file in `folder`. Raises SpecError where it has one of this name, OutputError."""
    path = folder / NAME
    site = Site.load(folder)
    if site.base_of(name) is not None:
        raise SpecError(f'{path}: names a folder for "{name}" already; change it, or remove it, there')
    table = tomli_w.dumps({"model": {"bases": {name: {"folder": str(source), "sha256": sha256}}}})
    own = table.replace("[model.bases]\n", "").replace("[model]\n", "").strip()
    try:
        tomllib.loads(f"{path.read_text(encoding='utf-8')}\n{own}\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{own}\n")
    except tomllib.TOMLDecodeError:
        raise SpecError(f"{path}: write this table into it yourself:\n{own}") from None
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
