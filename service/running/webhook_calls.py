"""The loop that calls the webhooks of ended jobs: several at once, so that a slow host does not hold up the others."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from service.errors import JobNotFound, StoreUnavailable
from service.jobs.job import JobSnapshot, log_fields
from service.jobs.store import JobStore

logger = logging.getLogger(__name__)

POLL_S = 1.0
"""The interval at which the store is asked for webhooks that are due."""
RETRY_DELAYS_S = (1, 5, 30, 120, 600)
"""Delays between the calls of a webhook, which is given up after the last. Clients can still ask for the job."""
MAX_CALLS = 1000
"""How many webhooks are taken from the store at once. Most of them wait for their host."""
MAX_CALLS_PER_HOST = 4
"""Fewer than the threads, at least five, in which asyncio looks up names: a host with a slow name server leaves one."""
MAX_WAIT_S = 20.0
"""How long a webhook may wait for others of its host before it counts as failed. With the call's own deadline, this is
less than `store.WEBHOOK_HELD_S`, after which another server would take the webhook as well."""


class WebhookCalls:
    """Calls the webhooks of `store`'s ended jobs by `deliver`, which returns whether a call succeeded."""

    def __init__(self, store: JobStore, deliver: Callable[[JobSnapshot], Awaitable[bool]]) -> None:
        self._store = store
        self._deliver = deliver
        self._free = asyncio.Semaphore(MAX_CALLS)
        # By host; the settings list the hosts, so there are few.
        self._hosts: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(MAX_CALLS_PER_HOST))

    async def run(self) -> None:
        """Call webhooks until cancelled. Failed calls are repeated after RETRY_DELAYS_S."""
        async with asyncio.TaskGroup() as calls:
            while True:
                await self._free.acquire()
                taken = await self._take()
                if taken is None:
                    self._free.release()
                    await asyncio.sleep(POLL_S)
                else:
                    calls.create_task(self._call(*taken)).add_done_callback(lambda _: self._free.release())

    async def _take(self) -> tuple[JobSnapshot, int] | None:
        try:
            return await self._store.take_webhook()
        except (StoreUnavailable, JobNotFound) as error:
            logger.warning("webhooks can't be called: %s", error)
        except Exception:  # such as a record that can't be read: the server goes on, and so do other webhooks
            logger.exception("a webhook can't be called")
        return None

    async def _call(self, snapshot: JobSnapshot, num_failures: int) -> None:
        """Call a webhook that failed `num_failures` times before, and store when it is due again."""
        job = snapshot.job
        try:
            # A server that died during the last call leaves a webhook with more failures than there are delays.
            is_over = await self._succeeds(snapshot) or num_failures >= len(RETRY_DELAYS_S)
            await self._store.settle_webhook(job.id, None if is_over else RETRY_DELAYS_S[num_failures])
        except StoreUnavailable as error:
            logger.warning("the webhook will be called again: %s", error, extra=log_fields(job))
        except Exception:
            logger.exception("the webhook will be called again", extra=log_fields(job))

    async def _succeeds(self, snapshot: JobSnapshot) -> bool:
        host = self._hosts[urlsplit(snapshot.job.webhook_url or "").netloc]
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                await host.acquire()
        except TimeoutError:
            logger.warning("the webhook's host is too slow", extra=log_fields(snapshot.job))
            return False
        try:
            return await self._deliver(snapshot)
        finally:
            host.release()
