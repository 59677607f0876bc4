"""A client's answer to an exchange: which examples, what is clipped and noised at the site, and what it is charged.

    unit none      mean slope of a keyed batch, one for each direction
    unit client    that vector, clipped to privacy.clip; the server clips again, sums and adds noise
    unit example   one vector an example of a Poisson batch, each clipped ONCE over all directions; their sum is noised
                   here, from the operating system's CSPRNG, and only then becomes codes

The directions of an exchange are one vector with one L2 clip, so K directions cost what one does (DPZero,
arXiv 2310.09639, and DP-ZO, arXiv 2401.04343, noise each scalar). The released code of DPZero draws that noise from the
generator that it has just seeded for the direction, so whoever knows the direction can take it away again; no seed of ours
is anywhere near it.
"""

from collections.abc import Sequence

import numpy as np

from ..kernels.cohort import fastest
from ..kernels.directions import Doubles, Floats
from ..privacy.clipping import clip
from ..privacy.example_level import ExampleLevel, example_level_of
from ..privacy.randomness import randomness_of
from ..protocols.errors import PrivacyError
from ..protocols.exchange import terms_of
from ..protocols.keys import derive
from ..protocols.update import Assignment
from .batches import plan_batches
from .client import Client
from .exchanger import Exchanger, Probe, Slopes
from .policy import told
from .private import warn_of_delta
from .tasks import Indices
from .zeroth import Ask, Probing


class ClientProber:
    """A Prober over a client's model, data, accounts and site policy."""

    def __init__(self, client: Client) -> None:
        self.client, self.spec = client, client.spec
        self.local = client.spec.local.model_copy(update={"steps": 1, "epochs": None})
        self._probing: Probing | None = None

    def __call__(self, weights: Floats, probes: Sequence[Probe]) -> list[Slopes]:
        if self.client.objections:
            return [Slopes(refusal=" ".join(self.client.objections))] * len(probes)
        held = [probe for probe in probes if len(self._own(probe))]
        if self.spec.privacy.unit == "example":
            found = {probe.node: self._private(weights, probe) for probe in held}
        else:
            found = dict(zip((probe.node for probe in held), self._mean(weights, held), strict=True))
        return [found.get(probe.node, Slopes()) for probe in probes]

    def _own(self, probe: Probe) -> Indices:
        return self.client.sites.indices.get(probe.node, np.zeros(0, np.int64))

    def _mean(self, weights: Floats, probes: Sequence[Probe]) -> list[Slopes]:
        """Slopes of the nodes' keyed batches, all as one cohort."""
        if not probes:
            return []
        examples, asks = self.client.sites.examples, [Ask(self._batch(probe), probe.directions) for probe in probes]
        slopes = self._over(asks[0].rows).slopes(examples, weights, asks, probes[0].radius)
        if self.spec.privacy.unit == "client":
            slopes = [clip(own, self.spec.privacy.clip)[0] for own in slopes]
        return [Slopes(own) for own in slopes]

    def _batch(self, probe: Probe) -> Indices:
        own = self._own(probe)
        key = (self.spec.run.seed, probe.number, probe.node)
        rows: Indices = own[plan_batches(self.client.sites.examples.lengths[own], self.local, *key)[0]]
        return rows

    def _private(self, weights: Floats, probe: Probe) -> Slopes:
        """Charged before anything is computed from the data; an empty draw is answered with noise like any other."""
        privacy, accounts, own = self.spec.privacy, self.client.accounts, self._own(probe)
        source = randomness_of(privacy, derive(self.spec.run.seed, "private slopes", probe.number, probe.node))
        asked = Assignment(self.spec.run.name, probe.number, 1, probe.node, "", b"")
        per_run, in_all = self.client.policy.caps(privacy)
        try:
            mechanism = self._mechanism(len(own), len(probe.directions))
            self.client.policy.require_noise(mechanism.noise_multiplier)
            event = mechanism.event(1, secret=source.secret)
            accounts.charge(asked, event, privacy.delta, per_run=per_run, in_all=in_all)
        except PrivacyError as error:
            return Slopes(refusal=told(error, asked))
        rows = own[mechanism.draw(source)]
        sums = [mechanism.bounded(self._each(weights, probe, rows))] if len(rows) else []
        released: Doubles = mechanism.release(sums, source)
        if not self.spec.run.is_evaluated(probe.number):
            return Slopes(released)
        account = accounts.spent(asked, privacy.delta)
        return Slopes(released, epsilon=account.epsilon, private=account.private)

    def _each(self, weights: Floats, probe: Probe, rows: Indices) -> Doubles:
        """Each example's slopes, (rows, K)."""
        ask = Ask(rows, probe.directions)
        return self._over(rows).slopes_of_examples(self.client.sites.examples, weights, ask, probe.radius)

    def _mechanism(self, examples: int, directions: int) -> ExampleLevel:
        """Noise is solved for as if the node took part in every exchange: it can take part in no more."""
        warn_of_delta(self.spec.privacy.delta, examples)
        return example_level_of(self.spec, examples, directions, self.spec.run.rounds)

    def _over(self, rows: Indices) -> Probing:
        """The model with the forward to use, which is chosen once on a few rows of real data."""
        if self._probing is None:
            client = self.client
            adapted, trained = client.adapted, client.adapted.layout.select(client.recipe.trains)
            inputs = adapted.batch(client.sites.examples, [rows[:2], rows[:2]]).inputs
            forward = fastest(adapted.model, [adapted.parameter_names[t.name] for t in trained.tensors], inputs)
            self._probing = Probing(adapted, forward, trained, 2 if self.spec.zeroth.sides == "two" else 1)
        return self._probing


def exchanger_of(client: Client) -> Exchanger:
    """The exchanges of a client's run, whatever nodes it holds the data of."""
    layout = client.adapted.layout
    start = layout.cut(client.start, layout.select(client.recipe.trains))
    return Exchanger(client.spec.run.name, terms_of(client.spec), start, ClientProber(client))
