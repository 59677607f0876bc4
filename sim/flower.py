"""The ClientApp for Flower's own simulation: node number `partition-id` trains on its share of the spec's data."""

from functools import lru_cache

from flwr.app import Context

from ..client.app import client_app
from ..client.client import Client, Sites
from ..protocols.errors import SpecError
from ..protocols.legality import rank_of
from ..protocols.records import spec_from_context
from ..protocols.spec import RunSpec
from .federation import Federation, build


@lru_cache(maxsize=1)
def _federation(spec: str) -> Federation:
    """One model and one encoding of the data a process, whatever the number of messages."""
    return build(RunSpec.model_validate_json(spec))


def client_of(context: Context) -> Client:
    """The client of one virtual node. Raises SpecError where Flower gave it no partition of the spec's."""
    spec = spec_from_context(context)
    federation = _federation(spec.to_json())
    number = context.node_config.get("partition-id")
    if not isinstance(number, int) or number not in federation.client.sites.indices:
        raise SpecError(
            f"partition-id = {number!r}: the spec divides its data among {len(federation.names)} clients; "
            "run Flower's simulation with num-supernodes of at most that"
        )
    sites = Sites(federation.client.sites.examples, {context.node_id: federation.client.sites.indices[number]})
    return federation.client.at(sites).affording(rank_of(spec, context.node_id))


app = client_app(client_of)
