"""Model and data of one run after another of a table: what the frozen blocks gave for an example is computed once."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedapt.client.prefix import PrefixStates
from fedapt.client.tasks import Array, Examples
from fedapt.protocols.spec import RunSpec
from fedapt.sim.federation import Federation, build

_states = PrefixStates()
_sets: list[Examples] = []


def federation_of(spec: RunSpec) -> Federation:
    """Model and data of a spec. All specs of a process have one base and one task.

    The frozen blocks' states are the same whatever is adapted above, and however a seed divides the texts.
    """
    built = build(spec)
    built.adapted.prefix.share(_states)
    sites = replace(built.client.sites, examples=_known(built.client.sites.examples))
    return replace(built, client=built.client.at(sites), evaluation=_known(built.evaluation))


def _known(examples: Examples) -> Examples:
    """These examples, or the same ones of an earlier run, of which the states are known."""
    for known in _sets:
        if _same(known.inputs, examples.inputs) and _same(known.labels, examples.labels):
            return known
    _sets.append(examples)
    return examples


def _same(one: Sequence[Array], other: Sequence[Array]) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))
