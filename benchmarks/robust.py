"""A fifth of the nodes send bad updates: held-out loss of each aggregator, beside that of the same run with honest nodes.

    python benchmarks/robust.py

Twenty sites of Python code, the byte-level base, A and B trained (`flexlora`; rules on entries on `ffa`, where nodes share
A). Four nodes multiply their updates by 100, or flip the sign. Asked of the robust rules: at most 1.05 of the clean loss.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedapt.client.client import Client
from fedapt.protocols.codecs import codec_of
from fedapt.protocols.errors import PayloadError, RunError
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Update
from fedapt.server.coordinator import Coordinator
from fedapt.server.store import MemoryStore
from fedapt.sim.federation import Federation, build
from fedapt.sim.grid import LocalGrid

SPEC = """
[run]
rounds = 12
seed = 3
evaluate_every = 12
[model]
base = "builtin:byte-llama"
task = "causal-lm"
max_length = 64
[adapter]
rank = 4
[recipe]
name = "flexlora"
weighting = "uniform"
[local]
learning_rate = 5e-3
batch_size = 4
steps = 4
[data]
source = "builtin:stdlib"
limit = 400
evaluation_limit = 60
[data.partition]
kind = "iid"
clients = 20
"""
HOSTILE = range(0, 20, 5)
ATTACKS = {"honest": 1.0, "times 100": 100.0, "flipped": -1.0}
AGGREGATORS = {
    "flexlora": ("mean", "geometric-median", "krum", "multi-krum"),
    "ffa": ("mean", "clip", "median", "trimmed-mean", "geometric-median"),
}


class HostileGrid(LocalGrid):
    """A local grid on which some nodes send their change times a factor."""

    def __init__(self, client: Client, factor: float) -> None:
        super().__init__(client)
        self.factor = factor

    def replies(self, timeout: float) -> Iterator[Update]:
        for update in super().replies(timeout):
            yield self._spoiled(update) if update.node in HOSTILE else update

    def _spoiled(self, update: Update) -> Update:
        codec, layout = codec_of(self.client.spec.wire), self.client.shared.sent(update.round)
        try:
            change = self.factor * codec.decode(update.payload, layout)
        except PayloadError:  # the run has diverged
            return update
        return replace(update, payload=codec.encode(change, layout, update.round))


def final_loss(federation: Federation, spec: RunSpec, factor: float) -> float:
    """Infinite for a run that diverges."""
    grid = HostileGrid(federation.client, factor)
    coordinator = Coordinator(spec, grid, MemoryStore(), evaluate=federation.evaluate)
    try:
        *_, last = coordinator.rounds()
    except RunError:  # the adapter is so far off that no honest node gets a finite update any more
        return math.inf
    return float(last["evaluation"]["loss"])


def table(recipe: str, aggregators: Sequence[str]) -> None:
    plain = RunSpec.parse(SPEC).set(f"recipe.name={recipe}")
    federation = build(plain)
    clean = final_loss(federation, plain, 1.0)
    print(f"{recipe}: honest nodes, plain mean: held-out loss {clean:.3f}. Relative to it:")
    print(f"  {'':18}" + "".join(f"{attack:>12}" for attack in ATTACKS))
    for name in aggregators:
        spec = plain.set(f"recipe.aggregator={name}")
        own = replace(federation, client=federation.client.under(spec))
        losses = [final_loss(own, spec, factor) / clean for factor in ATTACKS.values()]
        print(f"  {name:18}" + "".join(f"{loss:12.3f}" for loss in losses), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=AGGREGATORS, default=list(AGGREGATORS))
    for recipe in parser.parse_args().recipes:
        table(recipe, AGGREGATORS[recipe])


if __name__ == "__main__":
    main()
