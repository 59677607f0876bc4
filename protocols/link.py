"""The frames of the link, checked: bytes from the other side become protocol buffers here, or a PayloadError.

Nothing that a peer sends is trusted before it has passed `read_up` or `read_down`: sizes, names and numbers are bounded,
and a frame of a newer peer that is not known here comes out as None, to be ignored.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import TypeVar, cast, get_args

from google.protobuf.message import DecodeError

from . import link_pb2 as pb
from .blobs import CHUNK_BYTES, INLINE_BYTES, digest
from .codecs import CODECS
from .errors import PayloadError
from .layout import AdapterLayout
from .records import LONGEST_REASON
from .update import Assignment, Description, Kind, Update

SOFTWARE = version("fedapt")
"""For the other side's log."""

JOIN, OPEN, ANSWER = "Join", "Open", "Answer"
SERVICE = "fedapt.link.v1.Link"

PROTOCOLS = range(1, 2)
"""The protocols that are spoken here. The first frame of a stream names the peer's; the highest common one is taken."""

FRAME_BYTES = CHUNK_BYTES + (64 << 10)
"""No honest frame is larger."""

MOST_RANK = 1 << 16
"""A factor pair has at most the rank of its layer, and no layer is so wide both ways."""

MOST_METRICS = 64
LONGEST_NAME = 128
DIGEST_BYTES, QUESTION_BYTES = 32, 16
MOST_BODY = 64 << 10
"""Bytes of a zeroth-order frame."""

MOST_AFTER = 3600.0
"""Seconds for which a server may send a node away."""

Frame = TypeVar("Frame", pb.Up, pb.Down)

NAME_KEY = "fedapt-name"
"""The metadata in which a node of a plaintext link says who it is."""

TAKEN_KEY = "fedapt-taken"
"""The metadata with which the server says that it takes answers: a call that was refused has none."""

RESTING = ("paused", "outside its hours")
"""What a node that takes no work says in its beats."""

FAILED = "failed"
"""The kind of a result that is an error: `reason` says which."""


def question_id(kind: pb.Kind, asked: Assignment, spec: bytes) -> bytes:
    """16 bytes that are the same whenever the same is asked, so that an answer that is there already serves again.

    `spec` is the SHA-256 of the run's spec: a run that was begun anew under its old name asks something else.
    """
    about = f"{asked.run}|{asked.round}|{asked.attempt}|{asked.node}|{asked.version}|{asked.rank}"
    text = f"{kind}|{spec.hex()}|{about}"
    return hashlib.sha256(text.encode()).digest()[:QUESTION_BYTES]


def blob(data: bytes) -> pb.Blob:
    """How bytes are named to the other side; few of them come along at once."""
    return pb.Blob(sha256=digest(data), size=len(data), inline=data if len(data) <= INLINE_BYTES else b"")


def question(kind: pb.Kind, asked: Assignment, spec: pb.Blob, payload: pb.Blob) -> pb.Question:
    return pb.Question(
        id=question_id(kind, asked, spec.sha256),
        kind=kind,
        run=asked.run,
        round=asked.round,
        attempt=asked.attempt,
        version=asked.version,
        spec=spec,
        payload=payload,
        rank=asked.rank,
    )


def assignment(asked: pb.Question, node: int, payload: bytes) -> Assignment:
    return Assignment(asked.run, asked.round, asked.attempt, node, asked.version, payload, asked.rank)


def result(answered: pb.Question, update: Update) -> pb.Result:
    """An update as the answer to a question; its payload is named, not held, unless it is small."""
    return pb.Result(
        question=answered.id,
        kind=update.kind,
        weight=update.weight,
        metrics=dict(update.metrics),
        reason=update.reason[:LONGEST_REASON],
        payload=blob(update.payload),
    )


def update(answer: pb.Result, asked: Assignment, payload: bytes) -> Update:
    """An answer as the update of the node that was asked: what it answers is known here and not read from it.

    Raises PayloadError where it is none.
    """
    if answer.kind not in get_args(Kind):
        raise PayloadError(f"a result of kind {answer.kind!r} is no update")
    return Update(
        run=asked.run,
        round=asked.round,
        attempt=asked.attempt,
        node=asked.node,
        version=asked.version,
        kind=cast(Kind, answer.kind),
        weight=answer.weight,
        payload=payload,
        metrics=metrics(answer),
        reason=answer.reason,
    )


def metrics(answer: pb.Result) -> Mapping[str, float]:
    """The finite ones."""
    return {name: value for name, value in answer.metrics.items() if math.isfinite(value)}


def description_to_bytes(description: Description) -> bytes:
    message = pb.Description(
        layout=description.layout.to_json(),
        config=json.dumps(dict(description.config), sort_keys=True),
        base=description.base,
        start=CODECS["fp32"].encode(description.start, description.layout, key=0),
    )
    return message.SerializeToString()


def description_from_bytes(data: bytes) -> Description:
    """Raises PayloadError where the bytes are no description."""
    try:
        message = pb.Description.FromString(data)
        config = json.loads(message.config)
    except (DecodeError, ValueError, RecursionError) as error:
        raise PayloadError(f"not a description: {error}") from None
    if not isinstance(config, dict):
        raise PayloadError("not a description: the adapter's config is no JSON object")
    layout = AdapterLayout.from_json(message.layout)
    return Description(layout, CODECS["fp32"].decode(message.start, layout), config, message.base)


def read_up(raw: bytes) -> pb.Up | None:
    """A node's frame, or None for one that is not known here. Raises PayloadError for one that is out of bounds."""
    frame = _parsed(pb.Up(), raw)
    match frame.WhichOneof("frame"):
        case "hello":
            _short(software=frame.hello.software)
            _rank(frame.hello.rank)
        case "want":
            _digest(frame.want.sha256)
        case "result":
            _result(frame.result)
        case "chunk":
            _digest(frame.chunk.sha256)
        case "answer":
            _body(frame.answer.body)
        case "renew":
            _body(frame.renew.csr)
        case "beat":
            _short(state=frame.beat.state)
        case "bye":
            _reason(frame.bye.reason)
        case _:
            return None
    return frame


def read_answer(raw: bytes) -> bytes:
    """What a node sends over Link.Answer. Raises PayloadError for a body that is out of bounds."""
    _body(raw)
    return raw


def read_down(raw: bytes) -> pb.Down | None:
    """The server's frame, or None for one that is not known here. Raises PayloadError for one that is out of bounds."""
    frame = _parsed(pb.Down(), raw)
    match frame.WhichOneof("frame"):
        case "welcome":
            _short(software=frame.welcome.software)
            if not 0.01 <= frame.welcome.beat_seconds <= 3600:
                raise PayloadError(f"beats every {frame.welcome.beat_seconds} s: 0.01 to 3600 expected")
        case "rejected":
            _reason(frame.rejected.reason)
        case "question":
            _question(frame.question)
        case "chunk":
            _digest(frame.chunk.sha256)
        case "want":
            _digest(frame.want.sha256)
        case "received":
            _id(frame.received.question)
            _reason(frame.received.reason)
        case "exchange":
            _body(frame.exchange.body)
        case "renewed":
            _body(frame.renewed.chain)
        case "bye":
            _bye(frame.bye)
        case "beat":
            pass
        case _:
            return None
    return frame


def common_protocol(hello: pb.Hello) -> int:
    """The highest protocol that both sides speak. Raises PayloadError, saying who has to be renewed, if there is none."""
    oldest, newest = PROTOCOLS[0], PROTOCOLS[-1]
    if hello.oldest <= newest and hello.newest >= oldest and hello.oldest <= hello.newest:
        return min(newest, hello.newest)
    older = "the node's" if hello.newest < oldest else "the server's"
    raise PayloadError(
        f"the node speaks protocol {hello.oldest} to {hello.newest}, the server {oldest} to {newest}: "
        f"upgrade {older} fedapt"
    )


def _parsed(frame: Frame, raw: bytes) -> Frame:
    if len(raw) > FRAME_BYTES:
        raise PayloadError(f"a frame of {len(raw)} bytes; at most {FRAME_BYTES}")
    try:
        frame.ParseFromString(raw)
    except DecodeError as error:
        raise PayloadError(f"not a frame: {error}") from None
    return frame


def _result(answer: pb.Result) -> None:
    _id(answer.question)
    _reason(answer.reason)
    _short(kind=answer.kind, **{f"metric {i}": name for i, name in enumerate(answer.metrics)})
    if len(answer.metrics) > MOST_METRICS:
        raise PayloadError(f"{len(answer.metrics)} metrics; at most {MOST_METRICS}")
    if not math.isfinite(answer.weight):
        raise PayloadError(f"a weight of {answer.weight}")
    _blob(answer.payload)


def _question(asked: pb.Question) -> None:
    _id(asked.id)
    _short(run=asked.run, version=asked.version)
    _blob(asked.spec)
    _blob(asked.payload)
    _rank(asked.rank)


def _bye(bye: pb.Bye) -> None:
    _reason(bye.reason)
    if not 0 <= bye.after_seconds <= MOST_AFTER:
        raise PayloadError(f"a leave of {bye.after_seconds} s; at most {MOST_AFTER:g}")


def _blob(named: pb.Blob) -> None:
    _digest(named.sha256)
    if named.inline and (len(named.inline) != named.size or digest(named.inline) != named.sha256):
        raise PayloadError("a blob's bytes are not those that it is known by")
    if not named.inline and 0 < named.size <= INLINE_BYTES:
        raise PayloadError(f"a blob of {named.size} bytes without its bytes")


def _digest(value: bytes) -> None:
    if len(value) != DIGEST_BYTES:
        raise PayloadError(f"a SHA-256 of {len(value)} bytes")


def _id(value: bytes) -> None:
    if len(value) != QUESTION_BYTES:
        raise PayloadError(f"a question id of {len(value)} bytes; {QUESTION_BYTES} expected")


def _rank(value: int) -> None:
    if value > MOST_RANK:
        raise PayloadError(f"a rank of {value}; at most {MOST_RANK}")


def _body(value: bytes) -> None:
    if len(value) > MOST_BODY:
        raise PayloadError(f"a body of {len(value)} bytes; at most {MOST_BODY}")


def _reason(value: str) -> None:
    if len(value) > LONGEST_REASON:
        raise PayloadError(f"a reason of {len(value)} characters; at most {LONGEST_REASON}")


def _short(**names: str) -> None:
    for name, value in names.items():
        if len(value) > LONGEST_NAME:
            raise PayloadError(f"{name} has {len(value)} characters; at most {LONGEST_NAME}")
