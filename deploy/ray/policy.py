"""How many replicas a model gets: as many as finish its backlog in time, and never fewer than are busy."""

import asyncio
import logging
import math
import time
import weakref
from threading import Thread
from typing import Any

from ray.serve.config import AutoscalingContext
from redis.exceptions import RedisError

from deploy.ray.demand import Demand
from service.app import build_store
from service.errors import BadConfiguration, StoreUnavailable
from service.jobs.store import JobStore
from service.metrics import Metrics
from service.scheduling.waiting import pace_of, wanted_workers
from service.settings import load_settings

logger = logging.getLogger(__name__)

READ_S = 0.5
"""Interval between two looks at the queue."""
STALE_S = 5.0
"""An answer of Redis holds for so long."""


class BacklogPolicy:
    """Serve calls an instance in its control loop, which must not wait: a thread reads the queue in Redis.

    While Redis does not answer, the number of replicas stays as it is.
    """

    def __init__(self, model: str, target_s: float, settings: dict[str, Any]) -> None:
        self.model = model
        self.target_s = target_s
        self._wanted = 0
        self._read_at = -math.inf
        watch = _watch(weakref.ref(self), settings)
        Thread(target=asyncio.run, args=(watch,), name=f"backlog of {model}", daemon=True).start()

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The wanted number of replicas, which Serve bounds and delays as the deployment's configuration says."""
        if time.monotonic() - self._read_at > STALE_S:
            return context.target_num_replicas, {}
        return self._wanted, {}

    def set_wanted(self, wanted: int) -> None:
        self._wanted, self._read_at = wanted, time.monotonic()


async def _watch(reference: "weakref.ref[BacklogPolicy]", settings: dict[str, Any]) -> None:
    """Read the queue until Serve has dropped the policy."""
    own = load_settings(**settings)
    if own.redis_url is None:
        raise BadConfiguration("Serve's controller needs ELASTIC_REDIS_URL: set it on the first node, where it runs")
    store, demand = build_store(own, Metrics()), Demand(own.redis_url)
    try:
        while (policy := reference()) is not None:
            try:
                is_asked = await demand.is_asked(policy.model)
                policy.set_wanted(await wanted(store, policy.model, policy.target_s, is_asked=is_asked))
            except (StoreUnavailable, RedisError) as error:
                logger.warning("the number of replicas of %s stays as it is: %s", policy.model, error)
            except Exception:  # of this look alone
                logger.exception("the number of replicas of %s stays as it is", policy.model)
            del policy
            await asyncio.sleep(READ_S)
    finally:
        await store.close()
        await demand.close()


async def wanted(store: JobStore, model: str, target_s: float, *, is_asked: bool = False) -> int:
    """How many workers the model's jobs need now. `is_asked`: a call found no worker, so one has to start."""
    load, workers = await store.load(), await store.workers()
    has_none = pace_of(model, workers) is None
    return max(int(is_asked and has_none), wanted_workers(model, load, workers, target_s))
