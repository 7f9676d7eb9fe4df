"""The links in answers: to jobs, their events and their artifacts.

Browsers send no key for `<img src>` and `EventSource`. So on a server with API keys, links to events and artifacts can
be signed: whoever has such a link may open what it leads to, and nothing else, until it expires.
"""

import base64
import hashlib
import hmac
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlencode

from fastapi import Request

from service.errors import InvalidLink, LinkExpired
from service.jobs.job import Job
from service.settings import Settings

_EXPIRES, _SIGNATURE = "expires", "signature"
_SECONDS = re.compile(r"[0-9]{1,12}", re.ASCII)


@dataclass(frozen=True, slots=True)
class LinkSigner:
    """Signs paths with HMAC-SHA256. `clock` gives Unix seconds, by one clock for all servers that share `secret`."""

    secret: bytes
    ttl_s: float
    clock: Callable[[], float]

    def signed(self, path: str) -> str:
        """`path`, which may have a query, with the time when it expires and its signature."""
        expires = str(math.ceil(self.clock() + self.ttl_s))
        query = urlencode({_EXPIRES: expires, _SIGNATURE: self._signature(path, expires)})
        return f"{path}{'&' if '?' in path else '?'}{query}"

    def check(self, path: str, query: str) -> bool:
        """Whether `query` has a signature.

        Raises InvalidLink unless it is that of `path` with the rest of the query, and LinkExpired after its time.
        """
        fields = parse_qsl(query, keep_blank_values=True)
        signing = {name: value for name, value in fields if name in (_EXPIRES, _SIGNATURE)}
        if _SIGNATURE not in signing:
            return False
        expires = signing.get(_EXPIRES, "")
        rest = urlencode([(name, value) for name, value in fields if name not in signing])
        expected = self._signature(f"{path}?{rest}" if rest else path, expires)
        if not _SECONDS.fullmatch(expires) or not hmac.compare_digest(
            expected.encode(), signing[_SIGNATURE].encode("utf-8", "replace")
        ):
            raise InvalidLink("the link's signature is not that of this server for this address; use a link as it is")
        if self.clock() >= int(expires):
            raise LinkExpired("the link has expired; the job's links, GET /v1/jobs/{id} with a key, are new ones")
        return True

    def _signature(self, path: str, expires: str) -> str:
        digest = hmac.digest(self.secret, f"link {path} {expires}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def link_signer(settings: Settings, clock: Callable[[], float]) -> LinkSigner | None:
    """None if links are open to all anyway, or if there is no secret to sign them with."""
    if settings.link_secret is None or not settings.has_keys:
        return None
    return LinkSigner(settings.link_secret.get_secret_value().encode(), settings.link_ttl_s, clock)


@dataclass(frozen=True, slots=True)
class Links:
    """The links of one answer. `base` is the server's address for its client; without a `signer` none is signed."""

    base: str
    signer: LinkSigner | None

    def to_job(self, job: Job) -> str:
        """Never signed: only a key shows a job."""
        return f"{self.base}{_path(job)}"

    def to_events(self, job: Job) -> str:
        return self._opening(f"{_path(job)}/events")

    def to_artifacts(self, job: Job) -> list[str]:
        return [self._opening(f"{_path(job)}/content?index={index}") for index in range(len(job.requests))]

    def _opening(self, path: str) -> str:
        return self.base + (path if self.signer is None else self.signer.signed(path))


def links_of(request: Request, settings: Settings) -> Links:
    """The links of the answer to `request`."""
    return Links(settings.public_url or str(request.base_url).rstrip("/"), request.app.state.link_signer)


def _path(job: Job) -> str:
    return f"/v1/jobs/{quote(job.id)}"
