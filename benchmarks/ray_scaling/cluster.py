"""Three nodes of Ray and a Redis on this machine, and what can be killed of them."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve._private.client import ServeControllerClient
from ray.serve.context import _get_global_client

from benchmarks.processes import RedisServer, free_port
from deploy.ray.app import Arguments, build_with
from deploy.ray.worker import LoadEngine

APPLICATION = "elastic-dit"
_CPUS_OF_NODE = 2
_BYTES_OF_NODE = 80_000_000  # Ray's object store: next to nothing passes through it


@dataclass(frozen=True, slots=True)
class Replica:
    deployment: str
    pid: int
    node_id: str


class RayCluster:
    """`url` is the address of the API, which runs on the first node. `redis_url` is that of the queue."""

    def __init__(self, redis: RedisServer, cluster: Cluster, port: int) -> None:
        self.redis_url = redis.url
        self.url = f"http://127.0.0.1:{port}"
        self._cluster = cluster

    def replicas(self, deployment: str) -> list[Replica] | None:
        """The running replicas of a deployment. None while Serve's controller does not answer."""
        try:
            details = _serve().get_serve_details()
        except Exception:  # Ray has many errors for an actor that is being restarted
            return None
        deployments: dict[str, Any] = details["applications"].get(APPLICATION, {}).get("deployments", {})
        found = deployments.get(deployment, {}).get("replicas", ())
        return [
            Replica(deployment, replica["pid"], replica["node_id"])
            for replica in found
            if replica["state"] == "RUNNING" and replica["pid"] is not None
        ]

    def kill(self, names: Sequence[str], workers: Sequence[Replica]) -> set[int]:
        """Kill all of these at once: the controller, the API, one of `workers`, a node that runs one.

        Returns the processes of the workers that are lost. The first node of the cluster stays.
        """
        pids, lost, nodes = set[int](), set[int](), list[Any]()
        for name in names:
            match name:
                case "controller":
                    pids.add(cast(int, ray.get(_serve()._controller.get_pid.remote())))
                case "api":
                    pids |= {api.pid for api in self.replicas("api") or ()}
                case "worker":
                    lost.add(workers[0].pid)
                case "node":
                    used = {worker.node_id for worker in workers[1:]}  # not that of the worker that may be killed alone
                    node = next(node for node in self._cluster.worker_nodes if node.node_id in used)
                    lost |= {worker.pid for worker in workers if worker.node_id == node.node_id}
                    nodes.append(node)
        for pid in pids | lost:
            os.kill(pid, signal.SIGKILL)
        for node in nodes:
            self._cluster.remove_node(node, allow_graceful=False)
        return lost


def _serve() -> ServeControllerClient:
    client = _get_global_client()
    assert client is not None
    return client


@contextmanager
def ray_cluster(arguments: Arguments, load: LoadEngine, folder: Path) -> Iterator[RayCluster]:
    """A cluster that runs the application until the block ends, and is killed then."""
    redis = RedisServer(folder)
    arguments = arguments.model_copy(update={"settings": {**arguments.settings, "redis_url": redis.url}})
    port = free_port()
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=_CPUS_OF_NODE, object_store_memory=_BYTES_OF_NODE, include_dashboard=False)
        for _ in range(2):
            cluster.add_node(num_cpus=_CPUS_OF_NODE, object_store_memory=_BYTES_OF_NODE)
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        application = serve.RunTarget(build_with(arguments, load), name=APPLICATION)
        serve.run_many([application], wait_for_applications_running=False)
        yield RayCluster(redis, cluster, port)
    finally:
        ray.shutdown()
        cluster.shutdown()
        redis.kill()
