"""Stock clients of somebody else's Flower app, scripted: no model, an adapter of a few values."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

import fedapt
from fedapt.kernels.lowrank import Matrix
from fedapt.protocols.keys import derive, generator
from fedapt.protocols.layout import AdapterLayout, TensorSpec
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.server.strategy import RecipeStrategy

P = "base_model.model."
LAYOUT = AdapterLayout(
    [
        TensorSpec(f"{P}q.lora_A.weight", (2, 5), "A"),
        TensorSpec(f"{P}q.lora_B.weight", (4, 2), "B"),
        TensorSpec(f"{P}v.lora_A.weight", (3, 6), "A"),
        TensorSpec(f"{P}v.lora_B.weight", (2, 3), "B"),
        TensorSpec(f"{P}score.bias", (3,), "other"),
        TensorSpec(f"{P}temperature", (), "other"),
    ]
)
NODES = (3, 4, 2**63 + 1, 2**64 - 1)
ROUNDS = 5
STOCK = [name for name, recipe in RECIPES.items() if not (recipe.has_frozen or recipe.streams)]
Tensors = Mapping[str, Matrix]


def start() -> dict[str, Matrix]:
    """What peft draws: any A, and B zero."""
    flat = np.random.default_rng(0).standard_normal(LAYOUT.size).astype(np.float32)
    return {n: np.zeros_like(v) if n.endswith("B.weight") else v for n, v in LAYOUT.split(flat).items()}


def after_training(sent: Tensors, round_: int, node: int) -> dict[str, Matrix]:
    """Every tensor moves some of the way to a target of the node's own."""
    random = generator(derive(1, "target", round_, node))
    targets = {name: np.asarray(random.standard_normal(sent[name].shape), np.float32) for name in sorted(sent)}
    return {name: np.asarray(sent[name] + np.float32(0.3) * (targets[name] - sent[name])) for name in sent}


def weight_of(node: int) -> float:
    return 1.0 + node % 3


def record(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(values)) for name, values in tensors.items()})


def arrays_of(sent: ArrayRecord) -> dict[str, Matrix]:
    return {name: array.numpy() for name, array in sent.items()}


def answer(message: Message) -> RecordDict:
    """A stock client: it trains the factors that the config names, and returns the whole state dict."""
    sent = arrays_of(message.content.array_records["arrays"])
    config = message.content.config_records["config"]
    round_, factors = config["server-round"], config["trained-factors"]
    assert isinstance(round_, int)
    assert isinstance(factors, str)
    node = message.metadata.dst_node_id
    fixed = {f".lora_{factor}.weight" for factor in "AB" if factor not in factors}
    trained = after_training(sent, round_, node)
    kept = {name: values for name, values in sent.items() if any(name.endswith(suffix) for suffix in fixed)}
    metrics = MetricRecord({"num-examples": weight_of(node), "loss": float(1 + node % 3)})
    return RecordDict({"arrays": record(trained | kept), "metrics": metrics})


Answer = Callable[[Message], RecordDict | Error]


class FakeGrid(Grid):
    """Stock clients in this process; `answers` are of the nodes that do something else."""

    def __init__(self, answers: Mapping[int, Answer] | None = None, nodes: Sequence[int] = NODES) -> None:
        self.answers, self.nodes = answers or {}, nodes
        self.sent: list[Message] = []
        self.configs: list[dict[str, Any]] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not in the order of asking. Configs are copied, because Flower writes into one record from round to round."""
        asked = list(messages)
        self.sent += asked
        self.configs += [dict(message.content.config_records["config"]) for message in asked]
        replies = []
        for message in reversed(asked):
            if message.metadata.message_type != "train":
                continue
            made = self.answers.get(message.metadata.dst_node_id, answer)(message)
            replies.append(Message(made, reply_to=message))
        return replies

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


def run(
    strategy: RecipeStrategy, grid: Grid, rounds: int = ROUNDS, initial: ArrayRecord | None = None
) -> tuple[list[dict[str, Matrix]], dict[int, MetricRecord]]:
    """The adapter after each round (round 0 is the start as it was given), and the metrics."""
    adapters: list[dict[str, Matrix]] = []

    def look(_: int, arrays: ArrayRecord) -> None:
        adapters.append(arrays_of(arrays))

    arrays = record(start()) if initial is None else initial
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds, evaluate_fn=look)
    return adapters, result.train_metrics_clientapp


def strategy_of(recipe: str, **options: Any) -> RecipeStrategy:
    return fedapt.strategy(recipe, fraction_evaluate=0.0, **options)


def equal(left: Tensors, right: Tensors) -> bool:
    return set(left) == set(right) and all(left[n].tobytes() == right[n].tobytes() for n in left)
