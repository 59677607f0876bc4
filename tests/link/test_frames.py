"""Frames: what we write is read, and what anybody else writes is a frame, nothing, or a PayloadError."""

import math
import random
from collections.abc import Callable

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb
from fedapt.protocols.blobs import INLINE_BYTES, digest
from fedapt.protocols.errors import PayloadError
from fedapt.protocols.layout import AdapterLayout
from fedapt.protocols.update import Assignment, Description, Update

from .federation import start_of

MOST_GROWTH = 64 << 20
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=link.LONGEST_NAME)
ids = st.binary(min_size=16, max_size=16)
hashes = st.binary(min_size=32, max_size=32)
blobs = st.one_of(
    st.binary(max_size=100).map(link.blob),
    st.builds(pb.Blob, sha256=hashes, size=st.integers(INLINE_BYTES + 1, 2**64 - 1)),
)
reals = st.floats(allow_nan=False, allow_infinity=False)
bodies = st.binary(max_size=200)
chunks = st.builds(pb.Chunk, sha256=hashes, offset=st.integers(0, 2**64 - 1), data=bodies)
wants = st.builds(pb.Want, sha256=hashes, offset=st.integers(0, 2**64 - 1))
results = st.builds(
    pb.Result,
    question=ids,
    kind=names,
    weight=reals,
    metrics=st.dictionaries(names, st.floats(), max_size=5),
    reason=names,
    payload=blobs,
)
ranks = st.integers(0, link.MOST_RANK)
hellos = st.builds(pb.Hello, oldest=st.integers(0, 9), newest=st.integers(0, 9), software=names, rank=ranks)
ups = st.one_of(
    st.builds(pb.Up, hello=hellos),
    st.builds(pb.Up, want=wants),
    st.builds(pb.Up, result=results),
    st.builds(pb.Up, chunk=chunks),
    st.builds(pb.Up, answer=st.builds(pb.Answer, body=bodies)),
    st.builds(pb.Up, beat=st.builds(pb.Beat, state=names)),
    st.builds(pb.Up, renew=st.builds(pb.Renew, csr=bodies)),
    st.builds(pb.Up, bye=st.builds(pb.Bye, reason=names)),
)
questions = st.builds(
    pb.Question,
    id=ids,
    kind=st.integers(0, 4),
    run=names,
    round=st.integers(0, 2**64 - 1),
    attempt=st.integers(0, 2**64 - 1),
    version=names,
    spec=blobs,
    payload=blobs,
    rank=ranks,
)
welcomes = st.builds(pb.Welcome, protocol=st.integers(0, 9), software=names, beat_seconds=st.floats(0.01, 3600))
downs = st.one_of(
    st.builds(pb.Down, welcome=welcomes),
    st.builds(pb.Down, rejected=st.builds(pb.Rejected, reason=names, final=st.booleans())),
    st.builds(pb.Down, question=questions),
    st.builds(pb.Down, chunk=chunks),
    st.builds(pb.Down, want=wants),
    st.builds(pb.Down, received=st.builds(pb.Received, question=ids, reason=names)),
    st.builds(pb.Down, exchange=st.builds(pb.Exchange, body=bodies)),
    st.builds(pb.Down, beat=st.builds(pb.Beat)),
    st.builds(pb.Down, renewed=st.builds(pb.Renewed, chain=bodies)),
    st.builds(pb.Down, bye=st.builds(pb.Bye, reason=names, after_seconds=st.floats(0, 3600))),
)
READERS: list[tuple[Callable[[bytes], pb.Up | pb.Down | None], st.SearchStrategy[pb.Up | pb.Down]]] = [
    (link.read_up, ups),
    (link.read_down, downs),
]


@given(ups)
def test_a_nodes_frames_are_read(frame: pb.Up) -> None:
    assert link.read_up(frame.SerializeToString()) == frame


@given(downs)
def test_the_servers_frames_are_read(frame: pb.Down) -> None:
    assert link.read_down(frame.SerializeToString()) == frame


def mutated(raw: bytes, chance: random.Random) -> bytes:
    """One to four bytes changed, put in, or taken out; or an end cut off."""
    data = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                data[at : at + 1] = chance.randbytes(1)
            case 1:
                data[at:at] = chance.randbytes(chance.randint(1, 3))
            case 2:
                del data[at : at + chance.randint(1, 8)]
            case 3:
                del data[at:]
    return bytes(data)


def seeds() -> list[tuple[bool, bytes]]:
    """One frame of each kind; True where it is a node's."""
    asked = Assignment("run", 3, 1, 7, "v" * 64, b"payload")
    question = link.question(pb.TRAIN, asked, link.blob(b"spec"), pb.Blob(sha256=bytes(32), size=1 << 20))
    update = Update("run", 3, 1, 7, "v" * 64, "delta", 2.0, b"change", {"loss": 1.0, "steps": 3.0}, "a reason")
    result = link.result(question, update)
    chunk, want = pb.Chunk(sha256=digest(b"x"), offset=9, data=b"x" * 40), pb.Want(sha256=bytes(32), offset=300)
    up = [
        pb.Up(hello=pb.Hello(oldest=1, newest=1, software="0.1")),
        pb.Up(want=want),
        pb.Up(result=result),
        pb.Up(chunk=chunk),
        pb.Up(answer=pb.Answer(body=b"body")),
        pb.Up(beat=pb.Beat(state="idle")),
        pb.Up(renew=pb.Renew(csr=b"csr")),
        pb.Up(bye=pb.Bye(reason="gone", after_seconds=1.0)),
    ]
    down = [
        pb.Down(welcome=pb.Welcome(protocol=1, software="0.1", beat_seconds=5.0)),
        pb.Down(rejected=pb.Rejected(reason="no", final=True)),
        pb.Down(question=question),
        pb.Down(chunk=chunk),
        pb.Down(want=want),
        pb.Down(received=pb.Received(question=question.id, reason="stale")),
        pb.Down(exchange=pb.Exchange(body=b"body")),
        pb.Down(renewed=pb.Renewed(chain=b"chain")),
        pb.Down(bye=pb.Bye(reason="stop", after_seconds=1.0)),
    ]
    return [(True, f.SerializeToString()) for f in up] + [(False, f.SerializeToString()) for f in down]


def fuzz(count: int) -> tuple[int, int, int]:
    """How many mutated frames were frames, were ignored, and were refused. Anything else is raised."""
    chance, corpus = random.Random(0), seeds()
    frames = ignored = refused = 0
    for _ in range(count):
        is_up, raw = chance.choice(corpus)
        try:
            frame = (link.read_up if is_up else link.read_down)(mutated(raw, chance))
        except PayloadError:
            refused += 1
        else:
            frames, ignored = frames + (frame is not None), ignored + (frame is None)
    return frames, ignored, refused


def test_mutated_frames_are_frames_or_nothing_or_refused() -> None:
    assert min(fuzz(20_000)) > 100, "each of the three is tried"


@pytest.mark.slow
def test_a_million_mutated_frames_and_no_memory() -> None:
    fuzz(1000)
    before = psutil.Process().memory_info().rss
    assert min(fuzz(1_000_000)) > 1000
    assert psutil.Process().memory_info().rss - before < MOST_GROWTH


@given(st.binary(max_size=200))
def test_any_bytes(raw: bytes) -> None:
    for reader, _ in READERS:
        try:
            reader(raw)
        except PayloadError:
            continue


def blob_of(**fields: object) -> pb.Blob:
    blob = link.blob(b"bytes")
    for name, value in fields.items():
        setattr(blob, name, value)
    return blob


@pytest.mark.parametrize(
    "frame",
    [
        pb.Up(hello=pb.Hello(software="x" * 129)),
        pb.Up(hello=pb.Hello(rank=link.MOST_RANK + 1)),
        pb.Up(want=pb.Want(sha256=bytes(31))),
        pb.Up(chunk=pb.Chunk(sha256=bytes(33))),
        pb.Up(chunk=pb.Chunk(sha256=bytes(32), data=bytes(link.FRAME_BYTES))),
        pb.Up(answer=pb.Answer(body=bytes(link.MOST_BODY + 1))),
        pb.Up(beat=pb.Beat(state="x" * 129)),
        pb.Up(result=pb.Result(question=bytes(15), payload=blob_of())),
        pb.Up(result=pb.Result(question=bytes(16), weight=math.nan, payload=blob_of())),
        pb.Up(result=pb.Result(question=bytes(16), weight=math.inf, payload=blob_of())),
        pb.Up(result=pb.Result(question=bytes(16), metrics={str(i): 0.0 for i in range(65)}, payload=blob_of())),
        pb.Up(result=pb.Result(question=bytes(16), metrics={"x" * 129: 0.0}, payload=blob_of())),
        pb.Up(result=pb.Result(question=bytes(16), reason="x" * 1001, payload=blob_of())),
        pb.Up(result=pb.Result(question=bytes(16), payload=blob_of(inline=b"other"))),
        pb.Up(result=pb.Result(question=bytes(16), payload=blob_of(size=6))),
        pb.Up(result=pb.Result(question=bytes(16), payload=blob_of(inline=b""))),
        pb.Up(result=pb.Result(question=bytes(16), payload=blob_of(sha256=b""))),
    ],
    ids=lambda frame: str(frame)[:40].replace("\n", " "),
)
def test_a_nodes_frame_out_of_bounds_is_refused(frame: pb.Up) -> None:
    with pytest.raises(PayloadError):
        link.read_up(frame.SerializeToString())


@pytest.mark.parametrize("seconds", [0.0, -1.0, 0.001, 4000.0, math.nan, math.inf])
def test_a_beat_out_of_bounds_is_refused(seconds: float) -> None:
    with pytest.raises(PayloadError, match="beats every"):
        link.read_down(pb.Down(welcome=pb.Welcome(protocol=1, beat_seconds=seconds)).SerializeToString())


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, 4000.0])
def test_nobody_is_sent_away_for_ever(seconds: float) -> None:
    with pytest.raises(PayloadError, match="a leave of"):
        link.read_down(pb.Down(bye=pb.Bye(after_seconds=seconds)).SerializeToString())


def test_a_question_of_an_impossible_rank_is_refused() -> None:
    asked = Assignment("run", 3, 1, 7, "v", b"", link.MOST_RANK + 1)
    frame = pb.Down(question=link.question(pb.TRAIN, asked, link.blob(b""), link.blob(b"")))
    with pytest.raises(PayloadError, match="a rank of 65537; at most 65536"):
        link.read_down(frame.SerializeToString())


def test_a_frame_of_tomorrow_is_ignored() -> None:
    """Field 15 of an Up: a node that is newer than the server."""
    assert link.read_up(bytes([15 << 3 | 2, 3]) + b"new") is None
    assert link.read_down(bytes([15 << 3 | 2, 3]) + b"new") is None
    assert link.read_up(b"") is None


@pytest.mark.parametrize(
    ("own", "oldest", "newest", "agreed"),
    [
        (range(1, 2), 1, 1, 1),
        (range(1, 3), 1, 1, 1),  # the server is one ahead
        (range(1, 2), 1, 2, 1),  # the node is
        (range(2, 5), 1, 3, 3),
        (range(1, 4), 2, 9, 3),
    ],
)
def test_the_highest_common_protocol_is_spoken(
    monkeypatch: pytest.MonkeyPatch, own: range, oldest: int, newest: int, agreed: int
) -> None:
    monkeypatch.setattr(link, "PROTOCOLS", own)
    assert link.common_protocol(pb.Hello(oldest=oldest, newest=newest)) == agreed


@pytest.mark.parametrize(
    ("own", "oldest", "newest", "who"),
    [
        (range(2, 3), 1, 1, "upgrade the node's fedapt"),
        (range(1, 2), 2, 3, "upgrade the server's fedapt"),
        (range(1, 2), 3, 1, "upgrade"),
        (range(1, 2), 0, 0, "upgrade the node's fedapt"),
    ],
)
def test_no_common_protocol_is_refused_and_says_who_is_to_be_renewed(
    monkeypatch: pytest.MonkeyPatch, own: range, oldest: int, newest: int, who: str
) -> None:
    monkeypatch.setattr(link, "PROTOCOLS", own)
    with pytest.raises(PayloadError, match=who):
        link.common_protocol(pb.Hello(oldest=oldest, newest=newest))


@given(st.from_type(AdapterLayout), names)
def test_a_description_travels_whole(layout: AdapterLayout, base: str) -> None:
    described = Description(layout, start_of(layout), {"r": 2, "targets": ["q"]}, base)
    read = link.description_from_bytes(link.description_to_bytes(described))
    assert (read.version, read.config, read.base) == (described.version, described.config, base)


@given(st.binary(max_size=100))
def test_what_is_no_description_is_refused(data: bytes) -> None:
    with pytest.raises(PayloadError):
        link.description_from_bytes(data)


@given(reals, st.dictionaries(names, reals, max_size=5), st.binary(max_size=100), names, ranks)
def test_an_update_travels_whole(
    weight: float, metrics: dict[str, float], payload: bytes, reason: str, rank: int
) -> None:
    asked = Assignment("run", 3, 1, 7, "v", b"", rank)
    question = link.question(pb.TRAIN, asked, link.blob(b""), link.blob(b""))
    sent = Update("run", 3, 1, 7, "v", "delta", weight, payload, metrics, reason)
    assert link.update(link.result(question, sent), asked, payload) == sent
    assert link.assignment(question, 7, b"") == asked


@given(st.tuples(st.integers(1, 4), *(st.integers(0, 3),) * 4, names), st.data())
def test_questions_have_the_same_id_only_if_they_are_the_same(
    first: tuple[int, int, int, int, int, str], data: st.DataObject
) -> None:
    second = data.draw(st.one_of(st.just(first), st.tuples(*(st.integers(1, 4),) * 5, names)))
    one, two = (
        link.question_id(kind, Assignment(run, round_, attempt, node, "v", b"", rank), bytes(32))  # type: ignore[arg-type]
        for kind, round_, attempt, node, rank, run in (first, second)
    )
    assert (one == two) == (first == second)


def test_the_same_round_of_a_run_with_another_spec_is_another_question() -> None:
    """Else an answer that was kept of a run that had the name before would serve for the new one."""
    asked = Assignment("run", 1, 1, 7, "v", b"")
    ids = {link.question(pb.TRAIN, asked, link.blob(spec), link.blob(b"")).id for spec in (b"one", b"other")}
    assert len(ids) == 2
