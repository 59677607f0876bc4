"""The same federation in a plain loop, in Apple's pfl, in Flower's Ray simulation and in fedapt.

    python benchmarks/simulators.py a --pfl PFL_FOLDER
    python benchmarks/simulators.py c --pfl PFL_FOLDER --model MODEL_FOLDER --data SST2_FOLDER

The same model, examples, batches and steps for all, written to files first; full participation, the mean of the tensors,
SGD, one thread of torch a process. Each run is a process of its own, the simulators take turns, and no speed is printed
unless all fp32 ones end at the same adapter. PFL_FOLDER is made by
`pip install --no-deps --target PFL_FOLDER pfl==0.6.0 "prv-accountant>=0.2,<0.3"`: pfl asks for an older dp-accounting, and
what else it imports is there already. Flower's simulation needs the extra `ray`.

Case a is bound by arithmetic (BERT 128 × 2, 32 examples of 32 tokens in 4 batches, 50 clients), case b by what surrounds
it (hidden 32, 8 examples in one batch, 200 clients); case c is a real encoder on sentences of natural lengths, 40 clients.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROUNDS, BATCH, RATE, RANK, TOLERANCE = 3, 8, 0.1, 8, 1e-5
Tensors = dict[str, Any]

SPEC = """
run = {{ name = "simulators", rounds = {rounds} }}
model = {{ base = '{base}', task = "sequence-classification", labels = 2, max_length = {length} }}
adapter = {{ rank = {rank}, targets = ["query", "value"] }}
recipe = {{ name = "fedit" }}
local = {{ optimizer = "sgd", learning_rate = {rate}, batch_size = {batch}, epochs = 1 }}
[data]
source = '{source}'
evaluation_limit = 8
limit = {examples}
partition = {{ clients = {clients} }}
"""


@dataclass(frozen=True)
class Variant:
    """One simulator as it is run: the child's arguments, and whether it has to end at the common adapter."""

    arguments: tuple[str, ...]
    processes: int = 1
    exact: bool = True


VARIANTS = {
    "plain loop": Variant(("loop",)),
    "pfl": Variant(("pfl",)),
    "pfl, 2 workers": Variant(("pfl",), processes=2),
    "Flower, Ray, 2 actors": Variant(("flower",)),
    "fedapt": Variant(("fedapt", "--workers", "1")),
    "fedapt, 2 workers": Variant(("fedapt", "--workers", "2")),
    "fedapt, 2 workers, bf16": Variant(("fedapt", "--workers", "2", "--bf16"), exact=False),
}


# What all of them train


def prepare(folder: Path, case: str, model: Path | None, data: Path | None) -> None:
    """Write the base, the spec, the start of the adapter and every batch of every round and client."""
    import torch

    from fedapt.client.batches import plan_batches
    from fedapt.protocols.spec import RunSpec
    from fedapt.sim.federation import build

    clients, samples, hidden = {"a": (50, 32, 128), "b": (200, 8, 32), "c": (40, 32, 0)}[case]
    if case == "c":
        assert model is not None
        assert data is not None
        base, source, length = model.resolve(), data.resolve() / "train.jsonl", 64
    else:
        base, source, length = write_base(folder, hidden), write_text(folder, clients * samples * 10 // 9 + 1), 32
    sizes = {"rounds": ROUNDS, "rank": RANK, "rate": RATE, "batch": BATCH, "length": length}
    text = SPEC.format(base=base, source=source, examples=clients * samples * 10 // 9 + 1, clients=clients, **sizes)
    (folder / "spec.toml").write_text(text)
    spec = RunSpec.parse(text)
    client = build(spec).client
    adapted, sites = client.adapted, client.sites
    adapted.model.save_pretrained(folder / "start")
    rounds: list[dict[int, list[Any]]] = []
    for number in range(1, ROUNDS + 1):
        rounds.append({})
        for node in client.nodes():
            own = sites.indices[node]
            plan = plan_batches(sites.examples.lengths[own], spec.local, spec.run.seed, number, node)
            batches = [adapted.task.collate(sites.examples, [own[batch]]) for batch in plan]
            rounds[-1][node] = [(b.inputs["input_ids"], b.inputs["attention_mask"], b.labels) for b in batches]
    torch.save({"rounds": rounds, "base": str(base)}, folder / "batches.pt")


def write_base(folder: Path, hidden: int) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"w{number}" for number in range(998))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder / "base")
    return folder / "base"


def write_text(folder: Path, rows: int) -> Path:
    chance = random.Random(0)
    lines = [
        {"text": " ".join(f"w{chance.randrange(998)}" for _ in range(32)), "label": chance.randrange(2)}
        for _ in range(rows)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "train.jsonl"


# What the peers have in common: stock transformers and peft


class Work:
    """The model with the start of its adapter, and the batches, from the files."""

    def __init__(self, folder: Path) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification

        torch.set_num_threads(1)
        stored = torch.load(folder / "batches.pt")
        self.rounds: list[dict[int, list[Any]]] = stored["rounds"]
        base = AutoModelForSequenceClassification.from_pretrained(stored["base"], num_labels=2)
        self.model: Any = PeftModel.from_pretrained(base, str(folder / "start"), is_trainable=True).eval()
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def examples(self, node: int) -> int:
        return sum(len(labels) for *_, labels in self.rounds[0][node])

    def loss(self, ids: Any, mask: Any, labels: Any) -> Any:
        from torch.nn import functional

        return functional.cross_entropy(self.model(input_ids=ids, attention_mask=mask).logits, labels)

    def train(self, batches: Sequence[Any]) -> None:
        """Stock SGD over one client's batches, from what is in the model."""
        import torch

        optimizer = torch.optim.SGD(list(self.trained.values()), lr=RATE)
        for batch in batches:
            optimizer.zero_grad()
            self.loss(*batch).backward()
            optimizer.step()

    def values(self) -> Tensors:
        return {name: parameter.detach().numpy().copy() for name, parameter in self.trained.items()}

    def write(self, values: Mapping[str, Any]) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(torch.as_tensor(values[name]))


def plain_loop(folder: Path, mark: Callable[[], None]) -> Tensors:
    work = Work(folder)
    total = sum(map(work.examples, work.rounds[0]))
    mark()
    for clients in work.rounds:
        start = work.values()
        mean = {name: np.zeros_like(values) for name, values in start.items()}
        for node, batches in clients.items():
            work.write(start)
            work.train(batches)
            for name, values in work.values().items():
                mean[name] += work.examples(node) / total * values
        work.write(mean)
        mark()
    return work.values()


def pfl(folder: Path, mark: Callable[[], None]) -> Tensors:
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.internal.ops import pytorch_ops
    from pfl.internal.ops.selector import set_framework_module
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    set_framework_module(pytorch_ops)
    work = Work(folder)
    done = [0]

    class Prepared(Dataset):  # type: ignore[misc]
        """One user's batches of the round that it is."""

        def iter(self, batch_size: int | None) -> Iterator[Any]:
            return iter(work.rounds[done[0]][self.user_id])

    class Marks(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Any]:
            done[0] += 1
            mark()
            return False, Metrics()

    def dataset(node: int) -> Dataset:
        return Prepared((np.arange(work.examples(node)),), user_id=node)

    work.model.loss, work.model.metrics = work.loss, lambda *_: {}
    users = list(work.rounds[0])
    sampler = get_user_sampler("minimize_reuse", users)
    backend = SimulatedBackend(FederatedDataset(dataset, sampler), None, [WeightByDatapoints()])
    local = lambda parameters, lr: torch.optim.SGD(parameters, lr=lr)
    central = torch.optim.SGD(list(work.trained.values()), lr=1.0)
    settings = NNAlgorithmParams(ROUNDS, ROUNDS + 1, len(users), None)
    mark()
    FederatedAveraging().run(
        settings,
        backend,
        PyTorchModel(work.model, local, central),
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=RATE, local_batch_size=BATCH),
        callbacks=[Marks()],
        send_metrics_to_platform=False,
    )
    return work.values()


def flower(folder: Path, mark: Callable[[], None]) -> Tensors:
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    work = Work(folder)
    start, names = ArrayRecord(list(work.values().values())), list(work.trained)
    result: dict[str, Any] = {}
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Any, context: Context) -> Message:
        own = kept_work(str(folder))
        node = int(context.node_config["partition-id"])
        own.write(dict(zip(names, message.content["arrays"].to_numpy_ndarrays(), strict=True)))
        own.train(own.rounds[int(message.content["config"]["server-round"]) - 1][node])
        metrics = MetricRecord({"num-examples": own.examples(node)})
        arrays = ArrayRecord(list(own.values().values()))
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    class Timed(FedAvg):
        def aggregate_train(self, *arguments: Any) -> Any:
            answer = super().aggregate_train(*arguments)
            mark()
            return answer

    @server.main()
    def serve(grid: Any, context: Context) -> None:
        everybody = len(work.rounds[0])  # a round takes those that are there: wait for all
        strategy = Timed(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=everybody, min_available_nodes=everybody
        )
        found = strategy.start(grid=grid, initial_arrays=start, num_rounds=ROUNDS)
        result.update(zip(names, found.arrays.to_numpy_ndarrays(), strict=True))

    mark()
    run_simulation(server, client, len(work.rounds[0]), backend_config={"client_resources": {"num_cpus": 1}})
    return result


_KEPT: dict[str, Work] = {}


def kept_work(folder: str) -> Work:
    """One model an actor, whatever the number of messages."""
    import simulators  # by its name: what it holds outlives a message

    kept: dict[str, Work] = simulators._KEPT
    if folder not in kept:
        kept[folder] = Work(Path(folder))
    return kept[folder]


def fedapt(folder: Path, mark: Callable[[], None], workers: int, bf16: bool) -> Tensors:
    from fedapt.sim.forking import prepare

    if workers > 1:
        prepare()
    import torch

    torch.set_num_threads(max(1, workers))  # shared among the workers: one each
    from fedapt.progress import Silent
    from fedapt.protocols.spec import RunSpec
    from fedapt.server.store import MemoryStore
    from fedapt.sim.federation import build
    from fedapt.simulation import coordinate, worker_grid

    class Marks(Silent):
        def row(self, row: Mapping[str, Any]) -> None:
            mark()

    spec = RunSpec.load(folder / "spec.toml", ["model.precision=bf16"] if bf16 else [])
    client = build(spec).client
    mark()
    with worker_grid(client, workers, "local") as grid:
        outcome = coordinate(spec, client, MemoryStore(), None, Marks(), grid=grid)
    tensors = outcome.description.layout.split(outcome.adapter)
    return {client.adapted.parameter_names[name]: values for name, values in tensors.items()}


# Runs in processes of their own


def child(options: argparse.Namespace) -> None:
    """Run one simulator; its marks (seconds since the process began) and its adapter go to files."""
    began = psutil.Process().create_time()
    marks: list[float] = []
    mark = lambda: marks.append(time.time() - began)
    if options.child == "fedapt":
        tensors = fedapt(options.folder, mark, options.workers, options.bf16)
    else:
        tensors = {"loop": plain_loop, "pfl": pfl, "flower": flower}[options.child](options.folder, mark)
    if os.environ.get("RANK", "0") == "0":
        np.savez(options.folder / "adapter.npz", **tensors)
        (options.folder / "marks.json").write_text(json.dumps(marks))


@dataclass(frozen=True)
class Measured:
    """One run: seconds to the first round, of each round, of all; MiB (PSS) at the peak of all its processes."""

    start: float
    rounds: list[float]
    whole: float
    memory: float
    adapter: Tensors


def measure(variant: Variant, folder: Path, packages: Path) -> Measured:
    command = [sys.executable, "-P"]
    if variant.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={variant.processes}"]
    command += [__file__, "--child", *variant.arguments, "--folder", str(folder)]
    paths = os.pathsep.join([str(packages.resolve()), str(Path(__file__).resolve().parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    began, peak = time.monotonic(), 0.0
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{variant.arguments}: exit code {process.returncode}\n{(folder / 'log').read_text()[-3000:]}")
    whole = time.monotonic() - began
    marks = json.loads((folder / "marks.json").read_text())
    with np.load(folder / "adapter.npz") as stored:
        adapter = dict(stored)
    rounds = [after - before for before, after in pairwise(marks)]
    return Measured(marks[0], rounds, whole, peak, adapter)


def memory(pid: int) -> float:
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0.0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**20


def distance(one: Tensors, other: Tensors) -> float:
    """‖one − other‖ ÷ ‖other‖ over all tensors."""
    assert sorted(one) == sorted(other), sorted(set(one) ^ set(other))
    difference = sum(float(((one[name] - other[name]) ** 2).sum()) for name in one)
    return float(np.sqrt(difference / sum(float((values**2).sum()) for values in other.values())))


def table(runs: Mapping[str, Sequence[Measured]], clients: int) -> str:
    lines = [
        "| simulator | start-up s | s a round after the first | clients/s after the first | clients/s, start-up in | MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in runs.items():
        later = statistics.median(statistics.mean(run.rounds[1:]) for run in own)
        whole = statistics.median(run.start + sum(run.rounds) for run in own)
        start, peak = (statistics.median(getattr(run, key) for run in own) for key in ("start", "memory"))
        speeds = f"{clients / later:.0f} | {clients * ROUNDS / whole:.1f}"
        lines.append(f"| {name} | {start:.1f} | {later:.2f} | {speeds} | {peak:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("a", "b", "c"), nargs="?")
    parser.add_argument("--pfl", type=Path, help="folder that holds pfl")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="simulators to run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    if options.case == "c" and not (options.model and options.data):
        parser.error("case c needs --model and --data")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, options.case, options.model, options.data)
        runs: dict[str, list[Measured]] = {name: [] for name in options.only}
        for repeat in range(options.repeats):
            for name, own in runs.items():
                own.append(measure(VARIANTS[name], folder, options.pfl or folder))
                print(f"{repeat + 1}/{options.repeats} {name}: {own[-1].rounds}", file=sys.stderr, flush=True)
    reference = next(iter(runs.values()))[0].adapter
    for name, own in runs.items():
        apart = max(distance(run.adapter, reference) for run in own)
        if VARIANTS[name].exact and not apart <= TOLERANCE:
            raise SystemExit(f"{name} ends {apart:.1e} from the others: unequal work has no speed to compare")
        print(f"{name}: adapter within {apart:.1e}")
    print(table(runs, {"a": 50, "b": 200, "c": 40}[options.case]))


if __name__ == "__main__":
    main()
