"""A dry run: one step of a spec on this site's own data, and what would leave the site, before anything does."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..privacy.example_level import example_level_of
from ..protocols.codecs import CODECS
from ..protocols.errors import PrivacyError, SpecError
from ..protocols.legality import rank_for, recipe_of
from ..protocols.spec import RunSpec
from ..protocols.update import Assignment, version_of
from .accounts import Accounts
from .batches import steps_of
from .client import Client
from .evaluation import score
from .loading import load
from .policy import Policy
from .site import Site


@dataclass(frozen=True)
class Rehearsal:
    """What one step has shown.

    `labels` has how many examples each class has, empty without classes. `kind`, `bytes`, `weight` and `metrics` are of
    the update that would leave; `tensors` is how many tensors it changes, and `parameters` how many numbers.
    """

    run: str
    source: str
    examples: int
    lengths: tuple[int, int, int]
    labels: Mapping[int, int]
    evaluation: Mapping[str, float]
    kind: str
    bytes: int
    codec: str
    tensors: int
    parameters: int
    weight: float
    metrics: Mapping[str, float]
    privacy: str
    device: str
    base: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        low, middle, high = self.lengths
        classes = ", ".join(f"{label}: {count:,}" for label, count in self.labels.items())
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items()) or "none"
        scores = ", ".join(f"{name} {value:.4g}" for name, value in self.evaluation.items())
        return "\n".join(
            [
                f"run {self.run} on {self.device}; base {self.base}",
                f"data       {self.source}: {self.examples:,} examples, {low} to {high} long (median {middle})",
                *([f"labels     {classes}"] if self.labels else []),
                f"scores     {scores} before training, on this site's data; they stay here",
                f"would send {self.kind}: {self.bytes:,} bytes ({self.codec})",
                f"that is    {self.parameters:,} numbers of {self.tensors} tensors",
                f"and        weight {self.weight:g}; metrics: {shown}",
                f"privacy    {self.privacy}",
                "Nothing has left this machine.",
            ]
        )


def rehearse(site: Site, spec: RunSpec, node: int = 0) -> Rehearsal:
    """Load, train one step, and look at the update. Nothing is sent, and nothing is charged.

    Raises PrivacyError where the policy objects, SpecError, DataError and ModelError where something does not fit.
    """
    _require(site.problems(spec))
    if recipe_of(spec).zeroth:
        raise SpecError(
            f"recipe.name = {spec.recipe.name}: nothing is trained here in a dry run of it; "
            f"{spec.zeroth.directions} codes leave in each of {spec.run.rounds} exchanges (`fedapt plan` counts the bytes)"
        )
    short = _one_step(spec)
    # The policy is asked about the whole run: noise that is solved for one step would be too little for it.
    loaded = load(site.model_copy(update={"policy": Policy()}), short, node, Accounts())
    client, base = loaded.client, loaded.client.adapted.base_digest()
    _require(site.policy.problems(spec, base))
    privacy = _privacy(spec, site, client)
    scores = score(client.adapted, loaded.evaluation).metrics(client.adapted.task)
    rank = rank_for(spec, site.train.most_rank or 0)
    (update,) = client.train([_first(client, node, rank)])
    sent, examples = client.shared.sent(1, rank), client.sites.examples
    low, middle, high = np.percentile(examples.lengths, [0, 50, 100]).astype(int).tolist()
    return Rehearsal(
        run=spec.run.name,
        source=site.require_data().source,
        examples=len(examples),
        lengths=(low, middle, high),
        labels=_classes(client),
        evaluation=scores,
        kind=update.kind,
        bytes=len(update.payload),
        codec=spec.wire.codec,
        tensors=len(sent.tensors),
        parameters=sent.size,
        weight=update.weight,
        metrics=dict(update.metrics),
        privacy=privacy,
        device=str(client.adapted.device),
        base=base,
    )


def _require(objections: list[str]) -> None:
    if objections:
        raise PrivacyError(" ".join(objections))


def _one_step(spec: RunSpec) -> RunSpec:
    raw = spec.model_dump(exclude_none=True, exclude={"data"})
    raw["local"].pop("epochs", None)
    raw["local"]["steps"] = 1
    return RunSpec.check(raw)


def _first(client: Client, node: int, rank: int) -> Assignment:
    """What the server would ask in round 1."""
    own = client.shared.delivered(1, rank)
    state = client.shared.received(1).cut(client.shared.initial_state(), own)
    payload = CODECS[client.spec.wire.downlink].encode(state, own, 0)
    version = version_of(client.adapted.layout, client.start)
    return Assignment(client.spec.run.name, 1, 1, node, version, payload, rank)


def _classes(client: Client) -> dict[int, int]:
    """How many examples each class has; empty where there are no classes."""
    if client.spec.model.labels is None:
        return {}
    counts = Counter(int(label) for label in client.sites.examples.labels)
    return {label: counts[label] for label in range(client.spec.model.labels)}


def _privacy(spec: RunSpec, site: Site, client: Client) -> str:
    """What protects this site's examples in the whole run. Raises PrivacyError where it is less than the policy wants."""
    privacy = spec.privacy
    if privacy.unit == "none":
        return "none: the update is a plain one, and whoever has it can learn from it about the data"
    if privacy.unit == "client":
        return "client: the update leaves as it is, and the server adds the noise"
    count = len(client.sites.examples)
    steps = steps_of(count, spec.local) * spec.run.rounds
    level = example_level_of(spec, count, client.trained.size, steps)
    site.policy.require_noise(level.noise_multiplier)
    return (
        f"example: noise of {level.noise_multiplier:.3g} x the clip {privacy.clip:g} in each step, added here; "
        f"at most epsilon = {privacy.epsilon:g} at delta = {privacy.delta:g} in this run"
    )
