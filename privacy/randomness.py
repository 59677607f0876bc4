"""Where random bits come from: the operating system, or, in a simulation that says so, a key.

Noise and sampling take their bits as an argument, so the code that a simulation tries is the code that protects.
"""

import os
from typing import Any, Protocol

import numpy as np

from ..protocols.keys import generator
from ..protocols.spec import Privacy

Integers = np.ndarray[Any, np.dtype[np.int64]]


class Randomness(Protocol):
    """A source of fair bits that gives none of them twice."""

    @property
    def secret(self) -> bool:
        """Whether nobody can know or repeat the bits. Privacy is claimed for secret ones alone."""

    def octets(self, count: int) -> bytes:
        """The next `count` bytes: independent and uniform."""


class SecretRandomness:
    """The operating system's CSPRNG, without a seed or a buffer: no state is left behind that could be replayed.

    Safe in several threads and after a fork. No global generator (`random`, NumPy, torch) plays a part.
    """

    @property
    def secret(self) -> bool:
        return True

    def octets(self, count: int) -> bytes:
        """The next `count` bytes: independent and uniform."""
        return os.urandom(count)


class SimulationRandomness:
    """Bytes that follow from a key (`protocols.keys.derive`): a simulation repeats itself, and nothing in it is private.

    Whoever knows the key can subtract the noise, so what was drawn from here must be labelled as not private. The
    object has a place in its stream: give each purpose, round and node a key of its own.
    """

    def __init__(self, key: int) -> None:
        self._generator = generator(key)

    @property
    def secret(self) -> bool:
        return False

    def octets(self, count: int) -> bytes:
        """The next `count` bytes: uniform, and the same for everybody with this key."""
        return self._generator.bytes(count)


def randomness_of(privacy: Privacy, key: int) -> Randomness:
    """The operating system's; in a watermarked simulation, one that `key` repeats."""
    return SecretRandomness() if privacy.noise == "secret" else SimulationRandomness(key)
