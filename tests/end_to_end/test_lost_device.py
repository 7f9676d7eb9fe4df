"""A process whose device is lost ends, and others go on with its jobs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from benchmarks.processes import RedisServer
from models import device_errors
from models.engine import Engine
from models.errors import DeviceLost
from models.request import ImageRequest
from models.state import DenoiseState
from tests.fixtures.forked_server import ForkedElasticDit
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.redis

PROMPT = "a red circle"
JOB = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 8, "budget": {"preset": "exact"}}
TIMEOUT_S = 300


def lose_the_device() -> None:
    """Let a step of the prompt fail as an illegal access to memory does: all later calls of the device fail too."""
    compute = Engine._compute

    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def fail_again(error: Exception, _: torch.device) -> None:
        raise DeviceLost(f"the device is lost: {error}") from error

    def compute_or_fail(engine: Engine, states: Sequence[DenoiseState]) -> Any:
        if any(isinstance(s.request, ImageRequest) and s.request.prompt == PROMPT and s.computed for s in states):
            setattr(device_errors, "_check_device", fail_again)  # noqa: B010
            fail()
        return compute(engine, states)

    setattr(Engine, "_compute", compute_or_fail)  # noqa: B010


def test_job_outlives_the_device(redis_server: RedisServer, tmp_path: Path) -> None:
    environment = {
        "ELASTIC_REDIS_URL": redis_server.url,
        "ELASTIC_MODELS": "checkpoints/tiny-flux",
        "ELASTIC_LEASE_S": "2",
    }
    log = tmp_path / "first.log"
    first = ForkedElasticDit("serve", log, lose_the_device, **environment)
    second = None
    try:
        url = first.wait_until_ready()
        headers = {"Prefer": "respond-async"}
        job_id = httpx2.post(f"{url}/v1/images", json=JOB, headers=headers).raise_for_status().json()["id"]
        first.process.join(TIMEOUT_S)
        assert first.process.exitcode == 1
        assert "an illegal memory access was encountered; the process ends" in log.read_text()
        second = ForkedElasticDit("serve", tmp_path / "second.log", **environment)
        url = second.wait_until_ready()
        wait_until(lambda: httpx2.get(f"{url}/v1/jobs/{job_id}").json()["status"] == "succeeded")
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
