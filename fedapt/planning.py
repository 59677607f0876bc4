"""What a run will cost, before it runs: bytes, parameters, memory. The bytes are those the run will count, exactly."""

from dataclasses import asdict, dataclass
from typing import Any

from .client.models import AdaptedModel, load_model
from .client.sources import load_tables
from .client.trainer import COHORT_TOKENS
from .protocols.codecs import CODECS
from .protocols.recipes import recipe_of
from .protocols.spec import RunSpec
from .server.participation import cohort_size
from .sim.partition import partition

ACTIVATIONS_PER_TOKEN = 34
"""fp32 values of width `hidden` that one token keeps in one transformer layer for the backward pass (about)."""


@dataclass(frozen=True)
class Plan:
    """Figures of a run. Bytes are payloads, as the run counts them; `exact_total` is False under Poisson sampling,
    where the totals are expectations. Memory is in bytes; activations are an estimate."""

    recipe: str
    exact: bool
    nodes: int
    empty: int
    nodes_a_round: int
    rounds: int
    trainable: int
    sent: int
    parameters: int
    down_per_node: int
    up_per_node: int
    down_total: int
    up_total: int
    exact_total: bool
    memory_weights: int
    memory_adapters: int
    memory_activations: int
    privacy: str = "none: no formal guarantee"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(spec: RunSpec) -> Plan:
    """The plan of a spec. Loads model and data, trains nothing. Raises what a run of it would raise."""
    recipe = recipe_of(spec)
    nodes, empty = _nodes(spec)
    adapted = load_model(spec)
    down = CODECS[spec.wire.downlink].size(recipe.downlink(adapted.layout))
    up = CODECS[spec.wire.codec].size(recipe.trained(adapted.layout))
    drawn = cohort_size(nodes, spec.participation)
    sent = recipe.trained(adapted.layout).size
    weights = sum(p.numel() * p.element_size() for p in adapted.model.parameters())
    return Plan(
        recipe=recipe.name,
        exact=recipe.exact,
        nodes=nodes,
        empty=empty,
        nodes_a_round=drawn,
        rounds=spec.run.rounds,
        trainable=adapted.layout.size,
        sent=sent,
        parameters=sum(p.numel() for p in adapted.model.parameters()),
        down_per_node=down,
        up_per_node=up,
        down_total=down * drawn * spec.run.rounds,
        up_total=up * drawn * spec.run.rounds,
        exact_total=spec.participation.sampling != "poisson" and spec.run.patience == 0,
        memory_weights=weights,
        memory_adapters=_chunk(spec) * sent * 4 * (4 if spec.local.optimizer == "adamw" else 2),
        memory_activations=_activations(spec, adapted),
    )


def _nodes(spec: RunSpec) -> tuple[int, int]:
    """Clients with data, and clients without."""
    if spec.data is None:
        return 1, 0
    tables = load_tables(spec.data, spec.model, spec.run.seed)
    rows = partition(tables.train, spec.data.partition, spec.run.seed).rows
    busy = sum(len(own) > 0 for own in rows)
    return busy, len(rows) - busy


def _chunk(spec: RunSpec) -> int:
    """Members that train together, at full length."""
    return max(1, COHORT_TOKENS // (spec.local.batch_size * spec.model.max_length))


def _activations(spec: RunSpec, adapted: AdaptedModel) -> int:
    config = adapted.model.config.get_text_config()
    tokens = _chunk(spec) * spec.local.batch_size * spec.model.max_length
    layers, hidden = getattr(config, "num_hidden_layers", 1), getattr(config, "hidden_size", 1)
    return int(tokens * layers * hidden * ACTIVATIONS_PER_TOKEN * 4)
