"""Authentication and rate limits.

`Authentication` identifies the key of every request and checks signed links; `access.Access` declares what a route
requires of them. A server without keys is open: everybody may do everything, and rate limits count by address.
"""

from collections.abc import Callable
from ipaddress import IPv6Address, IPv6Network

from limits import RateLimitItem
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.access import AccessByLink, access_of
from service.api.caller import Caller, caller_of
from service.api.errors import answer_error, status_and_error
from service.api.links import LinkSigner
from service.errors import InvalidApiKey, InvalidLink, LinkExpired, RateLimitExceeded, ServiceError
from service.keys import ApiKey, ApiKeys
from service.rate_limits import RateLimits, RateLimitStatus


class Authentication:
    """Set the caller's key. Refuse calls of rate-limited routes that have no valid key or exceed the rate limit.

    It refuses them before the body is read: otherwise a stranger could send megabytes first. A caller without a key, or
    whose key has no limit of its own, has `default_limit`; None is no limit. `count_rejection` gets the error code of
    each refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: ApiKeys,
        rate_limits: RateLimits,
        default_limit: RateLimitItem | None,
        link_signer: LinkSigner | None,
        count_rejection: Callable[[str], None],
    ) -> None:
        self.app = app
        self.api_keys = api_keys
        self.rate_limits = rate_limits
        self.default_limit = default_limit
        self.link_signer = link_signer
        self.count_rejection = count_rejection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        caller = caller_of(scope)
        try:
            caller.key = self.api_keys.identify(Headers(scope=scope).get("authorization"))
        except InvalidApiKey as error:
            caller.key_error = error  # raised by the routes that need a key
        access = access_of(scope)
        if isinstance(access, AccessByLink):
            self._check_link(caller, scope)
        if access is None or not access.is_rate_limited:
            await self.app(scope, receive, send)
            return
        status = None
        try:
            if caller.key_error is not None:
                raise caller.key_error
            status = await self._count(caller.key, scope)
            if status is not None and not status.is_allowed:
                raise RateLimitExceeded(
                    f"more than {status.limit} calls; the next one is possible in {status.reset_s} s", status.reset_s
                )
        except ServiceError as error:
            self.count_rejection(status_and_error(error)[1].code)
            response = await answer_error(Request(scope), error)
            response.headers["Connection"] = "close"  # otherwise uvicorn reads the whole body
            await response(scope, receive, _with_rate_limit_headers(send, status))
            return
        await self.app(scope, receive, _with_rate_limit_headers(send, status))

    def _check_link(self, caller: Caller, scope: Scope) -> None:
        if self.link_signer is None:
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            caller.has_link = self.link_signer.check(path, scope["query_string"].decode("latin-1"))
        except (InvalidLink, LinkExpired) as error:
            caller.link_error = error  # a valid key is enough

    async def _count(self, key: ApiKey | None, scope: Scope) -> RateLimitStatus | None:
        limit = self.default_limit if key is None or key.rate_limit is None else key.rate_limit
        if limit is None:
            return None
        if key is not None:
            return await self.rate_limits.count(limit, "key", key.id)
        address = scope["client"][0] if scope.get("client") else "unknown"
        return await self.rate_limits.count(limit, "address", _caller_of_address(address))


def _caller_of_address(address: str) -> str:
    """`address`, or its network of 64 bits: one IPv6 client has all addresses of such a network."""
    try:
        parsed = IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    return str(parsed.ipv4_mapped or IPv6Network((parsed, 64), strict=False))


def _with_rate_limit_headers(send: Send, status: RateLimitStatus | None) -> Send:
    """`send`, adding OpenAI's rate-limit headers. The window moves, so `reset` is when one more call is possible."""
    if status is None:
        return send

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-ratelimit-limit-requests"] = str(status.limit)
            headers["x-ratelimit-remaining-requests"] = str(status.remaining)
            headers["x-ratelimit-reset-requests"] = f"{status.reset_s}s"
        await send(message)

    return send_with_headers
