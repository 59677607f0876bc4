"""The Flower half of a grid of ours: messages in and out of the narrow protocol, so that any ServerApp runs on it."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from ..protocols.errors import PayloadError
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
from .grid import Evaluated, Failure, NodeGrid

SERVER_NODE = 0


class MessageGrid(Grid):
    """Messages wait until they are pulled, so that those of a round go out together."""

    def __init__(self, run_id: int = 1) -> None:
        self._run_id = run_id
        self._numbers = count(1)
        self._waiting: dict[str, Message] = {}

    @abstractmethod
    def nodes(self) -> list[int]: ...

    @abstractmethod
    def rank(self, node: int) -> int: ...

    @abstractmethod
    def describe(self) -> Description: ...

    @abstractmethod
    def send(self, assignments: Sequence[Assignment]) -> None: ...

    @abstractmethod
    def replies(self, timeout: float) -> Iterator[Update | Failure]: ...

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
        numbers = []
        for asked in messages:
            numbers.append(str(next(self._numbers)))
            self._waiting[numbers[-1]] = asked
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._pull(message_ids, timeout=3600.0)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._pull(self.push_messages(messages), timeout or 3600.0)

    def _pull(self, numbers: Iterable[str], timeout: float) -> list[Message]:
        wanted = {number: self._waiting.pop(number) for number in numbers if number in self._waiting}
        training = {n: asked for n, asked in wanted.items() if asked.metadata.message_type == TRAIN}
        replies = self._train(training, timeout)
        for number, asked in wanted.items():
            if asked.metadata.message_type == DESCRIBE:
                replies.append(self._reply(number, asked, description_to_records(self.describe())))
            elif asked.metadata.message_type == RANK:
                replies.append(self._reply(number, asked, rank_to_records(self.rank(asked.metadata.dst_node_id))))
            elif number not in training:
                replies.append(self._reply(number, asked, Error(0, f"no {asked.metadata.message_type} here")))
        return replies

    def _train(self, messages: dict[str, Message], timeout: float) -> list[Message]:
        numbers: dict[int, list[str]] = {}
        assignments, replies = [], []
        for number, asked in messages.items():
            try:
                assignment = assignment_from_records(asked.content)
            except PayloadError as error:
                replies.append(self._reply(number, asked, Error(0, str(error))))
                continue
            assignments.append(assignment)
            numbers.setdefault(assignment.node, []).append(number)
        self.send(assignments)
        for reply in self.replies(timeout):
            number = numbers[reply.node].pop(0)
            content = Error(0, reply.reason) if isinstance(reply, Failure) else update_to_records(reply)
            replies.append(self._reply(number, messages[number], content))
        return replies

    def _reply(self, number: str, request: Message, content: RecordDict | Error) -> Message:
        asked = request.metadata
        metadata = Metadata(
            self._run_id, "", asked.dst_node_id, SERVER_NODE, number, asked.group_id, 0.0, asked.ttl, asked.message_type
        )
        return message(content, metadata)


class Messages(MessageGrid):
    """Any NodeGrid as a Flower grid, the inverse of `flower.FlowerGrid`. It is a NodeGrid still, of the same nodes."""

    def __init__(self, grid: NodeGrid, run_id: int = 1) -> None:
        super().__init__(run_id)
        self.grid = grid

    def nodes(self) -> list[int]:
        return list(self.grid.nodes())

    def rank(self, node: int) -> int:
        return self.grid.rank(node)

    def describe(self) -> Description:
        return self.grid.describe()

    def send(self, assignments: Sequence[Assignment]) -> None:
        self.grid.send(assignments)

    def replies(self, timeout: float) -> Iterator[Update | Failure]:
        return self.grid.replies(timeout)

    def evaluate(self, assignments: Sequence[Assignment], timeout: float) -> Iterator[Evaluated | Failure]:
        return self.grid.evaluate(assignments, timeout)
