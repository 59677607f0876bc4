"""Model and data of one run after another of a table: what the frozen blocks gave for an example is computed once."""

from dataclasses import replace

import numpy as np

from fedapt.protocols.spec import RunSpec
from fedapt.sim.federation import Federation, build

_federations: dict[str, Federation] = {}


def federation_of(spec: RunSpec) -> Federation:
    """Model and data of a spec. Runs that differ in rate or codec alone share them; all share the frozen blocks'
    states, which are the same whatever is adapted above."""
    of_method = f"{spec.recipe.model_dump()} {spec.adapter.model_dump()}"
    of_data = f"{spec.data}"
    key = f"{of_method} {spec.run.seed} {of_data}"
    if key not in _federations:
        like = next((known for name, known in _federations.items() if name.endswith(of_data)), None)
        for name in [
            name for name in _federations if not name.startswith(of_method) and _federations[name] is not like
        ]:
            del _federations[name]
        _federations[key] = build(spec) if like is None else over_the_same_texts(build(spec), like)
    return _federations[key].under(spec)


def over_the_same_texts(federation: Federation, like: Federation) -> Federation:
    """The federation with the examples of another of the same data, so that what is known of them stays known.

    The tables are divided by the run's seed: only those that are the same text by text are exchanged.
    """
    texts, others = federation.client.sites.examples, like.client.sites.examples
    if not all(map(np.array_equal, texts.inputs, others.inputs)):
        return federation
    federation.client.adapted.prefix.share(like.client.adapted.prefix)
    own = federation.client.at(replace(federation.client.sites, examples=others))
    return replace(federation, client=own, evaluation=like.evaluation)
