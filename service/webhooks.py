"""Calls to a client's server when a job ends, signed after Standard Webhooks 1.0.0 (standardwebhooks.com)."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2

from models.errors import InvalidRequest
from service.errors import BadConfiguration
from service.jobs.job import JobSnapshot, log_fields

logger = logging.getLogger(__name__)

DEADLINE_S = 10.0
"""How long a call may take in all, until the status line and the headers of its answer have arrived."""


def check_webhook_url(url: str, hosts: Sequence[str]) -> None:
    """Raise InvalidRequest unless the host of `url` is one of `hosts`, which name a port unless it is the default."""
    if not hosts:
        raise InvalidRequest("this server calls no webhooks; omit webhook_url and poll the job", "webhook_url")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidRequest(f"webhook_url is not a URL: {error}", "webhook_url") from error
    if parts.scheme not in ("http", "https") or parts.username is not None or parts.fragment:
        raise InvalidRequest("webhook_url must be http or https, without a user or a fragment", "webhook_url")
    host = f"{parts.hostname}:{port}" if port is not None else parts.hostname
    if host not in hosts:
        raise InvalidRequest(
            f"webhook_url leads to {str(host)[:100]}; this server calls only {', '.join(hosts)}", "webhook_url"
        )


class Webhooks:
    """Calls the webhooks of ended jobs. `describe` gives the JSON that clients see of a job."""

    def __init__(
        self,
        secret: str,
        describe: Callable[[JobSnapshot], Mapping[str, Any]],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises BadConfiguration unless `secret` is base64 of at least 24 bytes, after `whsec_`."""
        try:
            self._key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except ValueError as error:
            raise BadConfiguration("webhook_secret is not base64, after whsec_") from error
        if len(self._key) < 24:
            raise BadConfiguration(f"webhook_secret has {len(self._key)} bytes; it needs at least 24")
        self._ssl_context = httpx2.create_ssl_context()  # reads all certificates, too slow for every call
        self._describe = describe
        self._clock = clock

    async def deliver(self, snapshot: JobSnapshot) -> bool:
        """Call the job's webhook; True if it answered 2xx within DEADLINE_S. The answer's body is not read."""
        job = snapshot.job
        try:
            async with asyncio.timeout(DEADLINE_S):
                status = await self._call(snapshot)
        except Exception as error:  # whatever an answer provokes, it is a failed call
            logger.warning("the webhook can't be called: %r", error, extra=log_fields(job))
            return False
        is_success = 200 <= status < 300
        if not is_success:
            logger.warning("the webhook answered %d", status, extra=log_fields(job))
        return is_success

    async def _call(self, snapshot: JobSnapshot) -> int:
        """The HTTP status that the webhook answers with."""
        job, state = snapshot.job, snapshot.state
        assert job.webhook_url is not None
        body = json.dumps(
            {
                "type": f"job.{state.status}",
                "timestamp": int(state.ended_at or 0),
                "data": self._describe(snapshot),
            }
        )
        sent_at = str(int(self._clock()))
        headers = {
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "webhook-id": job.id,
            "webhook-timestamp": sent_at,
            "webhook-signature": self._signature(f"{job.id}.{sent_at}.{body}"),
        }
        # A client for each call, so that no cookie of one answer goes into the next call.
        async with (
            httpx2.AsyncClient(verify=self._ssl_context, timeout=DEADLINE_S, follow_redirects=False) as client,
            client.stream("POST", job.webhook_url, content=body, headers=headers) as response,
        ):
            return response.status_code

    def _signature(self, signed: str) -> str:
        digest = hmac.digest(self._key, signed.encode(), hashlib.sha256)
        return f"v1,{base64.b64encode(digest).decode()}"
