"""A worker scaled from zero to three and back on three nodes of Ray, with kills: `python -m tests.deploy.ray_scenario`.

It runs in a process of its own, in a network namespace; `test_ray.py` starts it. Its engine draws images without torch,
so that a worker starts in a second. It ends in one line of JSON.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from benchmarks.ray_scaling.cluster import ray_cluster
from benchmarks.ray_scaling.run import Plan, scale
from deploy.ray.app import Arguments, ModelArguments
from models.report import StepReport
from service.settings import Settings
from tests.service.conftest import DRAWN_CARD, DrawnEngine, DrawnState

if TYPE_CHECKING:
    from models.engine import Engine

STEP_S = 0.1
TARGET_S = 2.0
BODY = {"prompt": "a red circle", "model": "drawn", "budget": {"preset": "exact"}}


class SlowEngine(DrawnEngine):
    def __init__(self) -> None:
        super().__init__()
        self.cards = {"drawn": replace(DRAWN_CARD, dense_step_seconds=STEP_S)}

    def step(self, states: Sequence[DrawnState]) -> StepReport:
        time.sleep(STEP_S)
        return super().step(states)


def load_slow_engine(settings: Settings) -> "Engine":
    return cast("Engine", SlowEngine())


def main() -> None:
    scaling = {"min_replicas": 0, "max_replicas": 3, "upscale_delay_s": 0, "downscale_delay_s": 3}
    model = ModelArguments(model=Path("drawn"), autoscaling=scaling, settings={"target_backlog_s": TARGET_S})
    # No node has room for this one.
    lost = ModelArguments(model=Path("nowhere"), ray_actor_options={"resources": {"nowhere": 1}})
    arguments = Arguments(models=[model, lost], settings={"lease_s": 2, "grace_s": 10, "max_running": 1})
    plan = Plan("drawn", BODY, 0, 3, 12, TARGET_S, (("worker", "controller", "node"),))
    with (
        tempfile.TemporaryDirectory() as folder,
        ray_cluster(arguments, load_slow_engine, Path(folder)) as cluster,
    ):
        findings = asyncio.run(scale(plan, cluster))
    print(json.dumps(findings.as_json()))


if __name__ == "__main__":
    main()
