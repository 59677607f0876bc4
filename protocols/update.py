"""What travels between the server and a node: a Description once, then Assignments down and Updates up."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .layout import AdapterLayout, Flat

Kind = Literal["delta", "empty", "refused"]


@dataclass(frozen=True)
class Description:
    """What the server learns of the model before the first round: it never loads the model itself.

    `start` is the adapter that round 1 starts from (fp32, the whole layout); `config` is peft's adapter_config.json.
    """

    layout: AdapterLayout
    start: Flat
    config: Mapping[str, Any]
    base: str

    @property
    def version(self) -> str:
        return version_of(self.layout, self.start)


def version_of(layout: AdapterLayout, flat: Flat) -> str:
    """The content hash by which a global adapter is known (SHA-256 of the layout's digest and the fp32 values)."""
    return hashlib.sha256(layout.digest.encode() + flat.tobytes()).hexdigest()


@dataclass(frozen=True)
class Assignment:
    """What one node is asked to do in one round: train from the global adapter `version`, coded in `payload`.

    `rank` is the one at which the server has truncated the adapter, and at which the node trains; 0: the adapter's own.
    """

    run: str
    round: int
    attempt: int
    node: int
    version: str
    payload: bytes = field(repr=False)
    rank: int = 0


@dataclass(frozen=True)
class Update:
    """What one node sends for one round.

    `kind` is `delta` (trained minus received tensors, over the recipe's trained layout) or `empty` (a node without
    data, or with nothing to send) or `refused`, for the node's own `reason`. `weight` is the number of examples the node holds.

    `rank` is the assignment's, which the server sets when it takes the update in: a node does not tell it. None: it was
    taken in before ranks were kept.
    """

    run: str
    round: int
    attempt: int
    node: int
    version: str
    kind: Kind
    weight: float
    payload: bytes = field(repr=False)
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    rank: int | None = None


def refused(asked: Assignment, reason: str) -> Update:
    """The answer that tells nothing but why: no weight, which could be the number of examples, and no metrics."""
    own = (asked.run, asked.round, asked.attempt, asked.node, asked.version)
    return Update(*own, kind="refused", weight=0.0, payload=b"", reason=reason)
