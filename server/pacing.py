"""How far a Step moves the lattice: learning rate, range of a code and number of codes as one integer times a unit.

    w −= rate / expected · Σ slope·z      slope = count·2^scale
       = multiplier·2^exponent · Σ count·z

`expected` is a constant, how many codes an exchange expects, so that no Step depends on who answered. The multiplier is
4 to 8 where a segment has room for it, which is the rate to an eighth; where the exponent changes, or the open segment
could overflow, the next one opens. All of it is announced in the Step, so no node computes a cosine.

Weight decay is decoupled from the slopes, as in AdamW (arXiv 1711.05101): w is multiplied by 1 − rate·decay for each
exchange. That leaves the lattice, so it is done where a segment opens, for all exchanges of the one before, and one opens
every DECAY_EVERY exchanges at the latest: w is rounded once in so many exchanges, and not in each.
"""

from dataclasses import dataclass, replace
from math import ldexp, prod

from ..kernels.lattice import LIMIT, check_plan, longest_segment
from ..kernels.replica import Replica
from ..protocols.errors import SpecError
from ..protocols.exchange import DECAYS, Step, Terms
from ..protocols.scalars import rounded_power
from ..protocols.spec import RunSpec

DECAY_EVERY = 64
"""Exchanges that share a rounding where parameters decay."""

ROOM = 16
"""Exchanges of the largest codes that a segment must hold, before the learning rate gets a finer multiplier."""


@dataclass(frozen=True)
class Pace:
    """`expected` codes an exchange, along `directions` directions each, of at most `largest` counts.

    SpecError where not even one exchange fits a segment, or one's decay leaves nothing of a parameter.
    """

    spec: RunSpec
    expected: int
    largest: int

    def __post_init__(self) -> None:
        check_plan(self.largest * self.expected, 1)
        local = self.spec.local
        if local.weight_decay * local.learning_rate >= 1:
            raise SpecError(
                f"local.weight_decay = {local.weight_decay:g} times local.learning_rate = {local.learning_rate:g} is not "
                "below 1: each exchange would take more of a parameter than there is. Choose a smaller one."
            )

    @property
    def largest_multiplier(self) -> int:
        """8, or what of it leaves a segment room for ROOM exchanges: 4, 2, or 1."""
        fits = LIMIT // (self.largest * self.expected * ROOM)
        return max(power for power in (1, 2, 4, 8) if power <= max(fits, 1))

    @property
    def longest_segment(self) -> int:
        """Exchanges that a segment holds whatever the nodes send."""
        return longest_segment(self.largest * self.expected * self.largest_multiplier)

    def rate(self, number: int) -> float:
        """The learning rate of an exchange, counted from 1."""
        return self.spec.local.in_round(number, self.spec.run.rounds).learning_rate

    def factors(self, number: int, scale: int) -> tuple[int, int]:
        """(multiplier, exponent) of an exchange, counted from 1."""
        multiplier, exponent = rounded_power(max(self.rate(number), 1e-30) * ldexp(1.0, scale) / self.expected)
        while multiplier > self.largest_multiplier:
            multiplier, exponent = max(1, round(multiplier / 2)), exponent + 1
        return multiplier, exponent

    def decay(self, opened: int, number: int) -> int:
        """What the exchanges from `opened` to the one before `number` take of each parameter, in units of 1 / DECAYS."""
        rates = [self.rate(past) for past in range(opened, number)]
        keep = prod(1 - self.spec.local.weight_decay * rate for rate in rates)
        return min(round((1 - keep) * DECAYS), DECAYS - 1)

    def step(self, replica: Replica, terms: Terms, scale: int, body: bytes, opened: int = 1) -> Step:
        """The next Step after `replica`, in the open segment where that has the unit and the room.

        `opened` is the number of the step that opened it.
        """
        number, segment = replica.number + 1, replica.lattice.segment
        multiplier, exponent = self.factors(number, scale)
        step = Step(number, segment.number, exponent, multiplier, scale, body)
        reach = replica.lattice.reach + multiplier * int(abs(terms.applied(step)[2]).sum())
        if segment.number == 0:
            return replace(step, segment=1)
        due = self.spec.local.weight_decay > 0 and number - opened >= DECAY_EVERY
        if exponent != segment.exponent or reach >= LIMIT or due:
            step = replace(step, segment=segment.number + 1, decay=self.decay(opened, number))
        return step

    def bound(self, number: int, scale: int) -> float:
        """How far one code moves any parameter at most in an exchange: Formal guarantees, because codes are integers."""
        multiplier, exponent = self.factors(number, scale)
        return ldexp(multiplier * self.largest, exponent)
