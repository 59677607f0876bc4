"""What is put into an outbox comes out of it: frames in order and first, blobs whole and in turn."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols import link_pb2 as pb
from fedapt.protocols import outbox as module
from fedapt.protocols.blobs import CHUNK_BYTES, Assembly, digest
from fedapt.protocols.outbox import Outbox


def chunks_of(frames: list[bytes]) -> list[pb.Chunk]:
    return [pb.Chunk.FromString(frame) for frame in frames]


def outbox() -> Outbox:
    return Outbox(lambda chunk: chunk.SerializeToString())


async def drained(box: Outbox) -> list[bytes]:
    """All that is there. What has nothing to give waits."""
    frames = []
    while True:
        try:
            frames.append(await asyncio.wait_for(box.next(), 0.001))
        except TimeoutError:
            return frames


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "CHUNK_BYTES", 7)
    return 7


def test_frames_come_in_order_and_before_blobs(small: int) -> None:
    async def run() -> list[bytes]:
        box, data = outbox(), bytes(20)
        box.send(digest(data), data, 0)
        for number in range(5):
            box.put(b"%d" % number)
        first = [await box.next() for _ in range(6)]
        box.put(b"late")
        return [*first, *await drained(box)]

    frames = asyncio.run(run())
    assert frames[:5] == [b"0", b"1", b"2", b"3", b"4"]
    assert frames[6] == b"late", "a heartbeat overtakes an adapter"
    assert [chunk.offset for chunk in chunks_of([frames[5], *frames[7:]])] == [0, small, 2 * small]


def test_blobs_take_turns(small: int) -> None:
    """The small one does not wait for the large one's end."""

    async def run() -> list[bytes]:
        box, large, little = outbox(), bytes(50), b"x" * 5
        box.send(digest(large), large, 0)
        box.send(digest(little), little, 0)
        return await drained(box)

    sent = [len(chunk.data) for chunk in chunks_of(asyncio.run(run()))]
    assert sent[1] == 5
    assert sum(sent) == 55


@given(st.binary(max_size=100), st.lists(st.integers(0, 120), max_size=5))
def test_a_blob_that_is_asked_for_again_arrives_whole(data: bytes, again: list[int]) -> None:
    """Each new request starts it at that place; the receiver asks at the end for what it has not."""

    async def run() -> Assembly:
        box, assembly = outbox(), Assembly(digest(data), len(data))
        for offset in [*again, None]:
            box.send(assembly.sha256, data, assembly.have if offset is None else offset)
            for chunk in chunks_of(await drained(box)):
                assembly.add(chunk.offset, chunk.data)
        return assembly

    assert asyncio.run(run()).take() == data


def test_chunks_are_as_large_as_they_are_said_to_be() -> None:
    async def run() -> list[bytes]:
        box, data = outbox(), bytes(2 * CHUNK_BYTES + 1)
        box.send(digest(data), data, 0)
        return await drained(box)

    assert [len(chunk.data) for chunk in chunks_of(asyncio.run(run()))] == [CHUNK_BYTES, CHUNK_BYTES, 1]


def test_what_is_forgotten_is_not_sent(small: int) -> None:
    async def run() -> list[bytes]:
        box, data = outbox(), bytes(20)
        box.send(digest(data), data, 0)
        await box.next()
        box.forget(digest(data))
        box.forget(b"never heard of")
        return await drained(box)

    assert asyncio.run(run()) == []


def test_a_peer_that_does_not_read_is_let_go_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_FRAMES", 3)

    async def run() -> None:
        box = outbox()
        for _ in range(3):
            box.put(b"frame")
        with pytest.raises(OverflowError, match="3 frames wait"):
            box.put(b"lost")
        assert await drained(box) == 3 * [b"frame"]
        with pytest.raises(OverflowError):
            box.put(b"it would be after one that was lost")

    asyncio.run(run())
