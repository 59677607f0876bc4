"""The Python way: a simulation around objects that somebody already has."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .client.adapted import adapt, orthonormalize_factors
from .client.adapters import methods_of
from .client.client import Client, Sites
from .client.frozen import add_frozen
from .client.tasks import CausalLanguageModel, Examples, ImageClassification, SequenceClassification, Task
from .progress import Silent, Watch
from .protocols.errors import DataError, ModelError, SpecError
from .protocols.legality import RANKED, initial_a, recipe_of
from .protocols.shared import require_pairs
from .protocols.spec import RunSpec
from .server.store import MemoryStore
from .sim.clock import with_clock
from .sim.federation import Federation
from .sim.grid import LocalGrid
from .simulation import Result, coordinate

Items = Sequence[Mapping[str, Any]]
"""A dataset: `ds[i]` gives `input_ids` or `pixel_values`, and `labels` (or `label`)."""

TASKS = {"SEQ_CLS": "sequence-classification", "CAUSAL_LM": "causal-lm"}


def simulate(
    *,
    model: Any,
    clients: Sequence[Items],
    recipe: str = "fedsvd",
    rounds: int = 10,
    evaluation: Items | None = None,
    optimizer: str = "adamw",
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    steps: int | None = None,
    seed: int = 0,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    watch: Watch | None = None,
) -> Result:
    """Federate a peft model of your own over encoded datasets of your own.

    `model` is a `peft.PeftModel`; what it trains is what is federated, starting from its present values, and it holds
    the result afterwards. `clients` are datasets whose items have `input_ids` (or `pixel_values`) and `labels`
    (causal language models may leave `labels` out). `steps` local batches a round, or one pass if None.
    `sections` sets anything else of a spec, for example `{"wire": {"codec": "int8"}}`. Rank, alpha and method of the
    adapter are the model's own.

    Raises SpecError, ModelError or DataError, each with the way out.
    """
    task = _task(model)
    sizes: dict[str, Any] = {"labels": getattr(model.config, "num_labels", None)} if task != "causal-lm" else {}
    raw: dict[str, Any] = {
        "run": {"name": "simulation", "rounds": rounds, "seed": seed},
        "model": {"base": getattr(model.config, "_name_or_path", "") or "in-memory", "task": task, **sizes},
        "adapter": _adapter(model, (sections or {}).get("adapter", {})),
        "recipe": {"name": recipe},
        "local": {"optimizer": optimizer, "learning_rate": learning_rate, "batch_size": batch_size}
        | ({} if steps is None else {"steps": steps}),
    }
    for section, values in (sections or {}).items():
        raw[section] = {**raw.get(section, {}), **values}
    spec = RunSpec.check(raw, where="simulate()")
    federation = _federation(spec, model, clients, evaluation)
    evaluate = federation.evaluate if evaluation is not None else None
    grid = with_clock(LocalGrid(federation.client))
    outcome = coordinate(spec, federation.client, MemoryStore(), evaluate, watch or Silent(), grid=grid)
    federation.adapted.write(outcome.adapter)
    return Result(spec, outcome, federation)


def _federation(spec: RunSpec, model: Any, clients: Sequence[Items], evaluation: Items | None) -> Federation:
    recipe = recipe_of(spec)
    adapted = adapt(model, _padding_task(spec.model.task, model))
    require_pairs(recipe, adapted.layout, "model")
    if initial_a(spec) == "eva":
        raise SpecError(
            'recipe.initial_a = "eva" is illegal here: put it into the A\'s of the model that you pass. '
            'Nearest legal: "orthonormal".'
        )
    if initial_a(spec) == "orthonormal":
        orthonormalize_factors(adapted)
    adapted = add_frozen(adapted, recipe, spec)
    parts = [_encoded(items, spec.model.task, f"clients[{i}]") for i, items in enumerate(clients)]
    bounds = np.cumsum([0, *map(len, parts)])
    examples = Examples(
        [x for part in parts for x in part.inputs], [y for part in parts for y in part.labels], np.arange(bounds[-1])
    )
    if len(examples) == 0:
        raise DataError("clients: none of them has an example")
    indices = {i: np.arange(bounds[i], bounds[i + 1]) for i in range(len(parts))}
    held_out = (
        _encoded(evaluation, spec.model.task, "evaluation")
        if evaluation is not None
        else Examples([], [], np.array([]))
    )
    names = [f"client {i}" for i in range(len(parts))]
    return Federation(Client(spec, adapted, Sites(examples, indices)), held_out, names)


def _adapter(model: Any, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Method, rank and alpha as the model's own config has them. Raises SpecError where `stated` says another."""
    config = model.peft_config[model.active_adapter]
    kind = config.to_dict().get("peft_type")
    methods = methods_of(config.to_dict() | {"peft_type": str(getattr(kind, "value", kind))})
    if not methods:  # a kind that a spec does not name
        return {}
    method = stated["method"] if stated.get("method") in methods else methods[0]
    own: dict[str, Any] = {"method": method}
    if method in RANKED:  # AdaLoRA has all of `init_r`, because nothing is pruned here
        own["rank"] = getattr(config, "init_r", config.r)
    if method in ("lora", "dora"):
        own["rank"] = max([config.r, *config.rank_pattern.values()])
    if method in RANKED and method != "vera":
        own["alpha"] = config.lora_alpha
    for key, value in own.items():
        if key in stated and stated[key] != value:
            raise SpecError(
                f"adapter.{key} = {stated[key]!r}: the model that you pass has {value!r}. Leave the key out, or give "
                "peft's own config the other value."
            )
    return own


def _task(model: Any) -> str:
    if not hasattr(model, "peft_config"):
        raise ModelError(f"model: {type(model).__name__} is no peft model; wrap it with peft.get_peft_model first")
    kind = str(getattr(model.peft_config[model.active_adapter], "task_type", None) or "").rpartition(".")[2]
    if kind in TASKS:
        return TASKS[kind]
    name = type(model.get_base_model()).__name__
    if name.endswith("ForImageClassification"):
        return "image-classification"
    if name.endswith("ForSequenceClassification"):
        return "sequence-classification"
    return "causal-lm"


def _padding_task(task: str, model: Any) -> Task:
    """A task that collates and scores; the caller's items are encoded already."""
    pad = getattr(model.config, "pad_token_id", None) or 0
    if task == "image-classification":
        return ImageClassification(None)
    if task == "causal-lm":
        return CausalLanguageModel(None, 0, pad)
    return SequenceClassification(None, 0, pad)


def _encoded(items: Items, task: str, where: str) -> Examples:
    """Examples from encoded items. Raises DataError naming dataset, item and key."""
    inputs, labels = [], []
    key = "pixel_values" if task == "image-classification" else "input_ids"
    kind = np.float32 if key == "pixel_values" else np.int64
    for number in range(len(items)):
        item = items[number]
        if key not in item:
            raise DataError(
                f"{where}[{number}]: no {key!r} (its keys are {', '.join(map(str, item))}); encode it first"
            )
        inputs.append(np.asarray(item[key], kind))
        label = item.get("labels", item.get("label", inputs[-1] if task == "causal-lm" else None))
        if label is None:
            raise DataError(f"{where}[{number}]: no 'labels'")
        labels.append(np.asarray(label, np.int64))
    return Examples(inputs, labels, np.arange(len(inputs)))
