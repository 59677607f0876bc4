"""What a spec may combine with its recipe: checked before anything runs, each refusal with the nearest legal choice."""

from typing import Any, Literal

from .errors import SpecError
from .keys import derive
from .recipes import Recipe, recipe_named
from .spec import RunSpec


def recipe_of(spec: RunSpec) -> Recipe:
    """The spec's recipe. Raises SpecError for an unknown name or a combination that would be wrong."""
    recipe = recipe_named(spec.recipe.name)
    problems = illegal(spec, recipe)
    if problems:
        raise SpecError("\n".join(problems))
    return recipe


def illegal(spec: RunSpec, recipe: Recipe) -> list[str]:
    """Every reason why `spec` may not run with `recipe`, each with the nearest legal choice."""
    return [
        *_of_exchanges(spec, recipe),
        *_of_the_step(spec, recipe),
        *_of_the_adapter(spec, recipe),
        *_of_the_start(spec, recipe),
        *_of_the_aggregator(spec, recipe),
        *_of_the_weighting(spec, recipe),
        *_of_the_wire(spec, recipe),
        *_of_fragments(spec, recipe),
        *_of_privacy(spec, recipe),
        *_of_unused_keys(spec, recipe),
    ]


def initial_a(spec: RunSpec) -> Literal["kaiming", "orthonormal", "eva"]:
    """How A starts: drawn by key, or from public data (`eva`)."""
    return spec.recipe.initial_a or recipe_of(spec).initial_a[0]


RANKED = ("lora", "dora", "adalora", "vera", "nola")
"""The adapter methods that have a rank."""


def rank_of(spec: RunSpec, node: int) -> int:
    """What a virtual node says that it can afford: one of `adapter.ranks` by key; 0 (any) where they are not mixed."""
    ranks = spec.adapter.ranks
    return ranks[derive(spec.run.seed, "rank", node) % len(ranks)] if ranks else 0


def rank_for(spec: RunSpec, most: int) -> int:
    """The rank at which a node trains that can afford `most` (0: any); 0 stands for the adapter's own.

    It is the largest of `adapter.ranks` that fits, or `most` itself where there are none and the run may mix ranks: the
    truncation nearest to the whole adapter that the node can hold. Raises SpecError, with the reason, where none fits.
    """
    adapter = spec.adapter
    if adapter.method not in RANKED:
        return 0
    if adapter.ranks:
        fitting = [rank for rank in adapter.ranks if most == 0 or rank <= most]
        if not fitting:
            raise SpecError(
                f"the node can afford rank {most}, and the smallest of adapter.ranks = {list(adapter.ranks)} is "
                f"{min(adapter.ranks)}. Nearest legal: a run with {most} among its ranks."
            )
        return max(fitting)
    if most == 0 or most >= adapter.rank:
        return 0
    mixed = adapter.model_copy(update={"ranks": (most, adapter.rank)})
    problems = illegal(spec.model_copy(update={"adapter": mixed}), recipe_named(spec.recipe.name))
    if problems:
        raise SpecError(f"the node can afford rank {most}, and this run needs rank {adapter.rank}: {problems[0]}")
    return most


def _of_the_step(spec: RunSpec, recipe: Recipe) -> list[str]:
    problems = []
    if spec.recipe.optimizer not in recipe.server_optimizers:
        why = "the aggregate is the next adapter itself, not a step towards it"
        if recipe.refactorizes:
            why = "its state lives in A's basis, which rotates each round, and elementwise scaling does not rotate"
        if recipe.alternates:
            why = "its memory would move the factor that a round keeps fixed"
        if recipe.zeroth:
            why = "every node moves its lattice by the same integers, without a memory"
        problems.append(
            f'recipe.optimizer = "{spec.recipe.optimizer}" is illegal with {recipe.name}: {why}. '
            f'Nearest legal: "{recipe.server_optimizers[-1]}".'
        )
    if recipe.replaces and spec.recipe.learning_rate != 1.0:
        problems.append(
            f"recipe.learning_rate = {spec.recipe.learning_rate} is illegal with {recipe.name}: a part of a step "
            "between two factorizations means nothing. Nearest legal: 1.0."
        )
    return problems


def _of_the_adapter(spec: RunSpec, recipe: Recipe) -> list[str]:
    problems = []
    if spec.adapter.method != "lora" and recipe.name not in ("fedit", "diloco") and not recipe.zeroth:
        problems.append(
            f'recipe.name = "{recipe.name}" is illegal with adapter.method = "{spec.adapter.method}": the recipe works '
            'on the factors of ΔW = B·A, which this method does not have. Nearest legal: "fedit", the mean of what is '
            "trained."
        )
    if spec.adapter.ranks and not recipe.mixes_ranks:
        other = 'recipe.name = "flexlora", or ' if spec.adapter.method == "lora" else ""
        problems.append(
            f"adapter.ranks = {list(spec.adapter.ranks)} is illegal with {recipe.name}: it needs one rank, because it "
            f"adds factors component by component. Nearest legal: {other}no ranks."
        )
    return problems


def _of_the_start(spec: RunSpec, recipe: Recipe) -> list[str]:
    problems = _of_eva(spec, recipe) if spec.recipe.initial_a == "eva" else []
    if spec.recipe.initial_a not in (None, "eva", *recipe.initial_a):
        problems.append(
            f'recipe.initial_a = "{spec.recipe.initial_a}" is illegal with {recipe.name}. '
            f'Nearest legal: "{recipe.initial_a[0]}".'
        )
    if spec.adapter.ranks and spec.adapter.start:
        problems.append(
            f'adapter.start = "{spec.adapter.start}" is illegal with adapter.ranks: the first components of its '
            "factors are not its best part. Nearest legal: one rank."
        )
    if spec.adapter.layers and spec.adapter.start:
        problems.append(
            f'adapter.start = "{spec.adapter.start}" is illegal with adapter.layers = {list(spec.adapter.layers)}: its '
            "folder says itself which blocks it adapts. Nearest legal: adapter.layers = []."
        )
    if recipe.has_frozen and spec.adapter.start:
        problems.append(
            f'adapter.start = "{spec.adapter.start}" is illegal with {recipe.name}: it has frozen factors of its own. '
            f'Nearest legal: recipe.name = "{"ffa" if recipe.refreshes else "flexlora"}".'
        )
    return problems


def _of_eva(spec: RunSpec, recipe: Recipe) -> list[str]:
    """A is made from public data alone, and has to be made: a factor of plain LoRA, and not one from a folder."""
    public, nearest = spec.adapter.public, f'Nearest legal: "{recipe.initial_a[0]}".'
    eva = 'recipe.initial_a = "eva" is illegal'
    problems = []
    if spec.adapter.method != "lora":
        problems.append(f'{eva} with adapter.method = "{spec.adapter.method}", which has no A of its own. {nearest}')
    if spec.adapter.start:
        problems.append(f'{eva} with adapter.start = "{spec.adapter.start}", which has an A already. {nearest}')
    if recipe.refactorizes and spec.adapter.ranks:
        ranks, why = list(spec.adapter.ranks), "the rotation of a round needs more rows of A than a small node receives"
        problems.append(f"{eva} with {recipe.name} and adapter.ranks = {ranks}: {why}. {nearest}")
    if recipe.streams or recipe.zeroth:
        problems.append(
            f"{eva} with {recipe.name}: nodes begin from tensors of their own, and two machines may compute another A. "
            f"{nearest}"
        )
    elif public is None:
        problems.append(f"{eva} without adapter.public, the only data that A may come from. {nearest}")
    if spec.data is not None and public in (spec.data.source, spec.data.evaluation):
        problems.append(
            f'adapter.public = "{public}" is illegal: data that a run trains or is evaluated on is not public. '
            f'Nearest legal: another source, or recipe.initial_a = "{recipe.initial_a[0]}".'
        )
    return problems


ON_ENTRIES = ("median", "trimmed-mean", "ties", "breadcrumbs", "pcb", "fisher")
"""Aggregators that look at each number for itself."""

WEIGHED = ("clip", "median", "trimmed-mean", "geometric-median")
"""Aggregators against bad nodes that bear less than half of the weight, whoever has it."""


def _of_the_aggregator(spec: RunSpec, recipe: Recipe) -> list[str]:
    name = spec.recipe.aggregator
    if recipe.zeroth:
        return _of_trimming(name, recipe)
    why = ""
    if name in ON_ENTRIES and "A" in recipe.trains and not recipe.alternates and spec.adapter.method == "lora":
        why = "an entry of A or B means something only in the basis that a node trained in, and each has its own"
    elif name in ON_ENTRIES and spec.adapter.ranks:
        why = "nodes of a small rank do not send all entries"
    elif name == "fisher" and recipe.streams:
        why = "a node trains tensors of its own, and its information would be of them, not of the federation's"
    elif name == "greedy-soup" and not recipe.linear:
        why = f"a soup is a mean of tensors, and what {recipe.name} makes of a round is none"
    elif name == "clip" and recipe.replaces:
        why = "weights that sum to less than 1 shrink the adapter, not the step"
    nearest = "geometric-median" if name in WEIGHED else "mean"
    if name != "mean" and recipe.averages == "by-norm":
        why, nearest = f"{recipe.name} gives the weights itself, by a norm that any node can make large", "mean"
    return [f'recipe.aggregator = "{name}" is illegal here: {why}. Nearest legal: "{nearest}".'] if why else []


def _of_the_weighting(spec: RunSpec, recipe: Recipe) -> list[str]:
    name, weighting = spec.recipe.aggregator, spec.recipe.weighting
    if weighting == "uniform" or name not in WEIGHED or recipe.zeroth:  # codes have no weights
        return []
    why = 'a bad node would state any weight. Nearest legal: recipe.weighting = "uniform".'
    return [f'recipe.weighting = "{weighting}" is illegal with recipe.aggregator = "{name}": {why}']


def _of_trimming(name: str, recipe: Recipe) -> list[str]:
    """Nodes' codes are added; where all probe the same directions, the extreme ones may be left out."""
    if name == "mean" or (name == "trimmed-mean" and recipe.directions == "shared"):
        return []
    why = "codes are of directions, not of tensors"
    if name == "trimmed-mean":
        why = "nodes probe different directions, so there is nothing to compare"
    nearest = '"trimmed-mean"' if recipe.directions == "shared" else '"mean", or recipe.name = "dpzo"'
    return [f'recipe.aggregator = "{name}" is illegal with {recipe.name}: {why}. Nearest legal: {nearest}.']


def _of_the_wire(spec: RunSpec, recipe: Recipe) -> list[str]:
    why = _of_single_entries(spec) or _of_the_residual(spec, recipe)
    return [f'wire.codec = "{spec.wire.codec}" is illegal here: {why}. Nearest legal: "fp4".'] if why else []


def _of_single_entries(spec: RunSpec) -> str:
    """Why the codec has no entries that the aggregator could look at, or nothing."""
    sent = {"top-k": "most entries of an update are 0", "seed-projection": "an entry of one update is mostly error"}
    if spec.wire.codec not in sent or spec.recipe.aggregator not in ON_ENTRIES:
        return ""
    return f'{sent[spec.wire.codec]}, and recipe.aggregator = "{spec.recipe.aggregator}" looks at each for itself'


def _of_the_residual(spec: RunSpec, recipe: Recipe) -> str:
    """Why error feedback cannot keep what top-k leaves out, or nothing."""
    why = ""
    if spec.wire.codec != "top-k":
        return why
    if recipe.replaces or recipe.alternates or recipe.refreshes:
        why = f"{recipe.name} gives nodes other factors from round to round, where an old residual means nothing"
    elif recipe.streams:
        why = "what is left of a fragment stays in the node's own tensors already"
    elif spec.adapter.ranks:
        why = "nodes of different ranks would keep residuals of different shapes"
    elif spec.recipe.aggregator in ("krum", "multi-krum", "greedy-soup"):
        why = f'recipe.aggregator = "{spec.recipe.aggregator}" drops updates, and their nodes take them for heard'
    elif spec.participation.spare > 0:
        why = f"with participation.spare = {spec.participation.spare:g} updates are dropped that nodes take for heard"
    return why


def _of_fragments(spec: RunSpec, recipe: Recipe) -> list[str]:
    if not recipe.streams:
        return []
    problems = []
    settings, steps = spec.recipe, spec.local.steps
    if settings.fragments > 1 and spec.participation.sampling != "all":
        problems.append(
            f'participation.sampling = "{spec.participation.sampling}" is illegal with recipe.fragments = '
            f'{settings.fragments}: a node that misses a round misses a fragment. Nearest legal: "all".'
        )
    if steps is not None and settings.delay >= steps:
        problems.append(
            f"recipe.delay = {settings.delay} is not below local.steps = {steps}: a fragment would never arrive. "
            f"Nearest legal: {steps - 1}."
        )
    return problems


def _of_privacy(spec: RunSpec, recipe: Recipe) -> list[str]:
    unit = spec.privacy.unit
    if unit not in recipe.units and recipe.zeroth:
        why = "nodes probe directions of their own, so each code would need noise of its own"
        return [f'privacy.unit = "{unit}" is illegal with {recipe.name}: {why}. Nearest legal: recipe.name = "dpzo".']
    if unit not in recipe.units:
        why = "the aggregate is no linear sum of what nodes send, so noise on a sum does not cover it"
        if recipe.streams or recipe.alternates:
            why = "it is not proven for it here"
        nearest = f'recipe.name = "fedsvd", or "{recipe.units[0]}" (no formal guarantee)'
        return [f'privacy.unit = "{unit}" is illegal with {recipe.name}: {why}. Nearest legal: {nearest}.']
    problems = []
    if unit != "none" and spec.recipe.aggregator != "mean":
        problems.append(
            f'recipe.aggregator = "{spec.recipe.aggregator}" is illegal with privacy.unit = "{unit}": clipping and '
            'noise are of a plain sum. Nearest legal: "mean".'
        )
    if unit != "none" and spec.recipe.weighting != "uniform":
        why = "a node would weigh what it says" if unit == "client" else "a number of examples tells of one more"
        problems.append(
            f'recipe.weighting = "{spec.recipe.weighting}" is illegal with privacy.unit = "{unit}": {why}. '
            'Nearest legal: "uniform".'
        )
    if unit == "client" and spec.participation.sampling == "poisson" and spec.participation.minimum > 0:
        problems.append(
            f"participation.minimum = {spec.participation.minimum} is illegal with Poisson sampling and "
            'privacy.unit = "client": a draw that is filled up is no Poisson draw. Nearest legal: 0.'
        )
    if unit == "client" and spec.adapter.ranks:
        problems.append(
            f'adapter.ranks = {list(spec.adapter.ranks)} is illegal with privacy.unit = "client" in this version. '
            "Nearest legal: one rank."
        )
    if unit == "client" and spec.participation.spare > 0:
        problems.append(
            f'participation.spare = {spec.participation.spare:g} is illegal with privacy.unit = "client": who is quick '
            "would decide who counts. Nearest legal: 0."
        )
    if unit != "none" and spec.participation.evaluates:
        problems.append(
            f'participation.evaluates = true is illegal with privacy.unit = "{unit}": exact scores on a node\'s own data '
            "are a release without noise. Nearest legal: false, and evaluation on data that is public."
        )
    if unit == "example" and spec.adapter.dropout > 0:
        problems.append(
            f'adapter.dropout = {spec.adapter.dropout} is illegal with privacy.unit = "example": its masks are keyed by '
            "batch, not by example. Nearest legal: 0."
        )
    if unit != "client" and (spec.privacy.clipping != "fixed" or spec.privacy.population is not None):
        problems.append(
            'privacy.clipping = "adaptive" and privacy.population are of unit = "client". Nearest legal: remove them.'
        )
    return problems + (_of_banded(spec, recipe) if spec.privacy.mechanism == "banded" else [])


def _of_banded(spec: RunSpec, recipe: Recipe) -> list[str]:
    banded = 'is illegal with privacy.mechanism = "banded"'
    problems = []
    if spec.privacy.unit != "client":
        problems.append(
            f'privacy.mechanism = "banded" is of unit = "client", and this is "{spec.privacy.unit}". '
            'Nearest legal: "gaussian".'
        )
    if spec.participation.sampling != "all":
        problems.append(
            f'participation.sampling = "{spec.participation.sampling}" {banded}: clients have turns instead of a draw. '
            'Nearest legal: "all".'
        )
    if spec.privacy.clipping != "fixed":
        problems.append(
            f'privacy.clipping = "{spec.privacy.clipping}" {banded}: its noise is of one clip for the whole run. '
            'Nearest legal: "fixed".'
        )
    if recipe.refactorizes or recipe.refreshes:
        problems.append(
            f'recipe.name = "{recipe.name}" {banded}: it changes the basis from round to round, and noise that is taken '
            'back must be in the basis in which it was added. Nearest legal: "ffa".'
        )
    return problems


def _of_exchanges(spec: RunSpec, recipe: Recipe) -> list[str]:
    """What exchanges of codes have no place for."""
    if not recipe.zeroth:
        given = spec.zeroth.model_dump(exclude_defaults=True)
        return [f"zeroth.{key}: read by onebyte, kseed and dpzo alone; remove the key." for key in given]
    usual = RunSpec.model_validate({"model": spec.model.model_dump(), "recipe": {"name": recipe.name}})
    why = {
        "local.steps": "an exchange is one batch",
        "local.epochs": "an exchange is one batch",
        "adapter.dropout": "probes of one loss must see one model",
        "recipe.learning_rate": "local.learning_rate is the step",
        "privacy.clipping": "clip, noise and the range of a code are three constants",
        "privacy.mechanism": "each exchange is charged for itself",
        "wire.codec": "zeroth.code is what nodes send in",
        "wire.downlink": "nodes receive codes",
    }
    if recipe.directions != "pool":
        why |= dict.fromkeys(("zeroth.pool", "zeroth.importance"), "only kseed has a pool")
    return [
        f"{key} = {value!r} is illegal with {recipe.name}: {reason}. Nearest legal: remove the key."
        for key, reason in why.items()
        if (value := _at(spec, key)) != _at(usual, key)
    ]


def _at(spec: RunSpec, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(spec, section), name)


def _of_unused_keys(spec: RunSpec, recipe: Recipe) -> list[str]:
    problems = []
    if spec.adapter.public is not None and spec.recipe.initial_a != "eva":
        problems.append(
            f'adapter.public = "{spec.adapter.public}": read for recipe.initial_a = "eva" alone; remove the key.'
        )
    if spec.recipe.period is not None and not (recipe.refactorizes or recipe.refreshes):
        problems.append(f"recipe.period = {spec.recipe.period}: {recipe.name} has no period; remove the key.")
    if spec.recipe.budget is not None and not (recipe.has_frozen or recipe.residual == "server"):
        problems.append(f"recipe.budget = {spec.recipe.budget}: {recipe.name} has no budget; remove the key.")
    problems += [
        f"recipe.{key} = {value}: {recipe.name} synchronizes all at once; remove the key."
        for key, value, usual in (
            ("fragments", spec.recipe.fragments, 1),
            ("mixing", spec.recipe.mixing, 0.0),
            ("delay", spec.recipe.delay, 0),
        )
        if value != usual and not recipe.streams
    ]
    if recipe.refreshes and spec.recipe.budget is not None and spec.recipe.budget < spec.adapter.rank:
        problems.append(
            f"recipe.budget = {spec.recipe.budget} is below adapter.rank = {spec.adapter.rank}: not one fresh start "
            f"fits. Nearest legal: {spec.adapter.rank}."
        )
    return problems
