"""What the server has asked of this node, and what came of it: it outlives the streams over which it travels."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

from ..protocols import link
from ..protocols import link_pb2 as pb
from ..protocols.blobs import Assembly, digest
from ..protocols.errors import FedaptError, PayloadError
from ..protocols.outbox import Outbox
from ..protocols.records import LONGEST_REASON
from .kept import Kept
from .stopped import StoppedWork

logger = logging.getLogger(__name__)

SHELF_BYTES = 1 << 30
"""Of blobs that nothing asks for at the moment: the run's spec, the last adapters."""

MOST_OPEN = 256
"""Questions that are open or whose answers the server has not taken. An honest one has a question a run, and an adapter
to hand over of each run that ended while this node was away."""


REST_SECONDS = 1.0
"""How often a node that rests looks whether it may go on."""


class Worker(Protocol):
    """Who does the work. Both are called one at a time, beside the stream's loop."""

    def work(self, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        """What comes of a question, and the payload that the result names. Raises FedaptError where it cannot be done."""

    def exchange(self, body: bytes) -> bytes:
        """The answer to a zeroth-order frame: there is one to each, because they are counted."""


class Duties:
    """A node's open questions, in the order in which they came. All but the work runs in the stream's loop.

    A question that was answered before is answered again from disk, and never worked on twice: no example is charged
    twice for an answer that got lost.

    A server that asks without end fills neither memory nor disk: beyond MOST_OPEN questions, or `most_bytes` of all that
    they name, a further one is refused, and what it was is not kept.

    Nothing is begun while `resting` gives a reason; `closed` hears of each question that the server has dealt with.
    """

    def __init__(
        self,
        worker: Worker,
        kept: Kept,
        *,
        most_bytes: int = 1 << 30,
        resting: Callable[[], str] = lambda: "",
        closed: Callable[[pb.Received], None] = lambda _: None,
    ) -> None:
        self.worker, self.kept, self.most_bytes = worker, kept, most_bytes
        self.resting, self.closed = resting, closed
        self._outbox: Outbox | None = None
        self._answers: Outbox | None = None
        self._open: dict[bytes, pb.Question] = {}
        self._arriving: dict[bytes, Assembly] = {}
        self._wanted: set[bytes] = set()  # on this stream: what two questions name is sent once
        self._shelf: OrderedDict[bytes, bytes] = OrderedDict()
        self._ready: asyncio.Queue[Callable[[], Callable[[], None]]] = asyncio.Queue()
        self._started: dict[bytes, pb.Question] = {}  # queued or worked on, also where it was withdrawn since
        self._payload: tuple[bytes, bytes] = b"", b""
        self.state = "idle"

    @property
    def standing(self) -> str:
        """What the server hears in each beat: why nothing is begun, or what is being done."""
        return self.resting() or self.state

    def enter(self, outbox: Outbox, answers: Outbox | None = None) -> None:
        """A stream is open: announce what is kept. What was not begun the server asks again, if it still wants it.

        Answers to zeroth-order frames go to `answers`, bare, or without it to `outbox`, framed.
        """
        self._outbox, self._answers = outbox, answers
        self._wanted.clear()
        self._open = {name: question for name, question in self._open.items() if name in self._started}
        for result in self.kept:
            self._put(pb.Up(result=result))

    def leave(self) -> None:
        self._outbox = None

    def question(self, question: pb.Question) -> None:
        """Do what is asked, once its blobs are here."""
        if question.id in self._started:  # also where it was withdrawn meanwhile: its result is wanted after all
            self._open[question.id] = question
            return
        found = self.kept.find(question.id)
        if found is not None:
            self._put(pb.Up(result=found[0]))
            return
        reason = self._too_much(question)
        self._open[question.id] = question
        if reason:
            self._done(_failed(question, reason), b"")
        else:
            self._begin(question)

    def chunk(self, chunk: pb.Chunk) -> None:
        assembly = self._arriving.get(chunk.sha256)
        if assembly is None:
            return
        fits = assembly.add(chunk.offset, chunk.data)
        if assembly.complete:
            self._forget(chunk.sha256)
            self._store(chunk.sha256, assembly.take())
            for question in [q for q in self._open.values() if q.id not in self._started]:
                self._begin(question)
        elif not fits:
            self._want(assembly)

    def want(self, want: pb.Want) -> None:
        """Send a kept result's payload."""
        if self._payload[0] != want.sha256:
            found = next((r for r in self.kept if r.payload.sha256 == want.sha256), None)
            whole = None if found is None else self.kept.find(found.question)
            if whole is None:
                return
            self._payload = want.sha256, whole[1]
        if self._outbox is not None:
            self._outbox.send(want.sha256, self._payload[1], want.offset)

    def received(self, received: pb.Received) -> None:
        """The server has dealt with a question: nothing of it is needed any more."""
        if received.reason:
            logger.info("a question is closed: %s", received.reason)
        self._open.pop(received.question, None)
        self.kept.drop(received.question)
        for sha256 in set(self._arriving) - self._needed():
            self._forget(sha256)
        self.closed(received)

    def exchange(self, body: bytes) -> None:
        """Raises PayloadError where too much waits: each frame has to be answered, so the stream ends instead."""
        if self._ready.qsize() >= 2 * MOST_OPEN:
            raise PayloadError(f"{self._ready.qsize()} questions and frames wait for this node")
        self._ready.put_nowait(partial(self._exchange, body, self._outbox))

    async def run(self) -> None:
        """Work on what is ready, for ever: one thing at a time, because there is one model.

        Returns where the work was called off (StoppedWork).
        """
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "work") as thread:
            while True:
                work = await self._ready.get()
                while self.resting():
                    await asyncio.sleep(REST_SECONDS)
                try:
                    deliver = await loop.run_in_executor(thread, work)
                except StoppedWork:
                    return
                deliver()

    def _begin(self, question: pb.Question) -> None:
        """Ask for the blobs that are missing; queue the question when there are none."""
        missing = [blob for blob in (question.spec, question.payload) if not self._known(blob)]
        for blob in missing:
            assembly = self._arriving.setdefault(blob.sha256, Assembly(blob.sha256, blob.size))
            if blob.sha256 not in self._wanted:
                self._wanted.add(blob.sha256)
                self._want(assembly)
        if not missing:
            self._started[question.id] = question
            spec, payload = self._shelf[question.spec.sha256], self._shelf[question.payload.sha256]
            self._ready.put_nowait(partial(self._work, question, spec, payload))

    def _too_much(self, question: pb.Question) -> str:
        """Why there is no room for one question more; empty where there is."""
        held = {question.id: question} | self._open | self._started
        if (count := len(held) + len(self.kept)) > MOST_OPEN:
            return f"{count} questions are open, or answered and not acknowledged; at most {MOST_OPEN} are taken"
        sizes = {blob.sha256: blob.size for one in held.values() for blob in (one.spec, one.payload)}
        if (named := sum(sizes.values())) > self.most_bytes:
            return f"open questions name {named} bytes; at most {self.most_bytes} are taken"
        return ""

    def _known(self, blob: pb.Blob) -> bool:
        if blob.inline or blob.size == 0:
            self._store(blob.sha256, blob.inline)
        return blob.sha256 in self._shelf

    def _store(self, sha256: bytes, data: bytes) -> None:
        """Keep a blob; the oldest that no open question names make room."""
        self._shelf[sha256] = data
        self._shelf.move_to_end(sha256)
        needed = self._needed() | {sha256}
        held = sum(map(len, self._shelf.values()))
        for old in [old for old in self._shelf if old not in needed]:
            if held <= SHELF_BYTES:
                return
            held -= len(self._shelf.pop(old))

    def _needed(self) -> set[bytes]:
        return {blob.sha256 for question in self._open.values() for blob in (question.spec, question.payload)}

    def _forget(self, sha256: bytes) -> None:
        """A blob that is here, or that nothing open names any more, arrives no longer."""
        del self._arriving[sha256]
        self._wanted.discard(sha256)

    def _work(self, question: pb.Question, spec: bytes, payload: bytes) -> Callable[[], None]:
        """In the work's thread: do it, and return what is left to do in the loop. What was withdrawn is not begun."""
        if question.id not in self._open:
            return partial(self._skipped, question.id)
        self.state = f"{pb.Kind.Name(question.kind).lower()} {question.run} round {question.round}"
        try:
            result, answer = self.worker.work(question, spec, payload)
        except FedaptError as error:
            logger.warning("%s: %s", self.state, error)
            result, answer = _failed(question, str(error)), b""
        except Exception as error:  # a resident process outlives it; what it was may name rows and paths of this site
            logger.exception("%s failed", self.state)
            result, answer = _failed(question, f"{type(error).__name__} at this site"), b""
        self.state = "idle"
        try:
            self.kept.keep(result, answer)
        except OSError as error:  # it can still be sent, and is lost if this process ends before
            logger.error("a result cannot be kept on disk: %s", error)
        return partial(self._done, result, answer)

    def _skipped(self, question: bytes) -> None:
        self._started.pop(question, None)
        if question in self._open:  # asked again meanwhile
            self._begin(self._open[question])

    def _done(self, result: pb.Result, payload: bytes) -> None:
        self._started.pop(result.question, None)
        if self._open.pop(result.question, None) is None:  # withdrawn while it was worked on
            self.kept.drop(result.question)
            return
        self._payload = result.payload.sha256, payload
        self._put(pb.Up(result=result))

    def _exchange(self, body: bytes, outbox: Outbox | None) -> Callable[[], None]:
        return partial(self._answered, self.worker.exchange(body), outbox)

    def _answered(self, answer: bytes, outbox: Outbox | None) -> None:
        """The server counts answers on each stream: one that was asked over another is not told."""
        if outbox is not self._outbox:
            return
        if self._answers is None:
            self._put(pb.Up(answer=pb.Answer(body=answer)))
        else:
            self._answers.put(answer)

    def _want(self, assembly: Assembly) -> None:
        self._put(pb.Up(want=pb.Want(sha256=assembly.sha256, offset=assembly.have)))

    def _put(self, frame: pb.Up) -> None:
        if self._outbox is None:
            return
        try:
            self._outbox.put(frame.SerializeToString())
        except OverflowError:  # the stream ends with its next beat; the work goes on
            self._outbox = None


def _failed(question: pb.Question, reason: str) -> pb.Result:
    empty = pb.Blob(sha256=digest(b""))
    return pb.Result(question=question.id, kind=link.FAILED, reason=reason[:LONGEST_REASON], payload=empty)
