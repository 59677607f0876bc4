"""The devices of a simulated federation: how long a node's part of a round takes, and whether it drops out.

Each node's speed and link are drawn by its key when it is asked, so that nothing is kept of the others.
"""

from dataclasses import dataclass
from math import exp

from ..protocols.errors import SpecError
from ..protocols.keys import derive, generator
from ..protocols.legality import recipe_of
from ..protocols.spec import Fleet, RunSpec
from .availability import microseconds


@dataclass(frozen=True)
class Devices:
    """The nodes' devices, by key of the run's seed."""

    fleet: Fleet
    seed: int

    def seconds(self, node: int, examples: float, down: int, up: int) -> float:
        """From the assignment's first byte to the update's last: download, training and upload, in seconds.

        `examples` are those that the node trains on in the round, one that is used twice counted twice; `down` and `up`
        are bytes.
        """
        speed, link = generator(derive(self.seed, "device", node)).standard_normal(2)
        speed, link = exp(self.fleet.speed_spread * speed), exp(self.fleet.link_spread * link)
        return seconds(self.fleet, examples, down, up, speed=speed, link=link)

    def duration(self, node: int, examples: float, down: int, up: int) -> int:
        """The same on the simulated clock, in microseconds."""
        return microseconds(self.seconds(node, examples, down, up))

    def drops(self, node: int, round_: int, attempt: int) -> bool:
        """Whether the node never answers what it is asked."""
        if self.fleet.dropout == 0:
            return False
        return bool(generator(derive(self.seed, "drops out", round_, node, attempt)).random() < self.fleet.dropout)


def seconds(fleet: Fleet, examples: float, down: int, up: int, *, speed: float = 1.0, link: float = 1.0) -> float:
    """The part of one node in a round, of the median device or of one that is so many times as fast."""
    total = 2 * fleet.latency_seconds
    if fleet.examples_per_second is not None:
        total += examples / (fleet.examples_per_second * speed)
    for volume, mbps in ((down, fleet.downlink_mbps), (up, fleet.uplink_mbps)):
        if mbps is not None:
            total += 8 * volume / (mbps * 1e6 * link)
    return total


def fleet_of(spec: RunSpec) -> Fleet | None:
    """The spec's fleet. Raises SpecError where the run has no place for one."""
    fleet, privacy = spec.fleet, spec.privacy
    if fleet is None:
        return None
    if recipe_of(spec).zeroth:
        raise SpecError(
            f'[fleet] is illegal with recipe.name = "{spec.recipe.name}" in this version: exchanges of codes have no '
            "simulated clock. Nearest legal: remove [fleet]."
        )
    if not fleet.comes_and_goes or privacy.unit != "client":
        return fleet
    key = f"fleet.available = {fleet.available:g}" if fleet.trace is None else f'fleet.trace = "{fleet.trace}"'
    if privacy.mechanism == "gaussian" and spec.participation.sampling != "all":
        raise SpecError(
            f'{key} is illegal with privacy.unit = "client" and participation.sampling = '
            f'"{spec.participation.sampling}": the draw is accounted as one from all clients, and those that are not '
            'there cannot be drawn. Nearest legal: privacy.mechanism = "banded", which draws nobody.'
        )
    if privacy.population is None:
        raise SpecError(
            f"{key} needs privacy.population: who is there when the run begins is not everybody, and the number of "
            "clients has to be public and fixed."
        )
    return fleet
