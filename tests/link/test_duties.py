"""A node's duties where its link, its disk and its server are at odds, one step of the loop at a time."""

import asyncio
import threading
from pathlib import Path

import pytest

from fedapt.client.duties import Duties
from fedapt.client.kept import Kept
from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb
from fedapt.protocols.errors import PayloadError
from fedapt.protocols.outbox import Outbox
from fedapt.protocols.update import Assignment

QUESTION = link.question(
    pb.TRAIN, Assignment("run", 1, 1, 1, "v", b"payload"), link.blob(b"spec"), link.blob(b"payload")
)
ANSWER = bytes(100_000)
"""Too large to travel with the result that names it."""


class Slow:
    """A worker that is done when it is told to be."""

    def __init__(self) -> None:
        self.asked = 0
        self.leave = threading.Event()

    def work(self, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        self.asked += 1
        assert self.leave.wait(20)
        return pb.Result(question=question.id, kind="delta", weight=1.0, payload=link.blob(ANSWER)), ANSWER

    def exchange(self, body: bytes) -> bytes:
        return body


class Watched(Kept):
    """Says when a result is on disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.written = threading.Event()

    def keep(self, result: pb.Result, payload: bytes) -> None:
        super().keep(result, payload)
        self.written.set()


def outbox() -> Outbox:
    return Outbox(lambda chunk: pb.Up(chunk=chunk).SerializeToString())


async def until_asked(worker: Slow, times: int) -> None:
    async with asyncio.timeout(20):
        while worker.asked < times:
            await asyncio.sleep(0.01)


def test_what_is_withdrawn_and_asked_again_while_its_result_is_written_is_not_lost(tmp_path: Path) -> None:
    """The loop hears of both before it hears that the work is done."""

    async def script() -> None:
        worker, kept = Slow(), Watched(tmp_path)
        duties = Duties(worker, kept)
        working = asyncio.ensure_future(duties.run())
        duties.enter(outbox())
        duties.question(QUESTION)
        await until_asked(worker, 1)
        duties.received(pb.Received(question=QUESTION.id, reason="withdrawn"))
        worker.leave.set()
        assert kept.written.wait(20)  # and the loop does not run meanwhile
        duties.question(QUESTION)
        async with asyncio.timeout(20):
            while duties._started:
                await asyncio.sleep(0.01)
        found = kept.find(QUESTION.id)
        assert found is not None
        assert found[1] == ANSWER
        assert worker.asked == 1
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)

    asyncio.run(script())


def test_a_server_that_reads_nothing_does_not_end_the_work(tmp_path: Path) -> None:
    async def script() -> None:
        worker, full = Slow(), outbox()
        duties = Duties(worker, Kept(tmp_path))
        working = asyncio.ensure_future(duties.run())
        duties.enter(full)
        duties.question(QUESTION)
        await until_asked(worker, 1)
        while True:
            try:
                full.put(b"")
            except OverflowError:
                break
        worker.leave.set()
        async with asyncio.timeout(20):
            while duties._started:
                await asyncio.sleep(0.01)
        assert not working.done()
        duties.enter(again := outbox())
        assert pb.Up.FromString(await again.next()).result.question == QUESTION.id
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)

    asyncio.run(script())


def numbered(number: int, payload: bytes = b"payload") -> pb.Question:
    asked = Assignment("run", number, 1, 1, "v", payload)
    return link.question(pb.TRAIN, asked, link.blob(b"spec"), link.blob(payload))


async def answers(told: Outbox, count: int) -> list[pb.Result]:
    async with asyncio.timeout(20):
        return [pb.Up.FromString(await told.next()).result for _ in range(count)]


def test_a_server_that_asks_without_end_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is withdrawn after it was queued counts until its turn has come, and what is on disk until it is acknowledged."""
    monkeypatch.setattr("fedapt.client.duties.MOST_OPEN", 3)

    async def script() -> None:
        duties, told = Duties(Slow(), kept := Kept(tmp_path)), outbox()
        duties.enter(told)
        for number in range(5):
            duties.question(numbered(number))
        duties.question(numbered(0))
        for refused, question in zip(await answers(told, 2), (numbered(3), numbered(4)), strict=True):
            assert (refused.question, refused.kind) == (question.id, link.FAILED)
            assert "4 questions are open" in refused.reason
            assert "at most 3" in refused.reason
        assert list(duties._open) == [numbered(number).id for number in range(3)]
        assert len(kept) == 0, "a refusal is not kept: the server asks again if it got lost"
        duties.received(pb.Received(question=numbered(0).id, reason="withdrawn"))
        duties.question(numbered(5))
        assert (await answers(told, 1))[0].kind == link.FAILED
        done = pb.Result(question=numbered(9).id, kind="delta", payload=link.blob(b""))
        fresh = Duties(Slow(), kept)
        fresh.enter(told)
        kept.keep(done, b"")
        for number in range(3):
            fresh.question(numbered(number))
        assert list(fresh._open) == [numbered(number).id for number in range(2)]
        fresh.received(pb.Received(question=done.question))
        fresh.question(numbered(2))
        assert len(fresh._open) == 3

    asyncio.run(script())


def test_what_open_questions_name_is_bounded_together(tmp_path: Path) -> None:
    async def script() -> None:
        duties, told = Duties(Slow(), Kept(tmp_path), most_bytes=100), outbox()
        duties.enter(told)
        for number, payload in enumerate((b"a" * 60, b"b" * 60, b"a" * 60)):
            duties.question(numbered(number, payload))
        (refused,) = await answers(told, 1)
        assert refused.question == numbered(1, b"b" * 60).id
        assert "124 bytes; at most 100" in refused.reason
        assert len(duties._open) == 2, "what two questions name is counted once"

    asyncio.run(script())


def test_frames_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedapt.client.duties.MOST_OPEN", 3)

    async def script() -> None:
        duties = Duties(Slow(), Kept(tmp_path))
        for _ in range(6):
            duties.exchange(b"frame")
        with pytest.raises(PayloadError, match="6 questions and frames"):
            duties.exchange(b"frame")

    asyncio.run(script())
