from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    DESCRIBE: _ClassVar[Kind]
    TRAIN: _ClassVar[Kind]
    EVALUATE: _ClassVar[Kind]
    ADOPT: _ClassVar[Kind]
    EXCHANGE: _ClassVar[Kind]
KIND_UNSPECIFIED: Kind
DESCRIBE: Kind
TRAIN: Kind
EVALUATE: Kind
ADOPT: Kind
EXCHANGE: Kind

class JoinRequest(_message.Message):
    __slots__ = ("csr",)
    CSR_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    def __init__(self, csr: _Optional[bytes] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("chain", "name")
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    chain: bytes
    name: str
    def __init__(self, chain: _Optional[bytes] = ..., name: _Optional[str] = ...) -> None: ...

class Up(_message.Message):
    __slots__ = ("hello", "want", "result", "chunk", "answer", "beat", "renew", "bye")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    BYE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    want: Want
    result: Result
    chunk: Chunk
    answer: Answer
    beat: Beat
    renew: Renew
    bye: Bye
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., want: _Optional[_Union[Want, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., bye: _Optional[_Union[Bye, _Mapping]] = ...) -> None: ...

class Down(_message.Message):
    __slots__ = ("welcome", "rejected", "question", "chunk", "want", "received", "exchange", "beat", "renewed", "bye")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    RENEWED_FIELD_NUMBER: _ClassVar[int]
    BYE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    rejected: Rejected
    question: Question
    chunk: Chunk
    want: Want
    received: Received
    exchange: Exchange
    beat: Beat
    renewed: Renewed
    bye: Bye
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., question: _Optional[_Union[Question, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., want: _Optional[_Union[Want, _Mapping]] = ..., received: _Optional[_Union[Received, _Mapping]] = ..., exchange: _Optional[_Union[Exchange, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., renewed: _Optional[_Union[Renewed, _Mapping]] = ..., bye: _Optional[_Union[Bye, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("oldest", "newest", "software", "rank")
    OLDEST_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    oldest: int
    newest: int
    software: str
    rank: int
    def __init__(self, oldest: _Optional[int] = ..., newest: _Optional[int] = ..., software: _Optional[str] = ..., rank: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "software", "beat_seconds", "answers")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    BEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    software: str
    beat_seconds: float
    answers: bool
    def __init__(self, protocol: _Optional[int] = ..., software: _Optional[str] = ..., beat_seconds: _Optional[float] = ..., answers: _Optional[bool] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("reason", "final")
    REASON_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    reason: str
    final: bool
    def __init__(self, reason: _Optional[str] = ..., final: _Optional[bool] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("sha256", "size", "inline")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    size: int
    inline: bytes
    def __init__(self, sha256: _Optional[bytes] = ..., size: _Optional[int] = ..., inline: _Optional[bytes] = ...) -> None: ...

class Question(_message.Message):
    __slots__ = ("id", "kind", "run", "round", "attempt", "version", "spec", "payload", "rank")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    kind: Kind
    run: str
    round: int
    attempt: int
    version: str
    spec: Blob
    payload: Blob
    rank: int
    def __init__(self, id: _Optional[bytes] = ..., kind: _Optional[_Union[Kind, str]] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., version: _Optional[str] = ..., spec: _Optional[_Union[Blob, _Mapping]] = ..., payload: _Optional[_Union[Blob, _Mapping]] = ..., rank: _Optional[int] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("question", "kind", "weight", "metrics", "reason", "payload")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    question: bytes
    kind: str
    weight: float
    metrics: _containers.ScalarMap[str, float]
    reason: str
    payload: Blob
    def __init__(self, question: _Optional[bytes] = ..., kind: _Optional[str] = ..., weight: _Optional[float] = ..., metrics: _Optional[_Mapping[str, float]] = ..., reason: _Optional[str] = ..., payload: _Optional[_Union[Blob, _Mapping]] = ...) -> None: ...

class Want(_message.Message):
    __slots__ = ("sha256", "offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    offset: int
    def __init__(self, sha256: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("sha256", "offset", "data")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    offset: int
    data: bytes
    def __init__(self, sha256: _Optional[bytes] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Received(_message.Message):
    __slots__ = ("question", "reason")
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    question: bytes
    reason: str
    def __init__(self, question: _Optional[bytes] = ..., reason: _Optional[str] = ...) -> None: ...

class Exchange(_message.Message):
    __slots__ = ("body",)
    BODY_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    def __init__(self, body: _Optional[bytes] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("body",)
    BODY_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    def __init__(self, body: _Optional[bytes] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: str
    def __init__(self, state: _Optional[str] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("csr",)
    CSR_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    def __init__(self, csr: _Optional[bytes] = ...) -> None: ...

class Renewed(_message.Message):
    __slots__ = ("chain",)
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    chain: bytes
    def __init__(self, chain: _Optional[bytes] = ...) -> None: ...

class Bye(_message.Message):
    __slots__ = ("reason", "after_seconds")
    REASON_FIELD_NUMBER: _ClassVar[int]
    AFTER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    after_seconds: float
    def __init__(self, reason: _Optional[str] = ..., after_seconds: _Optional[float] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("layout", "config", "base", "start")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    layout: str
    config: str
    base: str
    start: bytes
    def __init__(self, layout: _Optional[str] = ..., config: _Optional[str] = ..., base: _Optional[str] = ..., start: _Optional[bytes] = ...) -> None: ...
