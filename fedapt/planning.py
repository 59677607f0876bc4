"""What a run will cost, before it runs: bytes, parameters, memory, ε. The bytes are those the run will count, exactly."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .client.adapted import AdaptedModel
from .client.chunks import activation_bytes, chunk_tokens
from .client.models import load_model
from .client.sources import load_tables
from .exchange_planning import exchange_traffic, longest_segment, probes_together
from .forecast import Forecast, forecast
from .protocols.codecs import CODECS, uplink_of
from .protocols.legality import rank_of, recipe_of
from .protocols.shared import SharedAdapter
from .protocols.spec import RunSpec
from .server.participation import cohort_size
from .sim.clock import examples_of
from .sim.fleet import fleet_of, seconds
from .sim.partition import partition


@dataclass(frozen=True)
class Plan:
    """Figures of a run. Bytes are payloads, as the run counts them, those per node a mean over rounds and nodes;
    `exact_total` is False where chance decides who takes part and that changes the totals: then they are expectations. Memory is in bytes; activations are an estimate.

    `longest_segment` is of zeroth-order recipes, whose rounds are exchanges: how many of them a segment of the lattice holds.
    `node_seconds` is of a fleet: what a round takes a node of median size, speed and link. Its stragglers take longer."""

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
    privacy: Forecast
    longest_segment: int | None = None
    node_seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(spec: RunSpec) -> Plan:
    """The plan of a spec. Loads model and data, trains nothing. Raises what a run of it would raise."""
    recipe = recipe_of(spec)
    sizes = _sizes(spec)
    clients = [number for number, size in enumerate(sizes) if size > 0]
    adapted = load_model(spec)
    shared = SharedAdapter(recipe, spec.recipe, adapted.layout, adapted.read())
    separation = spec.privacy.separation
    drawn = round(len(clients) / separation) if separation else cohort_size(len(clients), spec.participation)
    sent, longest = shared.sent(1).size, None
    if recipe.zeroth:
        sent, longest = spec.zeroth.directions, longest_segment(spec, drawn)
        down, up = (len(clients) * each for each in exchange_traffic(spec, drawn))
    else:
        down, up = _traffic(spec, shared, clients)
    weights = sum(p.numel() * p.element_size() for p in adapted.model.parameters())
    own = adapted.layout.select(recipe.trains).size
    mixed = len({rank_of(spec, client) for client in clients}) > 1
    return Plan(
        recipe=recipe.name,
        exact=recipe.exact,
        nodes=len(clients),
        empty=len(sizes) - len(clients),
        nodes_a_round=drawn,
        rounds=spec.run.rounds,
        trainable=own,
        sent=sent,
        parameters=sum(p.numel() for p in adapted.model.parameters()),
        down_per_node=round(down / spec.run.rounds / len(clients)),
        up_per_node=round(up / spec.run.rounds / len(clients)),
        down_total=round(down * drawn / len(clients)),
        up_total=round(up * drawn / len(clients)),
        exact_total=spec.run.patience == 0
        and separation is None
        and spec.fleet is None
        and (spec.participation.sampling == "all" or (spec.participation.sampling == "fixed" and not mixed)),
        memory_weights=weights,
        memory_adapters=4 * own * probes_together(spec)
        if recipe.zeroth
        else _chunk(spec, adapted) * sent * 4 * (4 if spec.local.optimizer == "adamw" else 2),
        memory_activations=_activations(spec, adapted),
        privacy=forecast(spec, [size for size in sizes if size > 0], sent),
        longest_segment=longest,
        node_seconds=_node_seconds(spec, sorted(size for size in sizes if size > 0), down, up),
    )


def _node_seconds(spec: RunSpec, sizes: Sequence[int], down: int, up: int) -> float | None:
    """Of the median node; `down` and `up` are the bytes of all nodes in all rounds. Raises SpecError as a run would."""
    fleet = fleet_of(spec)
    if fleet is None:
        return None
    visits = spec.run.rounds * len(sizes)
    return seconds(fleet, examples_of(sizes[len(sizes) // 2], spec.local), down // visits, up // visits)


def _traffic(spec: RunSpec, shared: SharedAdapter, clients: Sequence[int]) -> tuple[int, int]:
    """Bytes down and up over the whole run if every client took part in every round."""
    down, up = CODECS[spec.wire.downlink], uplink_of(spec)
    ranks = Counter(rank_of(spec, client) for client in clients)
    rounds = range(1, spec.run.rounds + 1)
    return (
        sum(count * down.size(shared.delivered(round_, rank)) for round_ in rounds for rank, count in ranks.items()),
        sum(count * up.size(shared.sent(round_, rank)) for round_ in rounds for rank, count in ranks.items()),
    )


def _sizes(spec: RunSpec) -> list[int]:
    """How many rows each client has. Without data, one client with one."""
    if spec.data is None:
        return [1]
    tables = load_tables(spec.data, spec.model, spec.run.seed)
    return [len(own) for own in partition(tables.train, spec.data.partition, spec.run.seed).rows]


def _chunk(spec: RunSpec, adapted: AdaptedModel) -> int:
    """Members that train together, at full length."""
    return max(1, chunk_tokens(adapted.model) // (spec.local.batch_size * spec.model.max_length))


def _activations(spec: RunSpec, adapted: AdaptedModel) -> int:
    tokens = _chunk(spec, adapted) * spec.local.batch_size * spec.model.max_length
    return tokens * activation_bytes(adapted.model)
