"""Admission: what an update must be before anything is computed from it. A refusal never ends a round."""

import math

import numpy as np

from ..protocols.codecs import Uplink
from ..protocols.errors import PayloadError
from ..protocols.layout import AdapterLayout
from ..protocols.update import Assignment, Update

MAX_WEIGHT = 1e12
MAX_VALUE = 1e6
"""No honest change of an adapter is near it, and sums of such values stay far from overflow."""


def refusal(update: Update, assignment: Assignment | None, uplink: Uplink, trained: AdapterLayout) -> str | None:
    """Why the update is refused, or None. `assignment` is what this node was asked in this round, if anything."""
    if assignment is None:
        return f"node {update.node} was not asked in this round"
    return _stale(update, assignment) or _unfit(update, uplink, trained)


def _stale(update: Update, assignment: Assignment) -> str | None:
    """Why the update answers another assignment."""
    if (update.run, update.round, update.attempt) != (assignment.run, assignment.round, assignment.attempt):
        return (
            f"stale: round {update.round} attempt {update.attempt}, not {assignment.round} attempt {assignment.attempt}"
        )
    if update.version != assignment.version:
        return f"trained from adapter {update.version[:12]}, not {assignment.version[:12]}"
    return None


def _unfit(update: Update, uplink: Uplink, trained: AdapterLayout) -> str | None:
    """Why the update's own content cannot be used."""
    if not (math.isfinite(update.weight) and 0 <= update.weight <= MAX_WEIGHT):
        return f"weight {update.weight} is not in 0 … {MAX_WEIGHT:g}"
    if update.kind == "refused":
        return f"the node refuses: {update.reason}"
    if update.kind == "empty":
        return "an empty update carries a payload" if update.payload else None
    if update.weight == 0:
        return "a trained update has weight 0"
    try:
        change, _ = uplink.decode(update.payload, trained)
        largest = float(np.abs(change).max(initial=0.0))
    except PayloadError as error:
        return str(error)
    return f"a value of {largest:g} is over {MAX_VALUE:g}" if largest > MAX_VALUE else None
