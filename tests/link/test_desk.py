"""A desk under any order of events: each question has exactly one answer, and it is the one that was sent."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb
from fedapt.protocols import outbox as outboxes
from fedapt.protocols.blobs import digest
from fedapt.protocols.outbox import Outbox
from fedapt.protocols.update import Assignment
from fedapt.server.link.desk import Answered, Asked, Desk
from fedapt.server.link.limits import Limits

NODE = 7
LIMITS = Limits(result_bytes=1000)
PIECE = 40


class Recorder(Outbox):
    """What would be written."""

    def __init__(self) -> None:
        super().__init__(lambda chunk: chunk.SerializeToString())
        self.frames: list[pb.Down] = []
        self.sent: list[bytes] = []
        self.forgotten: list[bytes] = []

    def put(self, frame: bytes) -> None:
        self.frames.append(pb.Down.FromString(frame))

    def send(self, sha256: bytes, data: bytes, offset: int) -> None:
        self.sent.append(data[offset:])

    def forget(self, sha256: bytes) -> None:
        self.forgotten.append(sha256)

    def wanted(self) -> list[pb.Want]:
        return [frame.want for frame in self.frames if frame.WhichOneof("frame") == "want"]

    def questions(self) -> list[bytes]:
        return [frame.question.id for frame in self.frames if frame.WhichOneof("frame") == "question"]

    def received(self) -> dict[bytes, str]:
        frames = [frame.received for frame in self.frames if frame.WhichOneof("frame") == "received"]
        return {received.question: received.reason for received in frames}


@dataclass
class Asker:
    """Who waits for one answer. Two of its questions can name the same payload, and so can two results."""

    number: int
    answers: list[Answered] = field(default_factory=list)

    @property
    def asked(self) -> Asked:
        payload = b"adapter %d" % (self.number // 2)
        about = Assignment("run", self.number, 1, NODE, "v", payload)
        question = link.question(pb.TRAIN, about, link.blob(b"spec"), link.blob(payload))
        return Asked(NODE, question, {digest(b"spec"): b"spec", digest(payload): payload}, self.answers.append)

    @property
    def id(self) -> bytes:
        return self.asked.question.id

    @property
    def payload(self) -> bytes:
        """Odd ones come in chunks."""
        return b"%d" % self.number if self.number % 2 == 0 else b"change" * (10 + self.number // 4)

    def result(self) -> pb.Result:
        payload = self.payload
        inline = payload if self.number % 2 == 0 else b""
        blob = pb.Blob(sha256=digest(payload), size=len(payload), inline=inline)
        return pb.Result(question=self.id, kind="delta", weight=1.0, payload=blob)


numbers = st.integers(0, 7)


class DeskMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(NODE, LIMITS)
        self.outbox: Recorder | None = None
        self.open: dict[int, Asker] = {}
        self.closed: list[tuple[Asker, int]] = []

    @rule(number=numbers)
    def ask(self, number: int) -> None:
        if number in self.open:
            self.retire(number)
        self.open[number] = Asker(number)
        self.desk.ask(self.open[number].asked)

    @rule(number=numbers)
    def close(self, number: int) -> None:
        self.desk.close(Asker(number).id, "enough")
        if number in self.open:
            self.retire(number)
            if self.outbox is not None:
                assert self.outbox.received()[Asker(number).id] == "enough"

    def retire(self, number: int) -> None:
        asker = self.open.pop(number)
        self.closed.append((asker, len(asker.answers)))

    @rule()
    def enter(self) -> None:
        self.outbox = Recorder()
        self.desk.enter(self.outbox)
        assert sorted(self.outbox.questions()) == sorted(asker.id for asker in self.open.values())

    @precondition(lambda self: self.outbox is not None)
    @rule()
    def leave(self) -> None:
        before, self.outbox = self.outbox, None
        assert before is not None
        self.desk.leave(Recorder())
        assert self.desk.present, "another stream than the node's own has ended"
        self.desk.leave(before)

    @rule(number=numbers)
    def announce(self, number: int) -> None:
        self.desk.result(Asker(number).result())
        if number not in self.open and self.outbox is not None:
            assert "stale" in self.outbox.received()[Asker(number).id]

    @rule(number=numbers, offset=st.integers(0, 80), size=st.integers(0, 80))
    def chunk(self, number: int, offset: int, size: int) -> None:
        payload = Asker(number).payload
        data = payload[offset : offset + size]
        self.desk.chunk(pb.Chunk(sha256=digest(payload), offset=min(offset, len(payload)), data=data))

    @precondition(lambda self: self.outbox is not None)
    @rule()
    def obey(self) -> None:
        """Send what was asked for last, a piece of it."""
        assert self.outbox is not None
        for want in self.outbox.wanted()[-1:]:
            for number in range(8):
                payload = Asker(number).payload
                if digest(payload) == want.sha256:
                    data = payload[want.offset : want.offset + PIECE]
                    self.desk.chunk(pb.Chunk(sha256=want.sha256, offset=want.offset, data=data))

    @rule(number=numbers)
    def want(self, number: int) -> None:
        """Blobs of open questions alone are for this node to see."""
        payload = b"adapter %d" % (number // 2)
        self.desk.want(pb.Want(sha256=digest(payload), offset=3))
        named = any(open_ // 2 == number // 2 for open_ in self.open)
        if self.outbox is not None:
            assert (payload[3:] in self.outbox.sent[-1:]) >= named
        self.desk.want(pb.Want(sha256=digest(b"another node's"), offset=0))

    @invariant()
    def one_answer_and_the_right_one(self) -> None:
        for asker in self.open.values():
            assert len(asker.answers) <= 1
            for answer in asker.answers:
                assert answer == Answered(NODE, asker.result(), asker.payload)
        for asker, answers in self.closed:
            assert len(asker.answers) == answers, "an answer after the question was closed"

    def teardown(self) -> None:
        """A node that obeys answers all that is open; twice, because it cannot know."""
        self.enter()
        for _ in range(2):
            for asker in list(self.open.values()):
                self.desk.result(asker.result())
                self.desk.chunk(pb.Chunk(sha256=digest(asker.payload), offset=0, data=asker.payload))
        for asker in self.open.values():
            assert len(asker.answers) == 1
        self.one_answer_and_the_right_one()


DeskMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
TestDesk = DeskMachine.TestCase


def desk_with(*askers: Asker) -> tuple[Desk, Recorder]:
    desk, outbox = Desk(NODE, LIMITS), Recorder()
    desk.enter(outbox)
    for asker in askers:
        desk.ask(asker.asked)
    return desk, outbox


def test_a_result_that_is_too_large_fails_before_it_travels() -> None:
    asker = Asker(1)
    desk, outbox = desk_with(asker)
    claim = pb.Blob(sha256=bytes(32), size=1 << 30)
    desk.result(pb.Result(question=asker.id, kind="delta", payload=claim))
    (answer,) = asker.answers
    assert (answer.result.kind, answer.payload) == (link.FAILED, b"")
    assert "1073741824 bytes; at most 1000" in answer.result.reason
    assert not outbox.wanted()


def test_a_result_that_is_larger_than_what_was_asked_for_fails_too() -> None:
    """`result_bytes` has room for any run; one run needs as much as its update has."""
    asker = Asker(1)
    desk, outbox = desk_with()
    desk.ask(replace(asker.asked, most_bytes=len(asker.payload) - 1))
    desk.result(asker.result())
    (answer,) = asker.answers
    assert (
        answer.result.reason
        == f"a result of {len(asker.payload)} bytes; at most {len(asker.payload) - 1} for what was asked"
    )
    assert not outbox.wanted()
    desk.ask(replace(asker.asked, most_bytes=len(asker.payload)))
    desk.result(asker.result())
    assert outbox.wanted(), "the control: as large as it may be"


def test_bytes_that_are_not_what_was_named_are_asked_for_again_once() -> None:
    """The link may have garbled them; whoever sends them twice means it."""
    asker = Asker(1)
    desk, outbox = desk_with(asker)
    desk.result(asker.result())
    sha256, size = digest(asker.payload), len(asker.payload)
    garbage = pb.Chunk(sha256=sha256, offset=0, data=bytes(size))
    desk.chunk(garbage)
    assert asker.answers == []
    assert outbox.wanted() == 2 * [pb.Want(sha256=sha256, offset=0)]
    desk.chunk(garbage)
    (answer,) = asker.answers
    assert answer.result.kind == link.FAILED
    assert "SHA-256" in answer.result.reason


def test_two_results_with_the_same_bytes_are_both_taken() -> None:
    """They travel once, and nobody waits for a second time that never comes."""
    one, other = Asker(1), Asker(3)
    desk, _ = desk_with(one, other)
    assert digest(one.payload) == digest(other.payload)
    for asker in (one, other):
        desk.result(asker.result())
    desk.chunk(pb.Chunk(sha256=digest(one.payload), offset=0, data=one.payload))
    assert [len(asker.answers) for asker in (one, other)] == [1, 1]


def test_blobs_that_another_question_names_are_still_sent() -> None:
    one, other, third = Asker(2), Asker(3), Asker(4)
    desk, outbox = desk_with(one, other, third)
    desk.close(one.id)
    assert outbox.forgotten == []
    desk.close(other.id)
    assert outbox.forgotten == [digest(b"adapter 1")]


def test_a_node_that_does_not_read_is_absent_and_nobody_else_is_harmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outboxes, "MOST_FRAMES", 2)
    desk, outbox = Desk(NODE, LIMITS), Outbox(lambda chunk: chunk.SerializeToString())
    desk.enter(outbox)
    askers = [Asker(number) for number in range(4)]
    for asker in askers:
        desk.ask(asker.asked)
    assert not desk.present
    later = Recorder()
    desk.enter(later)
    assert later.questions() == [asker.id for asker in askers]
