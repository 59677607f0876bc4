"""One run's nodes, reached over the link: the coordinator's narrow protocol, and a Flower grid through `messages.py`."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from ...protocols import link
from ...protocols import link_pb2 as pb
from ...protocols.blobs import INLINE_BYTES, digest
from ...protocols.codecs import uplink_of
from ...protocols.errors import PayloadError, RunError
from ...protocols.exchange import Answer, Exchange
from ...protocols.legality import recipe_of
from ...protocols.shared import SharedAdapter
from ...protocols.spec import RunSpec
from ...protocols.update import Assignment, Description, Update
from ..admission import MAX_WEIGHT
from ..grid import Evaluated, Failure
from ..messages import MessageGrid
from .desk import Answered, Asked
from .exchanging import Exchanges
from .hub import Hub
from .stopped import POLL_SECONDS, StoppedError

logger = logging.getLogger(__name__)


class LinkGrid(MessageGrid):
    """The nodes of one run. `stopping`, once set, ends every wait with StoppedError.

    An answer is acknowledged when the caller asks for the next one: by then it has been stored, or refused. A node keeps
    what was not acknowledged, so nothing is lost between its disk and ours.

    `description` is the run's, where it has one already. From then on a node can send as many bytes as an update of the
    run has, and no more; before, as many as `result_bytes` of the limits allows.
    """

    def __init__(
        self,
        hub: Hub,
        spec: RunSpec,
        *,
        description: Description | None = None,
        stopping: threading.Event | None = None,
    ) -> None:
        super().__init__()
        self.hub, self.spec, self.minimum = hub, spec, max(1, spec.participation.minimum)
        self._described = description
        self.stopping = stopping or threading.Event()
        # Where a site's data lies is its own affair, and where the server's lies is none of the site's.
        self._spec = spec.model_copy(update={"data": None}).to_json().encode()
        self._run = spec.run.name
        self._began = time.monotonic()
        self._mailbox: queue.SimpleQueue[Answered] = queue.SimpleQueue()
        self._asked: dict[tuple[int, bytes], Assignment] = {}
        self._adopting: set[int] = set()
        self._exchanges = Exchanges(hub, spec, self._spec, self.stopping)

    def nodes(self) -> list[int]:
        """The nodes that are here; waits until there are as many as the spec's `participation.minimum`."""
        while len(found := self.hub.nodes()) < self.minimum:
            if self.stopping.wait(POLL_SECONDS):
                raise StoppedError
        return found

    def rank(self, node: int) -> int:
        """What the node said last. Those of an open round that are not back after a restart are waited for, once."""
        while (stated := self.hub.rank(node)) is None and time.monotonic() < self._began + self.hub.limits.absence:
            if self.stopping.wait(POLL_SECONDS):
                raise StoppedError
        return stated or 0

    def describe(self) -> Description:
        """The model as the first node sees it that can say so.

        Raises RunError with the reason of each where none can.
        """
        reasons = {}
        for node in self.nodes():
            self._ask(pb.DESCRIBE, [Assignment(self._run, 0, 1, node, digest(self._spec).hex(), b"")])
            for answer in self._answers(self.hub.limits.absence * 10):
                if answer.result.kind == "":
                    self._withdraw("described")
                    self._described = link.description_from_bytes(answer.payload)
                    return self._described
                reasons[node] = answer.result.reason
        raise RunError(f"no node could describe its model: {reasons or 'none answered in time'}")

    def send(self, assignments: Sequence[Assignment]) -> None:
        """Whoever sends again has dealt with what came before, and waits for no more of it."""
        self._withdraw("the round is over")
        self._ask(pb.TRAIN, assignments)

    def replies(self, timeout: float) -> Iterator[Update | Failure]:
        """Answers as they come, until all are in, `timeout` seconds have passed, or those missing are gone for good."""
        for answer in self._answers(timeout):
            yield self._read(answer)
        for node in {node for node, _ in self._withdraw("the round is over")}:
            gone = "the node has left" if self.hub.absence(node) else "no answer within the deadline"
            yield Failure(node, gone)

    def evaluate(self, assignments: Sequence[Assignment], timeout: float) -> Iterator[Evaluated | Failure]:
        """Each node's scores of the adapter in its assignment, on its own data."""
        self._withdraw("the round is over")
        self._ask(pb.EVALUATE, assignments)
        for answer in self._answers(timeout):
            weight = answer.result.weight
            if answer.result.kind == link.FAILED:
                yield Failure(answer.node, answer.result.reason)
            elif not 0 <= weight <= MAX_WEIGHT:  # one node would be the mean, or make it infinite
                yield Failure(answer.node, f"weight {weight} is not in 0 … {MAX_WEIGHT:g}")
            else:
                yield Evaluated(answer.node, weight, link.metrics(answer.result))
        self._withdraw("the round is over")

    def exchange(self, requests: Sequence[Exchange], timeout: float) -> Iterator[Answer | Failure]:
        """Answers to a zeroth-order exchange as they come, until all are in or `timeout` seconds have passed."""
        return self._exchanges.run(requests, timeout)

    def adopt(self, assignments: Sequence[Assignment], timeout: float = 0.0) -> None:
        """Hand the run's final adapter to nodes, now or whenever they come back.

        Waits up to `timeout` seconds for those that are here.
        """
        self._withdraw("the round is over")
        self._adopting = {asked.node for asked in assignments}
        self._ask(pb.ADOPT, assignments, self._adopted)
        self._asked.clear()
        deadline = time.monotonic() + timeout
        while self._adopting & set(self.hub.nodes()) and time.monotonic() < deadline:
            if self.stopping.wait(POLL_SECONDS):
                return

    def withdraw(self, reason: str) -> None:
        """The run asks nothing more: nodes forget its open questions, and what they would still answer is not wanted."""
        self._withdraw(reason)
        self._exchanges.close()

    def _adopted(self, answer: Answered) -> None:
        """In the link's thread: nobody waits for it."""
        said = answer.result.reason or dict(link.metrics(answer.result)) or "without scores"
        logger.info("node %d has the adapter of %s: %s", answer.node, self._run, said)
        self.hub.close(answer.node, [answer.result.question])
        self._adopting.discard(answer.node)

    def _ask(
        self,
        kind: pb.Kind,
        assignments: Sequence[Assignment],
        answer: Callable[[Answered], None] | None = None,
    ) -> None:
        """Ask all at once: nodes that are asked the same share its bytes."""
        payloads: dict[bytes, pb.Blob] = {}
        spec = link.blob(self._spec)
        questions = []
        for asked in assignments:
            if asked.payload not in payloads:
                payloads[asked.payload] = link.blob(asked.payload)
            question = link.question(kind, asked, spec, payloads[asked.payload])
            blobs = {spec.sha256: self._spec, question.payload.sha256: asked.payload}
            self._asked[asked.node, question.id] = asked
            most = self._most_bytes(kind, asked)
            questions.append(Asked(asked.node, question, blobs, answer or self._mailbox.put, most))
        self.hub.ask(questions)

    def _most_bytes(self, kind: pb.Kind, asked: Assignment) -> int:
        """Bytes of the largest answer. A wrong one of about that size comes in, and admission says what is wrong."""
        if kind not in (pb.DESCRIBE, pb.TRAIN):
            return INLINE_BYTES
        if kind == pb.DESCRIBE or self._described is None:
            return self.hub.limits.result_bytes
        settings, description = self.spec.recipe, self._described
        shared = SharedAdapter(recipe_of(self.spec), settings, description.layout, description.start)
        return INLINE_BYTES + uplink_of(self.spec).size(shared.sent(asked.round, asked.rank))

    def _answers(self, timeout: float) -> Iterator[Answered]:
        """Each answer to what is open, closed once the caller has dealt with it."""
        deadline = time.monotonic() + timeout
        while self._asked and (left := deadline - time.monotonic()) > 0:
            if self.stopping.is_set():
                raise StoppedError
            try:
                answer = self._mailbox.get(timeout=min(left, POLL_SECONDS))
            except queue.Empty:
                if all(self.hub.absence(node) > self.hub.limits.absence for node, _ in self._asked):
                    return
                continue
            if (answer.node, answer.result.question) not in self._asked:
                continue  # withdrawn while it was on its way
            yield answer
            del self._asked[answer.node, answer.result.question]
            self.hub.close(answer.node, [answer.result.question])

    def _withdraw(self, reason: str) -> list[tuple[int, bytes]]:
        """What nobody has answered is not asked any more."""
        left = list(self._asked)
        for node, question in left:
            self.hub.close(node, [question], reason)
        self._asked.clear()
        return left

    def _read(self, answer: Answered) -> Update | Failure:
        if answer.result.kind == link.FAILED:
            return Failure(answer.node, answer.result.reason)
        try:
            return link.update(answer.result, self._asked[answer.node, answer.result.question], answer.payload)
        except PayloadError as error:
            return Failure(answer.node, str(error))
