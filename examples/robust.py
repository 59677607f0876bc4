"""Why the usual robust rules fail on LoRA factors, and what holds instead.

Ten nodes send the two factors of one LoRA module. Honest nodes agree on the product B·A up to some noise, but each
has its own gauge: `(B·G)·(G⁻¹·A)` is the same update for every invertible G, and nothing in training picks one. Two
nodes are bad: they send the update times 100, or with its sign flipped, in whatever gauge serves them.

The table shows ‖result − truth‖/‖truth‖: 1 is as bad as no update at all. Rules on factors fail even without an
attack, or choose the attacker, whose factors are the shortest. Rules on products see no gauge. Of those, clipping
bounds what a node can do, and does not find out who lies: against a flipped sign it is no better than the mean.

    python examples/robust.py

NumPy alone; it takes about a second.
"""

import numpy as np

from fedapt.kernels.lowrank import LowRank, Matrix, weighted_sum
from fedapt.kernels.robust import clip, coordinate_median, geometric_median, gram, krum
from fedapt.protocols.keys import derive, generator

NODES, BAD, OUT, IN, RANK = 10, 2, 96, 64, 4
NOISE = 0.2  # of an honest node's update, relative to the truth


def main() -> dict[str, dict[str, float]]:
    """Print the table; returns error by rule and attack."""
    random = generator(derive(0, "examples/robust"))
    truth = LowRank(random.standard_normal((OUT, RANK)), random.standard_normal((RANK, IN)))
    attacks = {"nobody": None, "times 100": 100.0, "sign flipped": -1.0}
    errors: dict[str, dict[str, float]] = {rule: {} for rule in RULES}
    for attack, factor in attacks.items():
        updates = [honest(truth, random) for _ in range(NODES)]
        if factor is not None:
            updates[:BAD] = [bad(truth, factor)] * BAD
        for rule, aggregate in RULES.items():
            errors[rule][attack] = aggregate(updates).minus(truth).norm() / truth.norm()
    print(
        f"{'error after ' + str(BAD) + ' of ' + str(NODES) + ' attack:':40}", *(f"{attack:>13}" for attack in attacks)
    )
    for rule, row in errors.items():
        print(f"{rule:40}", *(f"{value:13.3g}" for value in row.values()))
    return errors


def honest(truth: LowRank, random: np.random.Generator) -> LowRank:
    """The truth with noise of its rank, in a random gauge."""
    noise = NOISE / np.sqrt(2)
    b = truth.b + noise * random.standard_normal(truth.b.shape)
    a = truth.a + noise * random.standard_normal(truth.a.shape)
    gauge = random.standard_normal((RANK, RANK))
    return LowRank(b @ gauge, np.linalg.solve(gauge, a))


def bad(truth: LowRank, factor: float) -> LowRank:
    """`factor` times the truth in the gauge of shortest factors: near to everybody, if one looks at factors."""
    best = truth.truncate(RANK)
    lengths = np.sqrt(np.linalg.norm(best.b, axis=0))
    size = np.sqrt(abs(factor))
    return LowRank(np.sign(factor) * size * best.b / lengths, size * lengths[:, None] * best.a)


def weighed(updates: list[LowRank], weights: Matrix) -> LowRank:
    return weighted_sum(list(zip(weights.tolist(), updates, strict=True)))


def inner(updates: list[LowRank]) -> Matrix:
    """Inner products of the products: all that a rule without a gauge needs to see."""
    return gram([[update] for update in updates])


def factors(updates: list[LowRank]) -> Matrix:
    """All numbers that each node sends, (K, n): what a rule sees that does not know of gauges."""
    return np.stack([np.concatenate([update.b.ravel(), update.a.ravel()]) for update in updates])


def split(middle: Matrix) -> LowRank:
    return LowRank(middle[: OUT * RANK].reshape(OUT, RANK), middle[OUT * RANK :].reshape(RANK, IN))


def factor_krum(updates: list[LowRank]) -> LowRank:
    flat = factors(updates)
    return weighed(updates, krum(flat @ flat.T, BAD))


RULES = {
    "factors: mean": lambda updates: split(factors(updates).mean(axis=0)),
    "factors: coordinate median": lambda updates: split(coordinate_median(factors(updates))),
    "factors: Krum": factor_krum,
    "products: mean": lambda updates: weighed(updates, np.full(NODES, 1 / NODES)),
    "products: clipped mean": lambda updates: weighed(updates, clip(inner(updates))),
    "products: Krum": lambda updates: weighed(updates, krum(inner(updates), BAD)),
    "products: Multi-Krum": lambda updates: weighed(updates, krum(inner(updates), BAD, NODES - BAD)),
    "products: geometric median": lambda updates: weighed(updates, geometric_median(inner(updates))),
}

if __name__ == "__main__":
    main()
