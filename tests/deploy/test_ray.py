"""The Ray Serve application of deploy/ray, on a real cluster of three nodes."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from ray.serve import Application
from ray.serve.config import AutoscalingContext
from ray.serve.schema import ServeDeploySchema

from benchmarks.processes import RedisServer
from benchmarks.ray_scaling.isolation import isolated, why_not
from deploy.ray.app import AFTER_GRACE_S, Arguments, build
from deploy.ray.policy import BacklogPolicy, wanted
from models.card import ModelCard
from service.errors import BadConfiguration
from service.jobs.store import JobStore
from service.scheduling.fleet import Load, ModelLoad, WorkerRecord, WorkerState
from tests.fixtures.waiting import wait_until
from tests.service.conftest import DRAWN_CARD

CLUSTER: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "ray" / "cluster.yaml").read_text())
SCENARIO_S = 300
KEPT = 7
"""Replicas that Serve has now."""


def deployments(application: Application) -> dict[str, Any]:
    """The deployments of an application, by name: the ingress, and those that are bound to it."""
    ingress = application._bound_deployment
    bound = [part._bound_deployment for part in ingress.init_args if isinstance(part, Application)]
    return {deployment.name: deployment for deployment in [ingress, *bound]}


def context() -> AutoscalingContext:
    return cast(AutoscalingContext, SimpleNamespace(target_num_replicas=KEPT))


def test_configuration_of_a_cluster_follows_the_schema_of_serve_and_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_REDIS_URL", "redis://127.0.0.1:1/0")
    (application,) = ServeDeploySchema.model_validate(CLUSTER).applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    arguments = Arguments.model_validate(application.args)
    built = deployments(build(arguments))
    assert set(built) == {"api", "worker-FLUX.1-dev", "worker-Hunyuan3D-2.1"}
    flux, mesh = built["worker-FLUX.1-dev"], built["worker-Hunyuan3D-2.1"]
    assert flux.ray_actor_options["num_gpus"] == 1
    assert "H200" in flux.ray_actor_options["label_selector"]["ray.io/accelerator-type"]
    scaling = mesh._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (0, 4)
    assert scaling.policy.policy_kwargs["model"] == "Hunyuan3D-2.1"
    assert scaling.policy.policy_kwargs["target_s"] == 60
    assert "redis" not in json.dumps(scaling.policy.policy_kwargs), "Serve logs them: no password may be there"
    assert flux._deployment_config.graceful_shutdown_timeout_s == arguments.settings["grace_s"] + AFTER_GRACE_S
    (of_worker, _), (of_api, *_) = flux.init_args, built["api"].init_args
    assert of_worker["models"] == ["/srv/models/FLUX.1-dev"]
    assert not of_api["worker"]


def test_without_a_redis_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELASTIC_REDIS_URL", raising=False)
    with pytest.raises(BadConfiguration, match="ELASTIC_REDIS_URL"):
        build(Arguments())


@dataclass
class Queue:
    """What a store says of one model and its workers."""

    of_model: ModelLoad
    records: list[WorkerRecord]

    async def load(self) -> Load:
        return Load({"drawn": self.of_model, "other": ModelLoad(queued_s=1000.0)})

    async def workers(self) -> list[WorkerRecord]:
        return self.records


@pytest.mark.parametrize(
    ("of_model", "states", "expected"),
    [
        (ModelLoad(), [], 0),
        (ModelLoad(num_queued=1, queued_s=0.1), [], 1),
        (ModelLoad(num_queued=9, queued_s=90.0), [WorkerState.IDLE], 9),
        (ModelLoad(num_running=2, running_s=0.0), [WorkerState.BUSY, WorkerState.BUSY, WorkerState.IDLE], 2),
        (ModelLoad(num_running=2, running_s=0.0), [WorkerState.DRAINING, WorkerState.BUSY], 1),
    ],
)
@pytest.mark.anyio
async def test_workers_are_wanted_for_the_backlog_and_busy_ones_stay(
    of_model: ModelLoad, states: list[WorkerState], expected: int
) -> None:

    def records(cards: dict[str, ModelCard]) -> list[WorkerRecord]:
        return [WorkerRecord(str(number), "1", "cpu", state, cards) for number, state in enumerate(states)]

    store = cast(JobStore, Queue(of_model, [*records({"drawn": DRAWN_CARD}), *records({})]))
    assert await wanted(store, "drawn", target_s=10.0) == expected


@pytest.mark.parametrize(("state", "expected"), [(None, 1), (WorkerState.DRAINING, 1), (WorkerState.IDLE, 0)])
@pytest.mark.anyio
async def test_a_call_that_found_no_worker_starts_one(state: WorkerState | None, expected: int) -> None:
    records = [] if state is None else [WorkerRecord("one", "1", "cpu", state, {"drawn": DRAWN_CARD})]
    store = cast(JobStore, Queue(ModelLoad(), records))
    assert await wanted(store, "drawn", target_s=10.0, is_asked=True) == expected


@pytest.mark.redis
def test_number_of_replicas_stays_while_redis_is_silent(
    redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.ray.policy.STALE_S", 1.0)
    own = RedisServer(tmp_path)  # not the one that tests share
    policy = BacklogPolicy("drawn", 10.0, {"redis_url": own.url})
    assert policy(context()) == (KEPT, {})
    wait_until(lambda: policy(context()) == (0, {}))
    own.kill()
    wait_until(lambda: policy(context()) == (KEPT, {}))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.redis
def test_no_job_is_lost_while_workers_scale_and_nodes_replicas_and_the_controller_are_killed(
    redis_server: RedisServer,
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as folder:
        command, environment = isolated([sys.executable, "-m", "tests.deploy.ray_scenario"], Path(folder))
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SCENARIO_S)
    assert result.returncode == 0, result.stdout + result.stderr
    findings = json.loads(result.stdout.splitlines()[-1])
    assert findings["faults"] == [], result.stdout
    assert findings["ends"] == {"succeeded": findings["accepted"]}
    assert set(findings["seconds_back"]) == {"worker and controller and node"}
    assert findings["ready"]["drawn"]["workers"] > 0
    assert findings["ready"]["nowhere"]["workers"] == 0, "no node has room for it, and /readyz says so"
    assert findings["refused"].get("503 model_unavailable"), "the first call comes before the first worker"
