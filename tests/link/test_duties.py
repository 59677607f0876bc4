"""A node's duties where its link, its disk and its server are at odds, one step of the loop at a time."""

import asyncio
import threading
from pathlib import Path

from fedapt.client.duties import Duties
from fedapt.client.kept import Kept
from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb
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
