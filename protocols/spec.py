"""The run's spec: one TOML file, checked whole before anything runs (DESIGN §5)."""

import difflib
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from .errors import SpecError

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# The discriminator makes a mistake fail once: a plain union complains once for each of its members.
Targets = Annotated[
    Annotated[Literal["all-linear"], Tag("[word]")] | Annotated[tuple[str, ...], Tag("[list]")],
    Discriminator(lambda value: "[word]" if isinstance(value, str) else "[list]"),
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def check(cls, raw: dict[str, Any], *, where: str = "spec") -> Self:
        """Check what is given as nested dictionaries. Raises SpecError with one line for each mistake."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            lines = [_explain(cls, problem) for problem in error.errors(include_url=False)]
            raise SpecError("\n".join(f"{where}: {line}" for line in lines)) from None


class Run(Section):
    """One federated training. `patience` counts evaluations without progress before the run stops (0: never)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    rounds: Positive = 10
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    evaluate_every: Positive = 1
    patience: Annotated[int, Field(ge=0)] = 0

    def is_evaluated(self, round_: int) -> bool:
        """Whether the adapter is looked at after a round, counted from 1."""
        return round_ % self.evaluate_every == 0 or round_ == self.rounds


class Model(Section):
    """The frozen base: a Hugging Face id, a local folder, or `builtin:byte-llama`.

    With prompted-classification a language model is asked for the label: `template` is the prompt, with `{text}` where the
    text goes, and `verbalizers` has a word for each label, in their order, which follows the prompt behind a space (or
    at once, where the template ends with one).
    """

    base: str
    task: Literal["sequence-classification", "causal-lm", "prompted-classification", "image-classification"]
    template: str | None = None
    verbalizers: tuple[str, ...] = ()
    labels: Annotated[int, Field(ge=2)] | None = None
    max_length: Annotated[int, Field(ge=2)] = 128
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _labels_fit_task(self) -> Self:
        if self.task != "causal-lm" and self.labels is None:
            raise ValueError(f"labels is missing: {self.task} needs the number of classes")
        return self

    @model_validator(mode="after")
    def _prompt_fits_task(self) -> Self:
        if self.task != "prompted-classification":
            if self.template is not None or self.verbalizers:
                raise ValueError('template and verbalizers are of task = "prompted-classification": remove them')
            return self
        if self.template is None or self.template.count("{text}") != 1:
            raise ValueError(
                f"template = {self.template!r} has to hold {{text}} once, where the text goes. "
                'Nearest legal: "{text} It was"'
            )
        if len(self.verbalizers) != self.labels or len(set(self.verbalizers)) != self.labels:
            raise ValueError(
                f"verbalizers = {list(self.verbalizers)} does not have {self.labels} different words, one for each of "
                f"labels = {self.labels}, in the order of the labels"
            )
        return self


class Adapter(Section):
    """The trainable part. `targets` are the names of the modules that are adapted; `start` warm-starts from a folder.

    `rank` and `alpha` are of lora, dora, adalora and nola (vera has the rank alone), `bases` of nola: how many random
    matrices each factor is the sum of, and how many numbers of it travel. `virtual_tokens` are of prompt and prefix.
    `ranks`, where given, are what sites can afford: each node has one of them, by key, and `rank` is the largest.
    `bottleneck` is the inner width of bottleneck. bias, head and full have no targets. A classifier is trained
    beside every method. `layers` are the numbers of the transformer blocks that are adapted, from 0 and ascending
    (empty: all, and what lies outside of them). `public` is data that everybody may see: a file, a hub dataset or a
    builtin, read as `data.source` is. With `recipe.initial_a = "eva"` A starts from it, and from no other data.
    """

    method: Literal[
        "lora", "dora", "adalora", "vera", "nola", "ia3", "prompt", "prefix", "bottleneck", "bias", "head", "full"
    ] = "lora"
    rank: Positive = 8
    ranks: tuple[Positive, ...] = ()
    alpha: PositiveFloat = 16.0
    targets: Targets = "all-linear"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bases: Positive = 64
    virtual_tokens: Positive = 16
    bottleneck: Positive = 16
    public: str | None = None
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    start: str | None = None

    @model_validator(mode="after")
    def _rank_is_the_largest(self) -> Self:
        if self.ranks and max(self.ranks) != self.rank:
            raise ValueError(
                f"rank = {self.rank} is not the largest of ranks = {list(self.ranks)}: set rank = {max(self.ranks)}"
            )
        return self

    @model_validator(mode="after")
    def _dropout_of_lora(self) -> Self:
        if self.dropout > 0 and self.method != "lora":
            raise ValueError(
                f'dropout = {self.dropout} is illegal with method = "{self.method}": keyed masks are drawn for the '
                "inputs of plain LoRA alone. Nearest legal: dropout = 0"
            )
        return self

    @model_validator(mode="after")
    def _layers_of_blocks(self) -> Self:
        ascending = sorted(set(self.layers))
        if list(self.layers) != ascending:
            raise ValueError(f"layers = {list(self.layers)} is not ascending. Nearest legal: layers = {ascending}")
        if self.layers and self.method in ("prompt", "prefix", "head", "full"):
            raise ValueError(
                f'layers = {ascending} is illegal with method = "{self.method}", which adapts no single blocks. '
                "Nearest legal: layers = []"
            )
        return self


class Recipe(Section):
    """How updates become the next adapter; `fedapt recipes` lists the names.

    `period` counts the rounds between two refactorizations (fedsvd) or two fresh starts (refresh). `budget` is the
    rank that may be kept beside the adapter: in the frozen part (fedex, refresh) or at the server (flora).
    `initial_a` is how A starts: drawn by key (kaiming, orthonormal), or with `eva` the directions in which the inputs
    of each layer are largest on `adapter.public`, which are orthonormal too (by default, the recipe's own way).
    `fragments`, `mixing` and `delay` are of diloco: a round synchronizes one fragment in turn, and a node takes it
    `delay` steps into the next round as `mixing` of its own tensors and 1 − `mixing` of the federation's.
    `aggregator` is how updates become one; `byzantine` is the share of the nodes that may send anything (krum,
    multi-krum, trimmed-mean). `mean` with `weighting = "uniform"` is the uniform soup. `greedy-soup` takes nodes in,
    best first and all with one weight, as long as that lowers no score on the run's evaluation data: it asks for
    2·nodes + 1 evaluations a round, and since it chooses by that score, the score is no longer one of unseen data.
    With `fisher` nodes also send how sure they are of each value (their diagonal Fisher information, 2 bytes a value),
    and weigh by it: a node that lies about it has any weight it wants.
    """

    name: str = "fedsvd"
    period: Positive | None = None
    budget: Positive | None = None
    fragments: Positive = 1
    mixing: Annotated[float, Field(ge=0, le=1)] = 0.0
    delay: Annotated[int, Field(ge=0)] = 0
    weighting: Literal["examples", "uniform"] = "examples"
    aggregator: Literal[
        "mean",
        "krum",
        "multi-krum",
        "geometric-median",
        "clip",
        "median",
        "trimmed-mean",
        "ties",
        "breadcrumbs",
        "pcb",
        "fisher",
        "greedy-soup",
    ] = "mean"
    byzantine: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    initial_a: Literal["kaiming", "orthonormal", "eva"] | None = None
    optimizer: Literal["sgd", "nesterov", "novograd", "adam"] = "sgd"
    learning_rate: PositiveFloat = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class Local(Section):
    """The trainer at a node: `steps` batches whatever its data, or `epochs` passes over them (0.1 is a tenth of one).

    `schedule` moves the learning rate from round to round: `cosine` lets it fall to zero after the last. Where nodes send
    codes, `weight_decay` is applied by all of them together, for up to 64 exchanges at once.
    """

    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: NonNegative = 0.0
    batch_size: Positive = 16
    steps: Positive | None = None
    epochs: PositiveFloat | None = None

    def in_round(self, round_: int, rounds: int) -> "Local":
        """These settings with the learning rate of a round, counted from 1."""
        if self.schedule == "constant":
            return self
        share = (1 + math.cos(math.pi * (round_ - 1) / rounds)) / 2
        return self.model_copy(update={"learning_rate": self.learning_rate * share})

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both set: keep one of them")
        return self


class Participation(Section):
    """Who trains in a round: everybody, a fixed share without replacement, or each node with probability `rate`.

    A round needs `minimum` answers. Of a fixed share, `spare` is drawn on top (0.25: a quarter more), and the slowest
    are not waited for. With `evaluates`, nodes score the adapter of each evaluated round on their own data.
    """

    sampling: Literal["all", "fixed", "poisson"] = "all"
    rate: Fraction = 1.0
    minimum: Annotated[int, Field(ge=0)] = 1
    deadline_seconds: PositiveFloat = 600.0
    spare: NonNegative = 0.0
    evaluates: bool = False

    @model_validator(mode="after")
    def _spares_are_of_a_share(self) -> Self:
        if self.spare and self.sampling != "fixed":
            raise ValueError(
                f'spare = {self.spare:g} is illegal with sampling = "{self.sampling}": answers of a fixed share alone '
                'can be enough. Nearest legal: sampling = "fixed", or spare = 0'
            )
        return self


class Fleet(Section):
    """Simulation only: the devices that nodes are, and with them a clock: what a deployment on them would have taken.

    A node computes `examples_per_second` in training, and its link carries `downlink_mbps` and `uplink_mbps` (10⁶ bits
    a second): medians, each times a log-normal factor by the node's key. The spreads are the standard deviations of the
    factors' natural logarithms, and one factor is of both directions of a link. What has no median takes no time.
    `latency_seconds` is waited once down and once up. `dropout` is the chance that a node never answers, in each round
    anew. `available` is the share of each day that a node is there, from a moment of its own on; or `trace` says it: a
    .jsonl file of `node`, `from` and `until`, in seconds of the simulated clock. A node that leaves before it has
    answered is lost, and one that comes after `participation.deadline_seconds` too.
    """

    examples_per_second: PositiveFloat | None = None
    speed_spread: Annotated[float, Field(ge=0, le=5)] = 0.0
    downlink_mbps: PositiveFloat | None = None
    uplink_mbps: PositiveFloat | None = None
    link_spread: Annotated[float, Field(ge=0, le=5)] = 0.0
    latency_seconds: NonNegative = 0.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    available: Fraction = 1.0
    trace: str | None = None

    @property
    def comes_and_goes(self) -> bool:
        """Whether nodes are there at some times only."""
        return self.trace is not None or self.available < 1

    @model_validator(mode="after")
    def _one_availability(self) -> Self:
        if self.trace is not None and self.available < 1:
            raise ValueError(f"available = {self.available:g} and trace are both set: keep one of them")
        return self


class Privacy(Section):
    """Whose presence is hidden: nobody's, one example's (noise at the node) or one client's (noise at the server).

    `epsilon` is a cap at `delta`: noise is solved for, and the run stops before the cap is passed. `noise_multiplier`
    states the noise instead (standard deviation ÷ sensitivity). `clip` is the largest L2 norm of what one unit
    contributes; `clipping = "adaptive"` lets it follow the median norm, from there on, at a price that is charged.
    `mechanism` is of the unit client: `gaussian` noises each round for itself; `banded` is for clients that cannot be
    sampled, with noise that is correlated over the rounds, and each client has its turn once in `separation` rounds.
    `population` is the number of clients that is taken to be public. `noise = "simulation"` is fast, repeatable, and
    NOT private: ledger, report and adapter say so.
    """

    unit: Literal["none", "example", "client"] = "none"
    epsilon: PositiveFloat | None = None
    delta: Annotated[float, Field(ge=1e-12, lt=1)] = 1e-5
    clip: Annotated[float, Field(ge=2.0**-100, le=2.0**60)] = 1.0
    clipping: Literal["fixed", "adaptive"] = "fixed"
    mechanism: Literal["gaussian", "banded"] = "gaussian"
    separation: Positive | None = None
    noise_multiplier: PositiveFloat | None = None
    population: Positive | None = None
    noise: Literal["secret", "simulation"] = "secret"

    @model_validator(mode="after")
    def _unit_has_a_price(self) -> Self:
        if self.unit != "none" and self.epsilon is None:
            raise ValueError(f'epsilon is missing: unit = "{self.unit}" needs the cap that a run may not pass')
        fields = type(self).model_fields
        given = {name for name in self.model_fields_set - {"unit"} if getattr(self, name) != fields[name].default}
        if self.unit == "none" and given:
            raise ValueError(f'{min(given)} has no meaning with unit = "none": remove it, or choose a unit')
        return self

    @model_validator(mode="after")
    def _separation_of_banded(self) -> Self:
        if self.mechanism == "banded" and self.separation is None:
            raise ValueError(
                'separation is missing: mechanism = "banded" needs the rounds between two turns of a client'
            )
        if self.mechanism == "gaussian" and self.separation is not None:
            raise ValueError(f'separation = {self.separation} is of mechanism = "banded": remove it, or choose that')
        return self


class Wire(Section):
    """`codec` is for updates (up), `downlink` for the global adapter (down).

    `density` is the share of the values that `top-k` sends, `coefficients` is how many numbers `seed-projection`
    sends, and `values` is how either codes its numbers. The other codecs read none of the three.
    """

    codec: Literal["fp32", "bf16", "int8", "fp4", "top-k", "seed-projection"] = "fp32"
    downlink: Literal["fp32", "bf16"] = "fp32"
    density: Fraction = 0.1
    coefficients: Positive = 4096
    values: Literal["fp32", "bf16", "int8", "fp4"] = "fp32"


class Zeroth(Section):
    """The low-bandwidth mode (recipes onebyte, kseed, dpzo): a round is one exchange, and a node sends one code a direction.

    In an exchange a node probes its loss along `directions` random directions, at w ± `radius`·z (`sides = "one"`: at
    w + radius·z against w, half the work and more error). `code` is how a slope becomes a code; `clip` is the largest
    slope that one stands for, or, left out, follows a public rule from the codes that everybody saw. Under
    privacy.unit = "client" the range is privacy.clip. `pool` is how many directions there are in all under kseed, and
    `importance` says whether those with large slopes are probed more often.
    """

    directions: Annotated[int, Field(ge=1, le=4096)] = 16
    radius: PositiveFloat = 1e-3
    sides: Literal["two", "one"] = "two"
    code: Literal["int8", "log8", "1-bit"] = "int8"
    clip: PositiveFloat | None = None
    pool: Annotated[int, Field(ge=2, le=2**16)] = 1024
    importance: bool = True


class Partition(Section):
    """How a simulation divides one source into clients."""

    kind: Literal["iid", "dirichlet", "pathological", "by-column", "natural"] = "iid"
    clients: Positive = 10
    alpha: PositiveFloat = 0.5
    classes: Positive = 2
    column: str | None = None

    @model_validator(mode="after")
    def _column_where_needed(self) -> Self:
        if self.kind in ("by-column", "natural") and self.column is None:
            raise ValueError(f'column is missing: a "{self.kind}" partition needs the column to divide by')
        return self


class Data(Section):
    """Simulation only: a file, a hub dataset, `builtin:stdlib` or `builtin:digits`, and its columns.

    Without `evaluation`, a share `holdout` of the rows (of the groups, in a natural partition) is kept for it.
    `limit` reads that many rows at most; `evaluation_limit` draws that many examples (by key) for each evaluation.
    """

    source: str
    evaluation: str | None = None
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    limit: Positive | None = None
    evaluation_limit: Positive | None = None
    text: str = "text"
    label: str = "label"
    prompt: str | None = None
    response: str | None = None
    image: str = "image"
    partition: Partition = Partition()

    @model_validator(mode="after")
    def _prompt_with_response(self) -> Self:
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response go together: name both columns or neither")
        return self


class RunSpec(Section):
    """Everything that defines a run."""

    run: Run = Run()
    model: Model
    adapter: Adapter = Adapter()
    recipe: Recipe = Recipe()
    local: Local = Local()
    participation: Participation = Participation()
    fleet: Fleet | None = None
    privacy: Privacy = Privacy()
    wire: Wire = Wire()
    zeroth: Zeroth = Zeroth()
    data: Data | None = None

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a TOML file, apply `--set` overrides, check. Raises SpecError naming file, key, value and way out.

        Relative paths in the spec are taken from the file's own folder.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise SpecError(f"{path}: no such file. `fedapt init` writes a commented spec to start from.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{path}: cannot be read ({error}).") from None
        return cls.parse(text, where=str(path), folder=path.parent, overrides=overrides)

    @classmethod
    def parse(
        cls, text: str, *, where: str = "spec", folder: Path | None = None, overrides: Sequence[str] = ()
    ) -> Self:
        """Check a spec given as TOML text; see `load`."""
        try:
            raw = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SpecError(f"{where}: not TOML: {error}.") from None
        for override in overrides:
            _override(raw, override)
        spec = cls.check(raw, where=where)
        return spec._resolve(folder) if folder is not None else spec

    def _resolve(self, folder: Path) -> Self:
        """This spec with the paths that exist relative to `folder` made absolute."""

        def resolved(name: str | None) -> str | None:
            if name is None or name.startswith("builtin:") or not (folder / name).exists():
                return name
            return str((folder / name).resolve())

        model = self.model.model_copy(update={"base": resolved(self.model.base)})
        own = {"start": resolved(self.adapter.start), "public": resolved(self.adapter.public)}
        adapter = self.adapter.model_copy(update=own)
        data = self.data and self.data.model_copy(
            update={"source": resolved(self.data.source), "evaluation": resolved(self.data.evaluation)}
        )
        fleet = self.fleet and self.fleet.model_copy(update={"trace": resolved(self.fleet.trace)})
        return self.model_copy(update={"model": model, "adapter": adapter, "data": data, "fleet": fleet})

    def to_json(self) -> str:
        """Canonical JSON: the form in which a spec is stored, hashed and sent."""
        return self.model_dump_json(exclude_none=True)

    def set(self, *overrides: str) -> Self:
        """This spec with `section.key=value` overrides, checked anew."""
        raw = self.model_dump(exclude_none=True)
        for override in overrides:
            _override(raw, override)
        return self.check(raw, where="--set")


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` in place; the value is TOML, or a bare word taken as a string."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise SpecError(f"--set {override!r}: write it as section.key=value, for example --set run.rounds=5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for key in keys[:-1]:
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            raise SpecError(f"--set {override!r}: {key} is a value, not a section")
    raw[keys[-1]] = value


def _section(spec: type[BaseModel], path: Sequence[Any]) -> type[BaseModel]:
    """The section class that holds the last key of `path`."""
    for key in path[:-1]:
        annotation = spec.model_fields[key].annotation if key in spec.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        spec = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), spec)
    return spec


def _explain(spec: type[BaseModel], problem: Any) -> str:
    """One mistake as `key = value: what is wrong and what would be right`."""
    path = [key for key in problem["loc"] if isinstance(key, str) and "[" not in key]
    key = ".".join(path) or "spec"
    if problem["type"] == "extra_forbidden":
        legal = list(_section(spec, path).model_fields)
        near = difflib.get_close_matches(path[-1], legal, n=1, cutoff=0.5)
        way_out = f'did you mean "{near[0]}"?' if near else f"the keys here are {', '.join(legal)}."
        return f"{key} = {problem['input']!r}: unknown key; {way_out}"
    if problem["type"] == "missing":
        return f"{key}: missing; it must be set."
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"[{key}] {message}."
    near = difflib.get_close_matches(str(problem["input"]), _literals(problem), n=1, cutoff=0.3)
    hint = f' (did you mean "{near[0]}"?)' if near else ""
    return f"{key} = {problem['input']!r}: {message[0].lower()}{message[1:]}{hint}."


def _literals(problem: Any) -> list[str]:
    expected = problem.get("ctx", {}).get("expected", "") if problem["type"] == "literal_error" else ""
    return [part.strip(" '") for part in expected.replace(" or ", ",").split(",")]
