"""The one record of who makes an HTTP request."""

from dataclasses import dataclass

from starlette.types import Scope

from service.errors import InvalidApiKey, InvalidLink, LinkExpired
from service.keys import ApiKey


@dataclass(slots=True)
class Caller:
    """Who makes an HTTP request, and which model and job the request turned out to be about.

    The `RequestId` middleware creates it, `Authentication` sets `key` or `key_error`, and a generation route sets
    `model` and `job_id` as soon as it knows them. `key` is None on a server without keys, and without a valid key. With
    a signed link, `Authentication` also sets `has_link` or `link_error`.
    """

    request_id: str
    key: ApiKey | None = None
    key_error: InvalidApiKey | None = None
    has_link: bool = False
    link_error: InvalidLink | LinkExpired | None = None
    model: str = ""
    job_id: str | None = None

    @property
    def owner(self) -> str | None:
        """The owner of the jobs that this caller creates: its key's id, None without keys."""
        return None if self.key is None else self.key.id


def set_caller(scope: Scope, caller: Caller) -> None:
    scope.setdefault("state", {})["caller"] = caller


def caller_of(scope: Scope) -> Caller:
    """The caller of the HTTP request with this ASGI scope, below the `RequestId` middleware."""
    caller: Caller = scope["state"]["caller"]
    return caller
