"""Keyed randomness: every draw has a name, so that no order of events can change it (DESIGN §7).

None of this is for privacy: noise and private sampling come from the operating system's CSPRNG.
"""

import hashlib

import numpy as np


def derive(seed: int, purpose: str, *parts: int | str) -> int:
    """A 128-bit key for one purpose of one run.

    `parts` say which draw it is (round, node, step, …). Two different lists never share a key: every part is
    written with its type and length before hashing.
    """
    digest = hashlib.sha256()
    for part in (seed, purpose, *parts):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest()[:16], "little")


def generator(key: int) -> np.random.Generator:
    """A counter-based generator (Philox) that starts at `key`."""
    return np.random.Generator(np.random.Philox(key=key))
