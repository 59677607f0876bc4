"""One run's zeroth-order exchanges over the link: frames of a few bytes, but for a node that has not heard of the run."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial

from ...protocols import link
from ...protocols import link_pb2 as pb
from ...protocols.blobs import digest
from ...protocols.errors import PayloadError, SpecError
from ...protocols.exchange import Answer, Exchange, Terms, terms_of
from ...protocols.legality import rank_for
from ...protocols.spec import RunSpec
from ...protocols.update import Assignment
from ..grid import Failure
from .desk import Answered, Asked
from .hub import Hub
from .stopped import POLL_SECONDS, StoppedError

Told = tuple[int, bytes | Failure]
"""A node, and its answer's bytes."""


class Exchanges:
    """Asks by frames whoever has answered before, and by a question, which brings the spec along, everybody else."""

    def __init__(self, hub: Hub, spec: RunSpec, spec_bytes: bytes, stopping: threading.Event) -> None:
        self.hub, self.spec, self.stopping = hub, spec, stopping
        self._blob, self._spec = link.blob(spec_bytes), spec_bytes
        self._inbox: queue.SimpleQueue[Told] = queue.SimpleQueue()
        self._told: set[int] = set()
        self._open: dict[int, bytes] = {}
        self._terms: Terms | None = None

    def run(self, requests: Sequence[Exchange], timeout: float) -> Iterator[Answer | Failure]:
        """Answers as they come. Those of an earlier exchange, which are late, are dropped."""
        self.close()
        small = {request.node: reason for request in requests if (reason := self._too_small(request.node))}
        able = [request for request in requests if request.node not in small]
        waiting = {request.node: request.number for request in able}
        frames = []
        for request in able:
            body = request.to_bytes()
            if request.node in self._told and len(body) <= link.MOST_BODY:
                frames.append((request.node, body))
            else:
                self._ask(request, body)
        self.hub.exchange(frames, self._framed)
        deadline = time.monotonic() + timeout
        yield from (Answer(r.node, r.number, "refused", reason=small[r.node]) for r in requests if r.node in small)
        while waiting and (left := deadline - time.monotonic()) > 0:
            if self.stopping.is_set():
                raise StoppedError
            try:
                node, told = self._inbox.get(timeout=min(left, POLL_SECONDS))
            except queue.Empty:
                continue
            answer = self._read(node, told)
            if isinstance(answer, Answer) and answer.number != waiting.get(node):
                continue
            if waiting.pop(node, None) is not None:
                yield answer
        self.close()

    def _too_small(self, node: int) -> str:
        """Why a node cannot hold the run's adapter; empty where it can."""
        try:
            rank_for(self.spec, self.hub.rank(node) or 0)
        except SpecError as error:
            return str(error)
        return ""

    def _read(self, node: int, body: bytes | Failure) -> Answer | Failure:
        if isinstance(body, Failure):
            self._told.discard(node)
            return body
        self._terms = self._terms or terms_of(self.spec)
        try:
            answer = Answer.from_bytes(node, body, self._terms.code.size(self._terms.directions))
        except PayloadError as error:
            return Failure(node, str(error))
        if answer.kind == "lost":
            self._told.discard(node)
        else:
            self._told.add(node)
        return answer

    def _framed(self, node: int, body: bytes | None) -> None:
        """In the link's thread."""
        self._inbox.put((node, Failure(node, "the node has left") if body is None else body))

    def _ask(self, request: Exchange, body: bytes) -> None:
        asked = Assignment(request.run, request.number, 1, request.node, digest(body).hex(), body)
        payload = link.blob(body)
        question = link.question(pb.EXCHANGE, asked, self._blob, payload)
        blobs = {self._blob.sha256: self._spec, payload.sha256: body}
        self._open[request.node] = question.id
        self.hub.ask([Asked(request.node, question, blobs, partial(self._answered, request.node))])

    def _answered(self, node: int, answer: Answered) -> None:
        """In the link's thread."""
        failed = answer.result.kind == link.FAILED
        self._inbox.put((node, Failure(node, answer.result.reason) if failed else answer.payload))

    def close(self) -> None:
        """What was asked with a question is dealt with, or too late."""
        for node, question in self._open.items():
            self.hub.close(node, [question], "the exchange is over")
        self._open.clear()
