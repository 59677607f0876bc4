"""The grid of a simulation: all nodes live in this process, and a whole round is one call of `client.train`."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, pairwise

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from ..client.client import Client
from ..client.exchanger import Exchanger
from ..client.slopes import exchanger_of
from ..protocols.errors import PayloadError
from ..protocols.exchange import Answer, Exchange
from ..protocols.legality import rank_of
from ..protocols.records import (
    DESCRIBE,
    RANK,
    TRAIN,
    assignment_from_records,
    description_to_records,
    message,
    rank_to_records,
    update_to_records,
)
from ..protocols.update import Assignment, Description, Update
from ..server.grid import Evaluated

SERVER_NODE = 0
PORTION = 16
"""Assignments trained in one call, at most: enough for one full cohort of small clients, few enough to share out."""


def portions(assignments: Sequence[Assignment]) -> list[Sequence[Assignment]]:
    """A round in parts of like size, in order, which depend on nothing but their number: not on who trains them."""
    count = -(-len(assignments) // PORTION)
    bounds = [len(assignments) * part // max(1, count) for part in range(count + 1)]
    return [assignments[first:last] for first, last in pairwise(bounds)]


class LocalGrid(Grid):
    """A Flower grid in one process, and the coordinator's narrow protocol (`server.grid.NodeGrid`) without messages.

    Both ways give `client.train` the same assignments; a test holds them equal.
    """

    def __init__(self, client: Client, run_id: int = 1) -> None:
        self.client = client
        self._run_id = run_id
        self._numbers = count(1)
        self._sent: list[Assignment] = []
        self._mailbox: dict[str, Message] = {}
        self._exchanger: Exchanger | None = None

    def nodes(self) -> list[int]:
        return self.client.nodes()

    def rank(self, node: int) -> int:
        """One of `adapter.ranks` by key: what a virtual node can afford."""
        return rank_of(self.client.spec, node)

    def describe(self) -> Description:
        return self.client.describe()

    def send(self, assignments: Sequence[Assignment]) -> None:
        self._sent = list(assignments)

    def replies(self, timeout: float) -> Iterator[Update]:
        """Trains a portion of the round at a time. Virtual clients share this process, so there is no deadline."""
        sent, self._sent = self._sent, []
        for portion in portions(sent):
            yield from self.client.train(portion)

    def exchange(self, requests: Sequence[Exchange], timeout: float) -> Iterator[Answer]:
        """Answers to an exchange of codes (`server.exchanges.ExchangeGrid`): all nodes are one cohort."""
        if self._exchanger is None:
            self._exchanger = exchanger_of(self.client)
        yield from self._exchanger.answer(requests)

    def evaluate(self, assignments: Sequence[Assignment], timeout: float) -> Iterator[Evaluated]:
        for asked in assignments:
            self.client.load(asked)
            scores = self.client.evaluate(asked.node)
            yield Evaluated(asked.node, float(len(scores.loss)), scores.metrics(self.client.adapted.task))

    def set_run(self, run: Run) -> None:
        self._run_id = run.run_id

    @property
    def run(self) -> Run:
        return Run.create_empty(self._run_id)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        metadata = Metadata(self._run_id, "", SERVER_NODE, dst_node_id, "", group_id, 0.0, ttl or 3600.0, message_type)
        return message(content, metadata)

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Messages wait until they are pulled, so that those of a round become one cohort."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = {number: self._mailbox.pop(number) for number in message_ids if number in self._mailbox}
        training = {n: m for n, m in wanted.items() if m.metadata.message_type == TRAIN}
        replies = self._train(training)
        for number, asked in wanted.items():
            if asked.metadata.message_type == DESCRIBE:
                replies.append(self._reply(number, asked, description_to_records(self.describe())))
            elif asked.metadata.message_type == RANK:
                replies.append(self._reply(number, asked, rank_to_records(self.rank(asked.metadata.dst_node_id))))
            elif number not in training:
                replies.append(self._reply(number, asked, Error(0, f"no {asked.metadata.message_type} here")))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _push(self, message: Message) -> str:
        number = str(next(self._numbers))
        self._mailbox[number] = message
        return number

    def _train(self, messages: dict[str, Message]) -> list[Message]:
        assignments: dict[str, Assignment] = {}
        replies = []
        for number, asked in messages.items():
            try:
                assignments[number] = assignment_from_records(asked.content)
            except PayloadError as error:
                replies.append(self._reply(number, asked, Error(0, str(error))))
        updates = self.client.train(list(assignments.values()))
        for number, update in zip(assignments, updates, strict=True):
            replies.append(self._reply(number, messages[number], update_to_records(update)))
        return replies

    def _reply(self, number: str, request: Message, content: RecordDict | Error) -> Message:
        asked = request.metadata
        metadata = Metadata(
            self._run_id, "", asked.dst_node_id, SERVER_NODE, number, asked.group_id, 0.0, asked.ttl, asked.message_type
        )
        return message(content, metadata)
