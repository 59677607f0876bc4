"""What is asked of one node and what comes back: it outlives the node's streams, so a broken one goes on where it was."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...protocols import link
from ...protocols import link_pb2 as pb
from ...protocols.blobs import INLINE_BYTES, Assembly
from ...protocols.errors import PayloadError
from ...protocols.outbox import Outbox
from .limits import Limits


@dataclass(frozen=True)
class Answered:
    """A result that is whole. The node keeps it until the question is closed."""

    node: int
    result: pb.Result
    payload: bytes = field(repr=False)


@dataclass(frozen=True)
class Asked:
    """A question for a node, the blobs that it names, and who waits for the answer (called in the link's thread).

    `most_bytes` is how large the answer's payload can be, if it is one: more is not let in. What comes inline is in the
    frame already.
    """

    node: int
    question: pb.Question
    blobs: Mapping[bytes, bytes] = field(repr=False)
    answer: Callable[[Answered], None]
    most_bytes: int = INLINE_BYTES


class Desk:
    """One node's open questions. All methods run in the link's thread.

    `rank` is the largest that the node said it can afford (0: any), with its last Hello; None: it was not here yet.
    """

    def __init__(self, node: int, limits: Limits) -> None:
        self.node, self.limits = node, limits
        self.rank: int | None = None
        self._outbox: Outbox | None = None
        self._left = time.monotonic()
        self._questions: dict[bytes, Asked] = {}
        self._answered: set[bytes] = set()
        self._arriving: dict[bytes, tuple[pb.Result, Assembly]] = {}
        self._garbled: set[bytes] = set()
        self._exchanges: deque[Callable[[bytes | None], None]] = deque()
        self.state = ""

    @property
    def present(self) -> bool:
        return self._outbox is not None

    @property
    def rests(self) -> bool:
        """Whether the node has said that it takes no work for now."""
        return self.state in link.RESTING

    @property
    def absence(self) -> float:
        """Seconds since the node's last stream ended; 0 while it has one."""
        return 0.0 if self.present else time.monotonic() - self._left

    def enter(self, outbox: Outbox, rank: int = 0) -> None:
        """The node has opened a stream: what is open is asked again."""
        self._cut_off()
        self._outbox, self.rank = outbox, rank
        for asked in self._questions.values():
            self._put(pb.Down(question=asked.question))

    def leave(self, outbox: Outbox) -> None:
        """A stream has ended; another may have taken its place before."""
        if self._outbox is outbox:
            self._left = time.monotonic()  # first: other threads read `absence`
            self._outbox = None
            self._cut_off()

    def ask(self, asked: Asked) -> None:
        """Ask, or ask again for somebody else: an answer that has come counts for the one who asked last."""
        self._answered.discard(asked.question.id)
        self._questions[asked.question.id] = asked
        self._put(pb.Down(question=asked.question))

    def close(self, question: bytes, reason: str = "") -> None:
        """The question is dealt with: the node may forget its result, or need not work on it any more."""
        asked = self._questions.pop(question, None)
        if asked is None:
            return
        self._answered.discard(question)
        self._arriving.pop(question, None)
        self._garbled.discard(question)
        if self._outbox is not None:
            for sha256 in asked.blobs:
                if not any(sha256 in other.blobs for other in self._questions.values()):
                    self._outbox.forget(sha256)
        self._put(pb.Down(received=pb.Received(question=question, reason=reason)))

    def exchange(self, body: bytes, deliver: Callable[[bytes | None], None]) -> None:
        """Send a zeroth-order frame. `deliver` gets its answer, or None where the node is not here or leaves before.

        A node answers each frame, in their order: so an answer need not say what it answers.
        """
        if self._outbox is None:
            deliver(None)
            return
        self._exchanges.append(deliver)
        self._put(pb.Down(exchange=pb.Exchange(body=body)))

    def answer(self, body: bytes) -> None:
        """Raises PayloadError for an answer to nothing."""
        if not self._exchanges:
            raise PayloadError("an answer to no exchange")
        self._exchanges.popleft()(body)

    def want(self, want: pb.Want) -> None:
        """Send a blob of an open question; others are not for this node to see."""
        for asked in self._questions.values():
            data = asked.blobs.get(want.sha256)
            if data is not None and self._outbox is not None:
                self._outbox.send(want.sha256, data, want.offset)
                return

    def result(self, result: pb.Result) -> None:
        """A result has been announced: ask for what is missing of its bytes."""
        if result.question not in self._questions:
            self._put(
                pb.Down(received=pb.Received(question=result.question, reason="stale: this is not asked any more"))
            )
        elif result.question not in self._answered:
            self._announced(result)

    def chunk(self, chunk: pb.Chunk) -> None:
        """A piece of a result. Pieces of what nobody waits for are dropped."""
        for question, (result, assembly) in list(self._arriving.items()):  # two results can have the same bytes
            if assembly.sha256 == chunk.sha256:
                self._take(question, result, assembly, chunk)

    def _cut_off(self) -> None:
        """What was exchanged over a stream that has ended is not answered any more."""
        while self._exchanges:
            self._exchanges.popleft()(None)

    def _announced(self, result: pb.Result) -> None:
        needed, most = self._questions[result.question].most_bytes, self.limits.result_bytes
        if result.payload.size > min(needed, most):
            limit = f"{most} (result_bytes)" if most < needed else f"{needed} for what was asked"
            self._fail(result.question, f"a result of {result.payload.size} bytes; at most {limit}")
        elif len(result.payload.inline) == result.payload.size:
            self._complete(result, result.payload.inline)
        else:
            known = self._arriving.get(result.question)
            if known is None or known[1].sha256 != result.payload.sha256:
                known = result, Assembly(result.payload.sha256, result.payload.size)
            self._arriving[result.question] = result, known[1]
            self._want(known[1])

    def _take(self, question: bytes, result: pb.Result, assembly: Assembly, chunk: pb.Chunk) -> None:
        try:
            fits = assembly.add(chunk.offset, chunk.data)
        except PayloadError as error:
            if question in self._garbled:
                self._fail(question, str(error))
            else:  # perhaps the link's doing: a damaged connection breaks soon, and the next one is asked again
                self._garbled.add(question)
                self._want(assembly)
            return
        if assembly.complete:
            self._complete(result, assembly.take())
        elif not fits:
            self._want(assembly)

    def _want(self, assembly: Assembly) -> None:
        self._put(pb.Down(want=pb.Want(sha256=assembly.sha256, offset=assembly.have)))

    def _fail(self, question: bytes, reason: str) -> None:
        self._complete(pb.Result(question=question, kind=link.FAILED, reason=reason), b"")

    def _complete(self, result: pb.Result, payload: bytes) -> None:
        self._arriving.pop(result.question, None)
        self._answered.add(result.question)
        self._questions[result.question].answer(Answered(self.node, result, payload))

    def _put(self, frame: pb.Down) -> None:
        if self._outbox is None:
            return
        try:
            self._outbox.put(frame.SerializeToString())
        except OverflowError:  # its session ends with the next beat; its next stream is asked again
            self.leave(self._outbox)
