"""What a run's privacy will be at its end, and whether its noise leaves anything to learn: before it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from .client.batches import steps_of
from .privacy.accounting import spent, too_large
from .privacy.banded import banded_of
from .privacy.events import Event
from .privacy.example_level import example_level_of
from .privacy.mechanism import mechanism_of
from .promise import marked
from .protocols.recipes import recipe_named
from .protocols.spec import RunSpec

DROWNS = 3.0
"""Noise over clip from here on: such a run cannot learn."""


@dataclass(frozen=True)
class Forecast:
    """ε at the end under the sampling that the spec declares, of the node with the largest where nodes differ.

    `noise_to_clip` is the norm of a step's noise over the largest norm of the mean that it is added to; of noise that is
    correlated over rounds, that of the independent noise which would leave as much in the end. `protected` is how many clients, or examples of the smallest node, share the promise.
    """

    unit: str
    epsilon: float | None = None
    delta: float | None = None
    method: str | None = None
    noise_multiplier: float | None = None
    noise_to_clip: float | None = None
    protected: int = 0
    secret: bool = True

    def text(self) -> str:
        if self.epsilon is None or self.noise_to_clip is None:
            return "none: no formal guarantee"
        line = (
            f"{self.unit}-level, ε = {self.epsilon:.3g} at δ = {self.delta:g} in the end ({self.method}), "
            f"noise multiplier {self.noise_multiplier:.3g}, noise ÷ clip {self.noise_to_clip:.2g}"
        )
        line = marked(line, self.secret)
        if self.noise_to_clip > DROWNS:
            line += (
                f". Above {DROWNS:g} such a run cannot learn: allow more ε, train fewer parameters, or take more nodes "
                "(or larger batches)"
            )
        if self.delta is not None and (warning := too_large(self.delta, self.protected, f"{self.unit}s")):
            line += f". {warning}"
        return line


def forecast(spec: RunSpec, sizes: Sequence[int], dimensions: int) -> Forecast:
    """`sizes` are the numbers of examples of the nodes that have any; `dimensions` is what a node sends.

    Raises PrivacyError for a cap that no noise can meet.
    """
    privacy, rounds = spec.privacy, spec.run.rounds
    secret = privacy.noise == "secret"
    event: Event
    match privacy.unit, privacy.mechanism:
        case "client", "banded":
            protected = privacy.population or len(sizes)
            banded = banded_of(spec, protected, dimensions)
            event, noise_std, expected = banded.event(secret=secret), banded.independent_std, banded.expected
        case "client", _:
            protected = privacy.population or len(sizes)
            mechanism = mechanism_of(spec, protected, dimensions)
            event, noise_std, expected = mechanism.event(rounds, secret=secret), mechanism.noise_std, mechanism.expected
        case "example", _:
            protected = min(sizes)  # the smallest node has the largest share of its examples in a batch
            steps = rounds * (1 if recipe_named(spec.recipe.name).zeroth else steps_of(protected, spec.local))
            level = example_level_of(spec, protected, dimensions, steps)
            event, noise_std, expected = level.event(steps, secret=secret), level.noise_std, level.expected
        case _:
            return Forecast("none")
    account = spent([event], privacy.delta)
    noise = noise_std * sqrt(dimensions) / expected
    return Forecast(
        privacy.unit,
        account.epsilon,
        privacy.delta,
        account.method,
        event.noise_multiplier,
        noise / privacy.clip,
        protected,
        secret,
    )
