"""Any Flower grid as a NodeGrid: what the coordinator asks of nodes becomes messages, and their replies updates."""

import logging
import time
from collections.abc import Iterator, Sequence

from flwr.app import DEFAULT_TTL, Message, Metadata, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid

from ..protocols.errors import PayloadError, RunError
from ..protocols.records import (
    DESCRIBE,
    EVALUATE,
    RANK,
    TRAIN,
    assignment_to_records,
    description_from_records,
    evaluation_from_records,
    message,
    rank_from_records,
    update_from_records,
)
from ..protocols.update import Assignment, Description, Update
from .grid import Evaluated, Failure

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05


class FlowerGrid:
    """Any Flower grid (SuperLink, Flower's simulation) as a NodeGrid."""

    def __init__(self, grid: Grid, wait_seconds: float = 60.0, minimum: int = 1) -> None:
        self.grid, self.wait_seconds, self.minimum = grid, wait_seconds, minimum
        self._pending: list[str] = []
        self._ranks: dict[int, int] = {}

    def nodes(self) -> list[int]:
        deadline = time.monotonic() + self.wait_seconds
        while len(found := sorted(self.grid.get_node_ids())) < self.minimum and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return found

    def rank(self, node: int) -> int:
        """Asked once of all nodes together. One that does not answer may be any: its client refuses what it cannot afford."""
        if node not in self._ranks:
            nodes = [number for number in {*self.grid.get_node_ids(), node} if number not in self._ranks]
            questions = [self._message(RecordDict(), number, RANK) for number in nodes]
            replies = self.grid.send_and_receive(questions, timeout=self.wait_seconds)
            self._ranks |= dict.fromkeys(nodes, 0) | {r.metadata.src_node_id: read_rank(r) for r in replies}
        return self._ranks[node]

    def describe(self) -> Description:
        nodes = self.nodes()
        if not nodes:
            raise RunError(f"no node has connected within {self.wait_seconds:g} s; start one and try again")
        question = self._message(RecordDict(), nodes[0], DESCRIBE)
        for reply in self.grid.send_and_receive([question], timeout=self.wait_seconds * 10):
            if reply.has_error():
                raise RunError(f"node {nodes[0]} could not describe its model: {reply.error.reason}")
            return description_from_records(reply.content)
        raise RunError(f"node {nodes[0]} did not describe its model in time")

    def send(self, assignments: Sequence[Assignment]) -> None:
        messages = [self._message(assignment_to_records(a), a.node, TRAIN, str(a.round)) for a in assignments]
        # Flower gives no id to a message that it could not take.
        self._pending = [number for number in self.grid.push_messages(messages) if number]

    def replies(self, timeout: float) -> Iterator[Update | Failure]:
        deadline = time.monotonic() + timeout
        pending = dict.fromkeys(self._pending)  # in the order of sending, so that a local grid sees the same cohort
        while pending and time.monotonic() < deadline:
            for reply in self.grid.pull_messages(list(pending)):
                pending.pop(reply.metadata.reply_to_message_id, None)
                yield read_reply(reply)
            if pending:
                time.sleep(POLL_SECONDS)

    def evaluate(self, assignments: Sequence[Assignment], timeout: float) -> Iterator[Evaluated | Failure]:
        messages = [self._message(assignment_to_records(a), a.node, EVALUATE, str(a.round)) for a in assignments]
        for reply in self.grid.send_and_receive(messages, timeout=timeout):
            yield read_evaluation(reply)

    def _message(self, content: RecordDict, node: int, message_type: str, group: str = "") -> Message:
        created, run = time.time(), self.grid.run.run_id
        return message(
            content, Metadata(run, "", SUPERLINK_NODE_ID, node, "", group, created, DEFAULT_TTL, message_type)
        )


def read_rank(reply: Message) -> int:
    """The largest rank that a node can afford, as its reply has it; 0 (any) where it states none."""
    if reply.has_error():  # a client that was written before nodes could state it
        return 0
    try:
        return rank_from_records(reply.content)
    except PayloadError as error:
        logger.warning("node %d states no rank: %s", reply.metadata.src_node_id, error)
        return 0


def read_reply(reply: Message) -> Update | Failure:
    """A reply as an Update of the node it came from, or as a Failure that says why it is none."""
    node = reply.metadata.src_node_id
    if reply.has_error():
        return Failure(node, reply.error.reason or f"error {reply.error.code}")
    try:
        update = update_from_records(reply.content)
    except PayloadError as error:
        return Failure(node, str(error))
    if update.node != node:
        return Failure(node, f"the update names node {update.node}")
    return update


def read_evaluation(reply: Message) -> Evaluated | Failure:
    """A reply as the scores of the node it came from, or as a Failure that says why it holds none."""
    node = reply.metadata.src_node_id
    if reply.has_error():
        return Failure(node, reply.error.reason or f"error {reply.error.code}")
    try:
        weight, metrics = evaluation_from_records(reply.content)
    except PayloadError as error:
        return Failure(node, str(error))
    return Evaluated(node, weight, metrics)
