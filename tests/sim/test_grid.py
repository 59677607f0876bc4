"""LocalGrid spoken to in two ways: through the coordinator's narrow protocol, and by Flower messages to an adapter."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, Metadata, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.server.utils.validator import validate_message
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from safetensors.numpy import load_file

from fedapt.client.app import client_app
from fedapt.outputs import spec_toml
from fedapt.protocols.codecs import CODECS
from fedapt.protocols.errors import RunError, SpecError
from fedapt.protocols.legality import rank_of
from fedapt.protocols.records import (
    DESCRIBE,
    EVALUATE,
    TRAIN,
    assignment_to_records,
    description_from_records,
    rank_to_records,
    update_from_records,
)
from fedapt.protocols.records import message as message_of
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Assignment, Update, version_of
from fedapt.server import app as server
from fedapt.server.app import server_app
from fedapt.server.coordinator import Coordinator
from fedapt.server.flower import FlowerGrid, read_rank, read_reply
from fedapt.server.grid import Failure, NodeGrid
from fedapt.server.messages import Messages
from fedapt.server.store import MemoryStore
from fedapt.sim.federation import Federation, build
from fedapt.sim.grid import PORTION, LocalGrid

SpecOf = Callable[..., RunSpec]

# peft asks transformers for an attribute that transformers has renamed.


@pytest.fixture(scope="module")
def spec(spec_of: SpecOf) -> RunSpec:
    return spec_of()


@pytest.fixture(scope="module")
def federation(spec: RunSpec) -> Federation:
    return build(spec)


@pytest.fixture
def grid(federation: Federation) -> Messages:
    return Messages(LocalGrid(federation.client), run_id=77)


def assignments(federation: Federation) -> list[Assignment]:
    """Round 1 for every node."""
    client = federation.client
    state, downlink = client.shared.initial_state(), client.shared.delivered(1)
    payload = CODECS["fp32"].encode(state, downlink, 0)
    return [Assignment("run", 1, 1, node, version_of(downlink, state), payload) for node in client.nodes()]


def messages(grid: Messages, asked: list[Assignment]) -> list[Message]:
    return [grid.create_message(assignment_to_records(a), TRAIN, a.node, "1") for a in asked]


def test_it_is_a_grid_in_both_ways(grid: Messages, federation: Federation) -> None:
    assert isinstance(grid, Grid)
    assert isinstance(grid, NodeGrid)
    assert isinstance(grid.grid, NodeGrid)
    assert not isinstance(grid.grid, Grid), "a simulation knows nothing of Flower"
    assert isinstance(FlowerGrid(grid), NodeGrid)
    assert list(grid.get_node_ids()) == grid.nodes() == federation.client.nodes()
    assert grid.run.run_id == 77


def test_messages_and_the_narrow_protocol_give_the_same_updates(grid: Messages, federation: Federation) -> None:
    asked, local = assignments(federation), LocalGrid(federation.client)
    local.send(asked)
    narrow = list(local.replies(60.0))
    assert [update.node for update in narrow] == [a.node for a in asked]
    assert list(local.replies(60.0)) == [], "an assignment is answered once"
    grid.send(asked)
    assert list(grid.replies(60.0)) == narrow
    replies = grid.send_and_receive(messages(grid, asked))
    assert [update_from_records(reply.content) for reply in replies] == narrow
    adapter = FlowerGrid(grid)
    adapter.send(asked)
    assert list(adapter.replies(60.0)) == narrow
    assert list(adapter.replies(0.0)) == []


def test_replies_name_what_they_answer(grid: Messages, federation: Federation) -> None:
    sent = messages(grid, assignments(federation))
    numbers = list(grid.push_messages(sent))
    assert len(set(numbers)) == len(sent)
    first = list(grid.pull_messages(numbers[:2]))
    rest = list(grid.pull_messages(numbers))
    assert [reply.metadata.reply_to_message_id for reply in first + rest] == numbers
    assert list(grid.pull_messages(numbers)) == []
    for reply, message in zip(first + rest, sent, strict=True):
        assert (reply.metadata.run_id, reply.metadata.group_id, reply.metadata.message_type) == (77, "1", TRAIN)
        assert reply.metadata.src_node_id == message.metadata.dst_node_id
        assert reply.metadata.dst_node_id == message.metadata.src_node_id


def test_a_description_travels_whole(grid: Messages, federation: Federation) -> None:
    own = federation.client.describe()
    (reply,) = grid.send_and_receive([grid.create_message(RecordDict(), DESCRIBE, 0, "")])
    for description in (grid.describe(), FlowerGrid(grid).describe(), description_from_records(reply.content)):
        assert description.version == own.version
        assert description.base == own.base
        # JSON has no tuples and no enums: what is written to adapter_config.json is what counts.
        assert json.loads(json.dumps(dict(description.config))) == json.loads(json.dumps(dict(own.config)))


def test_what_is_no_assignment_is_an_error_of_its_own_message(grid: Messages, federation: Federation) -> None:
    good, *_ = messages(grid, assignments(federation))
    empty = grid.create_message(RecordDict({"assignment": ConfigRecord({"run": "run"})}), TRAIN, 1, "1")
    other = grid.create_message(RecordDict(), EVALUATE, 2, "1")
    replies = {reply.metadata.src_node_id: read_reply(reply) for reply in grid.send_and_receive([empty, other, good])}
    assert replies.pop(1) == Failure(1, "round = None in a message: int expected")
    assert replies.pop(2) == Failure(2, "no evaluate here")
    (update,) = replies.values()
    assert isinstance(update, Update)


def test_an_update_in_anothers_name_is_a_failure(grid: Messages, federation: Federation) -> None:
    first, second, *_ = assignments(federation)
    message = grid.create_message(assignment_to_records(first), TRAIN, second.node, "1")
    (reply,) = grid.send_and_receive([message])
    assert read_reply(reply) == Failure(second.node, f"the update names node {first.node}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe.name=fedsvd", "recipe.optimizer=nesterov", "wire.codec=int8"],
        ["recipe.name=flexlora", "wire.downlink=bf16", "local.optimizer=adamw", "local.learning_rate=0.01"],
        [
            "recipe.name=flora",
            "adapter.ranks=[1, 2, 4]",
            "recipe.aggregator=geometric-median",
            "recipe.weighting=uniform",
        ],
        ["recipe.name=refresh", "recipe.period=1", "wire.codec=fp4"],
        ["recipe.name=fedex", "recipe.budget=6"],
        ["recipe.name=rolora", "recipe.aggregator=median", "recipe.weighting=uniform"],
        ["recipe.name=fedsvd", "wire.codec=top-k", "wire.density=0.3"],
    ],
    ids=lambda overrides: " ".join(override.partition("=")[2] for override in overrides),
)
def test_the_final_adapter_is_the_same(spec: RunSpec, overrides: list[str]) -> None:
    spec = spec.set(*overrides, "adapter.dropout=0.1", "participation.sampling=fixed", "participation.rate=0.7")
    client = build(spec).client
    finals = []
    for wrap in (LocalGrid, lambda client: FlowerGrid(Messages(LocalGrid(client)))):
        nodes = wrap(client.under(spec))  # without what top-k kept back in the other run
        coordinator = Coordinator(spec, nodes, MemoryStore())
        rows = [{**row, "seconds": 0} for row in coordinator.rounds()]
        finals.append((coordinator.adapter().tobytes(), rows))
    assert finals[0] == finals[1]
    assert finals[0][0] != client.start.tobytes()


def test_a_virtual_node_states_the_rank_that_is_drawn_for_it(spec: RunSpec, federation: Federation) -> None:
    mixed = spec.set("recipe.name=flora", "adapter.ranks=[1, 2, 4]")
    grid = Messages(LocalGrid(federation.client.under(mixed)))
    drawn = [rank_of(mixed, node) for node in grid.nodes()]
    assert len(set(drawn)) > 1
    assert [grid.rank(node) for node in grid.nodes()] == drawn
    messages = FlowerGrid(grid)
    assert [messages.rank(node) for node in grid.nodes()] == drawn
    assert {FlowerGrid(Messages(LocalGrid(federation.client))).rank(node) for node in grid.nodes()} == {0}


@pytest.mark.parametrize("content", [Error(0, "no query.rank here"), RecordDict(), rank_to_records(-1)])
def test_a_reply_without_a_rank_states_none(content: RecordDict | Error) -> None:
    assert read_rank(message_of(content, Metadata(77, "", 5, 0, "1", "", 0.0, 60.0, "query.rank"))) == 0


def test_a_large_round_comes_in_portions(federation: Federation, monkeypatch: Any) -> None:
    sizes: list[int] = []

    def train(asked: list[Assignment]) -> list[Assignment]:
        sizes.append(len(asked))
        return asked

    grid = LocalGrid(federation.client)
    counting = {"train": staticmethod(train), "together": staticmethod(lambda: 100)}
    monkeypatch.setattr(grid, "client", type("Counting", (), counting)())
    asked = assignments(federation)[:1] * (2 * PORTION + 5)
    grid.send(asked)
    replies = grid.replies(1.0)
    next(replies)
    assert len(sizes) == 1, "answers come before the whole round is trained"
    assert 1 + len(list(replies)) == len(asked)
    assert (sum(sizes), len(sizes)) == (len(asked), 4)
    assert max(sizes) <= min(sizes) + 1 <= PORTION, "parts of like size, so that workers end together"


def context(spec: RunSpec, **config: str) -> Context:
    return Context(77, 0, {}, RecordDict(), {"spec": spec_toml(spec), **config})


class MessagesOnly:
    """A Flower grid that has nothing of the narrow protocol, as Flower's own have not."""

    def __init__(self, grid: Messages) -> None:
        self.run, self.get_node_ids = grid.run, grid.get_node_ids
        self.push_messages, self.pull_messages = grid.push_messages, grid.pull_messages
        self.send_and_receive = grid.send_and_receive


@pytest.mark.parametrize("wrap", [lambda grid: grid, MessagesOnly], ids=["narrow", "messages"])
def test_the_server_app_runs_on_it(
    spec: RunSpec, federation: Federation, grid: Messages, tmp_path: Path, wrap: Callable[[Messages], Any]
) -> None:
    server.app(grid=wrap(grid), context=context(spec, out=str(tmp_path / "adapter")))
    expected = Coordinator(spec, LocalGrid(federation.client), MemoryStore())
    rows = list(expected.rounds())
    assert len(rows) == 2
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, tensor in expected.layout.split(expected.adapter()).items():
        assert np.array_equal(tensors[name], tensor)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["peft_type"]) == (4, "LORA")


def test_a_server_app_of_ones_own_store_and_evaluation(
    spec: RunSpec, federation: Federation, grid: Messages, tmp_path: Path
) -> None:
    store = MemoryStore()
    server_app(store, federation.evaluate)(grid=grid, context=context(spec))
    rows = store.rows("run")
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert all("accuracy" in row["evaluation"] for row in rows)
    assert not (tmp_path / "adapter").exists()


def test_who_is_connected_is_no_public_number_of_clients(spec: RunSpec, grid: Messages) -> None:
    private = spec.set(
        "recipe.name=ffa", "recipe.weighting=uniform", "privacy.unit=client", "privacy.epsilon=6", "local.optimizer=sgd"
    )
    with pytest.raises(SpecError, match=r"run: privacy\.population is missing"):
        server.app(grid=cast(Grid, MessagesOnly(grid)), context=context(private))


class Slow:
    """A grid of which some nodes never answer, and which takes some messages not at all."""

    def __init__(self, grid: Messages, silent: set[str]) -> None:
        self.grid, self.silent, self.run = grid, silent, grid.run

    def get_node_ids(self) -> list[int]:
        return []

    def push_messages(self, sent: list[Message]) -> Iterator[str]:
        numbers = list(self.grid.push_messages(sent))
        return iter(["", *numbers[1:]])

    def pull_messages(self, numbers: list[str]) -> list[Message]:
        assert "" not in numbers
        return list(self.grid.pull_messages([number for number in numbers if number not in self.silent]))


def test_a_deadline_ends_the_waiting(grid: Messages, federation: Federation) -> None:
    asked = assignments(federation)
    nodes = FlowerGrid(cast(Grid, Slow(grid, {"2", "3"})), wait_seconds=0.01)
    nodes.send(asked)
    assert [reply.node for reply in nodes.replies(0.3)] == [a.node for a in asked[3:]]
    with pytest.raises(RunError, match=r"no node has connected within 0\.01 s"):
        nodes.describe()


class Wire:
    """Flower's deployment in small: messages are checked and serialized as a SuperLink does, and a ClientApp answers."""

    def __init__(self, federation: Federation) -> None:
        self.run = Run.create_empty(77)
        self.app = client_app(lambda _: federation.client)
        self.replies: dict[str, Message] = {}

    def push_messages(self, sent: list[Message]) -> list[str]:
        for message in sent:
            message.metadata.__dict__["_message_id"] = message.object_id
            assert validate_message(message, is_reply_message=False) == []
            assert message.metadata.run_id == self.run.run_id
            assert message.metadata.src_node_id == SUPERLINK_NODE_ID
            received = message_from_proto(message_to_proto(message))
            reply = self.app(received, Context(77, received.metadata.dst_node_id, {}, RecordDict(), {}))
            self.replies[message.object_id] = message_from_proto(message_to_proto(reply))
        return [message.object_id for message in sent]

    def pull_messages(self, numbers: list[str]) -> list[Message]:
        return [self.replies.pop(number) for number in numbers]

    def send_and_receive(self, sent: list[Message], *, timeout: float) -> list[Message]:
        return self.pull_messages(self.push_messages(sent))

    def get_node_ids(self) -> list[int]:
        return [5, 1]


def test_the_same_messages_suit_flowers_wire_and_its_client_app(federation: Federation) -> None:
    """Node 0 is left out: outside a simulation Flower has none of that number."""
    asked = [a for a in assignments(federation) if a.node > 0]
    grid = LocalGrid(federation.client)
    grid.send(asked)
    together = list(grid.replies(60.0))
    wire = FlowerGrid(cast(Grid, Wire(federation)))
    wire.send(asked)
    for alone, expected in zip(wire.replies(60.0), together, strict=True):
        assert isinstance(alone, Update)
        assert replace(alone, payload=b"", metrics={}) == replace(expected, payload=b"", metrics={})
        assert alone.metrics == pytest.approx(expected.metrics, rel=1e-5)
        one, other = (np.frombuffer(update.payload, np.float32) for update in (alone, expected))
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)
    assert wire.describe().version == federation.client.describe().version


def test_what_a_flower_node_states(federation: Federation) -> None:
    """All nodes are asked together, once; who says nothing that can be read may be any."""

    seen: list[int] = []

    class Counting(Wire):
        def push_messages(self, sent: list[Message]) -> list[str]:
            seen.extend(message.metadata.dst_node_id for message in sent)
            return super().push_messages(sent)

    wire = Counting(replace(federation, client=federation.client.affording(2)))
    nodes = FlowerGrid(cast(Grid, wire))
    assert [nodes.rank(node) for node in (5, 1, 5)] == [2, 2, 2]
    assert sorted(seen) == [1, 5]
    (asked,) = [a for a in assignments(federation) if a.node == 5]
    nodes.send([asked])
    (refused,) = nodes.replies(60.0)
    assert isinstance(refused, Update)
    assert refused.kind == "refused"
    assert refused.reason.endswith("this node can afford 2 (most_rank)")

    class Silent(Wire):
        def send_and_receive(self, sent: list[Message], *, timeout: float) -> list[Message]:
            return []

    assert FlowerGrid(cast(Grid, Silent(federation))).rank(1) == 0
