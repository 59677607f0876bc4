"""The workers of `workers.py` as Ray actors: for a round that has outgrown one machine.

The base and the data are put into Ray's object store once; each node of the cluster gets one copy of them, which all of
its actors look at in place.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..client.client import Client, Kept
from ..protocols.errors import FedaptError, RunError
from ..protocols.update import Update
from .image import Bytes, Image, aligned, image
from .workers import Portion

try:
    import ray
    from ray.util import ActorPool
except ImportError:
    raise RunError('--engine ray needs Ray: pip install "fedapt[ray]", or leave the option out') from None


class Actor:
    """One worker: a client over the node's own copy of the block."""

    def __init__(self, found: Image, block: Bytes, threads: int) -> None:
        torch.set_num_threads(threads)
        self.client = found.client(block)
        if torch.cuda.is_available():
            self.client.adapted.model.to("cuda")

    def train(self, portion: Portion) -> tuple[list[Update], Kept] | FedaptError:
        """What `Portion.train` gives; an error that a person can act on is an answer too."""
        try:
            return portion.train(self.client)
        except FedaptError as error:
            return error

    def node(self) -> str:
        """The id of the cluster's node that this worker is on."""
        return str(ray.get_runtime_context().get_node_id())


class Actors:
    """`count` actors, spread over the cluster; `count` = 0: one a core of it, or a GPU where there are GPUs."""

    def __init__(self, client: Client, count: int) -> None:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        count = count or gpus or int(resources["CPU"])
        threads = max(1, int(resources["CPU"]) // count)
        found, block = image(client, aligned)
        shared = ray.put(block)
        start: Any = ray.remote(num_cpus=threads, num_gpus=min(1.0, gpus / count), scheduling_strategy="SPREAD")(Actor)
        self.actors = [start.remote(found, shared, threads) for _ in range(count)]

    def train(self, work: Sequence[Portion]) -> Iterator[tuple[list[Update], Kept]]:
        """What `Portion.train` gives, in the order of `work`. Raises RunError where an actor dies."""
        pool = ActorPool(self.actors)
        try:
            for answer in pool.map(lambda actor, portion: actor.train.remote(portion), work):
                if isinstance(answer, FedaptError):
                    raise answer
                yield answer
        except ray.exceptions.RayActorError as error:
            raise RunError(
                f"a Ray actor died ({error}). The round stays open: start the run again to go on with it."
            ) from error

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


@contextmanager
def actors(client: Client, count: int) -> Iterator[Actors]:
    """Actors on the cluster that RAY_ADDRESS names or that was joined before, else on one of this machine alone."""
    if joined := not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    pool = Actors(client, count)
    try:
        yield pool
    finally:
        pool.close()
        if joined:
            ray.shutdown()
