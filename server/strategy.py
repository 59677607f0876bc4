"""A recipe as a Flower Strategy, for a ServerApp and a ClientApp that train somebody's own peft model.

    strategy = fedapt.strategy("fedsvd", fraction_train=0.5)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(get_peft_model_state_dict(model)), num_rounds=10)

A client gets the whole adapter under peft's own names, and answers as with FedAvg: an ArrayRecord of the tensors after
training (values, not changes; those that the recipe keeps fixed may be left out) and a MetricRecord with
`num-examples`. A stock client cannot rebuild A from a rotation or draw it by key, so whole tensors travel here, and
`fedsvd` and `ffa` cost the bytes of A that fedapt's own clients save. No formal privacy guarantee.
"""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from ..kernels.lowrank import Matrix, orthonormalize
from ..protocols.errors import PayloadError, RunError, SpecError
from ..protocols.layout import A_SUFFIX, B_SUFFIX, AdapterLayout, Flat, Role, TensorSpec
from ..protocols.legality import initial_a, recipe_of
from ..protocols.shared import SharedAdapter, require_pairs
from ..protocols.spec import RunSpec
from .admission import MAX_VALUE, MAX_WEIGHT
from .advance import advance
from .optimizers import Buffers
from .rounds import Contribution
from .settling import effective_rank

logger = logging.getLogger("flwr")

TRAINED_FACTORS = "trained-factors"
"""The key of the train config that names the factors a client trains in this round: "A", "B" or "AB"."""

OF_FLOWER = set(inspect.signature(FedAvg.__init__).parameters) - {"self"}


def strategy(recipe: str = "fedsvd", **options: Any) -> "RecipeStrategy":
    """The recipe as a Flower Strategy that takes FedAvg's place.

    `options` are the keys of a spec's `[recipe]` (`optimizer`, `learning_rate`, `momentum`, `weighting`, `period`, …)
    and the arguments of Flower's FedAvg (`fraction_train`, `min_available_nodes`, `weighted_by_key`, …), which decides
    as ever who takes part. Raises SpecError for an unknown or illegal option, and for a recipe with frozen factors,
    which a stock client does not hold.
    """
    flower = {key: value for key, value in options.items() if key in OF_FLOWER}
    own = {key: value for key, value in options.items() if key not in OF_FLOWER}
    # The server never learns of which task the model is: a spec stands here for its rules about recipes alone.
    model = {"base": "in-memory", "task": "causal-lm"}
    spec = RunSpec.check({"model": model, "recipe": {"name": recipe, **own}}, where="strategy()")
    return RecipeStrategy(spec, **flower)


@dataclass(frozen=True)
class _Standing:
    """Where a run stands between two rounds. `arrays` is what Flower has to hand in for the next one."""

    shared: SharedAdapter
    state: Flat
    buffers: Buffers
    arrays: ArrayRecord

    def tensors(self, number: int) -> dict[str, Matrix]:
        """The whole adapter that clients get for a round, by peft's names."""
        return self.shared.layout.split(self.shared.whole(self.state, number))


@dataclass(frozen=True)
class _Reply:
    """What is usable of one client's answer: `change` is fp32 over the tensors that the round trains."""

    weight: float
    change: Flat
    metrics: MetricRecord


class RecipeStrategy(FedAvg):
    """One recipe in FedAvg's place; `strategy` makes it.

    Every round is `server.advance.advance`, as under fedapt's own coordinator. A reply that does not fit what was sent
    (names, shapes, fp32, finite, a fixed tensor that has changed) is left out with a warning; a round without a usable
    one changes nothing. `A` starts orthonormal where the recipe wants it, with the same product. The train config says
    in `trained-factors` what to train: "B", "A" or "AB". The averaged metrics also hold `aggregation_error`
    (of the averaging, before the server's own step) and `effective_rank`; neither where there is no pair of factors.
    """

    def __init__(self, spec: RunSpec, **options: Any) -> None:
        super().__init__(**options)
        self.recipe, self.spec = recipe_of(spec), spec
        if self.recipe.zeroth:
            raise SpecError(
                f'recipe.name = "{self.recipe.name}" exchanges codes, which a stock client does not know. '
                'Nearest legal: "fedsvd", or fedapt\'s own simulator and link.'
            )
        if self.recipe.has_frozen:
            nearest = "flora" if self.recipe.residual == "frozen" else "fedsvd"
            raise SpecError(
                f'recipe.name = "{self.recipe.name}" needs frozen factors beside the adapter, which a stock client '
                f'does not hold. Nearest legal: "{nearest}", or fedapt\'s own ClientApp.'
            )
        if self.recipe.streams:
            raise SpecError(
                f'recipe.name = "{self.recipe.name}" needs nodes that go on from tensors of their own, which a stock '
                'client forgets. Nearest legal: "fedit", or fedapt\'s own ClientApp.'
            )
        lacks = {
            "fisher": "information that a stock client does not send",
            "greedy-soup": "held-out data at the server",
        }
        if spec.recipe.aggregator in lacks:
            raise SpecError(
                f'recipe.aggregator = "{spec.recipe.aggregator}" needs {lacks[spec.recipe.aggregator]}. '
                'Nearest legal: "mean", or fedapt\'s own ServerApp and ClientApp.'
            )
        self._standing: _Standing | None = None

    def summary(self) -> None:
        """Log the recipe and FedAvg's own settings."""
        settings = self.spec.recipe
        logger.info("\t├──> Recipe: %s (%s)", self.recipe.name, self.recipe.paper)
        logger.info("\t│\t└──Server: %s, learning rate %g", settings.optimizer, settings.learning_rate)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's messages. Round 1 starts a run from `arrays`, whatever was before.

        Raises SpecError where the recipe cannot work on these arrays, and RunError where something has changed them
        since the last round.
        """
        if server_round == 1 or self._standing is None:
            self._standing = _begin(self.spec, arrays)
        elif arrays != self._standing.arrays:
            raise RunError(
                f"round {server_round} is to start from other arrays than the last one returned; a wrapper that "
                "changes them (by noise, for example) cannot stand around a recipe. Start anew with round 1"
            )
        trained = [t.name for t in self._standing.shared.sent(server_round).tensors]
        config[TRAINED_FACTORS] = "".join(f for f in "AB" if any(f".lora_{f}." in name for name in trained))
        return super().configure_train(server_round, _record(self._standing.tensors(server_round)), config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The whole adapter after the round and its metrics, or (None, None) where no reply was usable."""
        if self._standing is None:
            raise RunError(f"round {server_round} was never configured: call configure_train first")
        before, shared = self._standing, self._standing.shared
        usable = self._usable(before, server_round, replies)
        if not usable:
            logger.warning("round %d: no reply is usable; the adapter stays as it is", server_round)
            return None, None
        weights = np.array([1.0 if self.spec.recipe.weighting == "uniform" else reply.weight for reply in usable])
        weights /= weights.sum()
        updates = [Contribution(float(weight), reply.change) for weight, reply in zip(weights, usable, strict=True)]
        state, buffers, error = advance(
            shared, before.state, before.state, before.buffers, updates, number=server_round
        )
        after = replace(before, state=state, buffers=buffers)
        arrays = _record(after.tensors(server_round + 1))
        self._standing = replace(after, arrays=arrays)
        metrics = self.train_metrics_aggr_fn(_comparable([reply.metrics for reply in usable]), self.weighted_by_key)
        rank = effective_rank(shared.layout, shared.whole(state, server_round + 1))
        if error is not None and rank is not None:
            metrics["aggregation_error"], metrics["effective_rank"] = error, rank
        return arrays, metrics

    def _usable(self, standing: _Standing, number: int, replies: Iterable[Message]) -> list[_Reply]:
        """The replies that fit what was sent, in the order of their nodes; the others are logged."""
        sent, trained = standing.tensors(number), standing.shared.sent(number)
        usable = []
        for message in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            try:
                weight, arrays, metrics = self._opened(message)
                usable.append(_Reply(weight, _change(arrays, sent, trained, self.recipe.name), metrics))
            except PayloadError as problem:
                node = message.metadata.src_node_id
                logger.warning("round %d: the reply of node %d is left out: %s", number, node, problem)
        return usable

    def _opened(self, message: Message) -> tuple[float, ArrayRecord, MetricRecord]:
        """A reply's weight, arrays and metrics. Raises PayloadError."""
        if message.has_error():
            raise PayloadError(f"the client failed ({message.error.reason or f'error {message.error.code}'})")
        arrays = list(message.content.array_records.values())
        metrics = list(message.content.metric_records.values())
        if len(arrays) != 1 or len(metrics) != 1:
            raise PayloadError(
                f"it has {len(arrays)} ArrayRecords and {len(metrics)} MetricRecords, and one of each is needed"
            )
        weight = metrics[0].get(self.weighted_by_key)
        if not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
            raise PayloadError(
                f'its metric "{self.weighted_by_key}" is {weight}: a number in 0 … {MAX_WEIGHT:g} expected'
            )
        return float(weight), arrays[0], metrics[0]


def _begin(spec: RunSpec, arrays: ArrayRecord) -> _Standing:
    """The state before round 1. Raises SpecError where the recipe cannot work on these arrays."""
    recipe = recipe_of(spec)
    try:
        tensors = {name: _values(name, array) for name, array in arrays.items()}
    except PayloadError as error:
        raise SpecError(f"initial_arrays: {error}") from error
    layout = _layout(tensors)
    require_pairs(recipe, layout, "initial_arrays")
    if initial_a(spec) == "orthonormal":
        for pair in layout.pairs:
            if pair.rank > pair.a.shape[1]:
                raise SpecError(
                    f"initial_arrays: rank {pair.rank} of {pair.module} is over its {pair.a.shape[1]} inputs, and "
                    f'recipe "{recipe.name}" needs orthonormal rows in A. Nearest legal: rank {pair.a.shape[1]}.'
                )
            b, a = orthonormalize(tensors[pair.b.name], tensors[pair.a.name])
            tensors |= {pair.b.name: b, pair.a.name: a}
    shared = SharedAdapter(recipe, spec.recipe, layout, layout.join(tensors))
    return _Standing(shared, shared.initial_state(), {}, arrays)


def _layout(tensors: Mapping[str, Matrix]) -> AdapterLayout:
    return AdapterLayout(TensorSpec(name, values.shape, _role(name, tensors)) for name, values in tensors.items())


def _role(name: str, tensors: Mapping[str, Matrix]) -> Role:
    """`A` or `B` for two matrices that multiply; not beside DoRA's magnitudes, which rescale their product."""
    module = name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX)
    a, b = tensors.get(module + A_SUFFIX), tensors.get(module + B_SUFFIX)
    if module == name or a is None or b is None or any(n.startswith(f"{module}.lora_magnitude") for n in tensors):
        return "other"
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        return "other"
    return "A" if name.endswith(A_SUFFIX) else "B"


def _change(arrays: ArrayRecord, sent: Mapping[str, Matrix], trained: AdapterLayout, recipe: str) -> Flat:
    """What training changed, fp32 over `trained`. Raises PayloadError where the arrays do not fit what was sent."""
    if unknown := sorted(set(arrays) - set(sent)):
        raise PayloadError(f"{unknown[0]} was not sent")
    if missing := [t.name for t in trained.tensors if t.name not in arrays]:
        raise PayloadError(f"{missing[0]} is missing")
    changes = {}
    for name, array in arrays.items():
        values = _values(name, array)
        if values.shape != sent[name].shape:
            raise PayloadError(f"{name} has shape {values.shape}, and {sent[name].shape} was sent")
        changes[name] = values - sent[name]
        if name not in trained.offsets and changes[name].any():
            raise PayloadError(
                f"recipe {recipe} keeps {name} fixed in this round, and it came back changed: train the factors that "
                f'config["{TRAINED_FACTORS}"] names, and set requires_grad to False for the other'
            )
    return trained.join(changes)


def _values(name: str, array: Array) -> Matrix:
    """The array's values, fp32. Raises PayloadError for any other type, and for what no adapter holds."""
    try:
        values = array.numpy()
    except Exception as error:  # the bytes come from outside, and NumPy raises many things for a broken header
        raise PayloadError(f"{name} cannot be read ({error})") from error
    if not isinstance(values, np.ndarray) or values.dtype != np.float32:
        raise PayloadError(f"{name} is {getattr(values, 'dtype', 'no array')}: cast the adapter to float32")
    if not float(np.abs(values).max(initial=0.0)) <= MAX_VALUE:
        raise PayloadError(f"{name} holds NaN, or a value over {MAX_VALUE:g}")
    return values


def _record(tensors: Mapping[str, Matrix]) -> ArrayRecord:
    return ArrayRecord({name: Array(values) for name, values in tensors.items()})


def _comparable(records: Sequence[MetricRecord]) -> list[RecordDict]:
    """The metrics that all replies have in one form: a mean over some of them would be divided by the weight of all."""

    def everywhere(name: str) -> bool:
        return all(name in r and np.shape(r[name]) == np.shape(records[0][name]) for r in records)

    names = [name for name in records[0] if everywhere(name)]
    return [RecordDict({"metrics": MetricRecord({name: r[name] for name in names})}) for r in records]
