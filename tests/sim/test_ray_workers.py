"""Workers as Ray actors, on a cluster of two nodes that is really two."""

from collections.abc import Callable, Iterator

import pytest

from fedapt.protocols.errors import PayloadError
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Assignment
from fedapt.server.coordinator import Coordinator
from fedapt.server.grid import NodeGrid
from fedapt.server.store import MemoryStore
from fedapt.sim import grid as grid_module
from fedapt.sim.federation import build
from fedapt.sim.grid import LocalGrid
from fedapt.sim.workers import WorkerGrid

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray leaves sockets and files to the collector


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


def trained(spec: RunSpec, grid: NodeGrid) -> bytes:
    coordinator = Coordinator(spec, grid, MemoryStore())
    list(coordinator.rounds())
    return coordinator.adapter().tobytes()


def test_two_nodes_give_the_bytes_of_one_process(
    cluster: None, spec_of: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedapt.sim.ray_workers import actors

    monkeypatch.setattr(grid_module, "PORTION", 2)
    spec = spec_of("recipe.name=fedsvd", "wire.codec=top-k", "wire.density=0.3", "run.rounds=3")
    client = build(spec).client
    alone = trained(spec, LocalGrid(client.under(spec)))
    with actors(client, 0) as pool:
        assert len({ray.get(actor.node.remote()) for actor in pool.actors}) == 2
        assert trained(spec, WorkerGrid(client.under(spec), pool)) == alone
        grid = WorkerGrid(client, pool)
        grid.send([Assignment("run", 1, 1, 0, "", b"")])
        with pytest.raises(PayloadError, match="0 bytes received"):
            list(grid.replies(1.0))
