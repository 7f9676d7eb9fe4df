"""Who calls, whether they may, and how often.

`Doors` finds the key and counts the call; `require` lets routes ask what the key is for. Without keys in the settings
the server is open: everybody may do everything, and is counted by their address if there is a limit.
"""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItem
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import keys
from service.api.errors import answer_error, status_and_error
from service.errors import InsufficientScope, InvalidApiKey, RateLimitExceeded, ServiceError
from service.keys import ApiKey, ApiKeys
from service.rate_limits import RateLimits, Standing

_bearer = HTTPBearer(
    auto_error=False, scheme_name="ApiKey", description="An API key of this server, where it has keys at all."
)


class Doors:
    """Put the caller's key into `request.state.key`, and refuse what is posted without one, or too often.

    That is decided before the body is read. FastAPI asks dependencies only afterwards, when a stranger could have sent
    megabytes. Without a key, or one of its own limit, a caller has `default_limit`; None is no limit.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: ApiKeys,
        rate_limits: RateLimits,
        default_limit: RateLimitItem | None,
        count_rejection: Callable[[str], None],
    ) -> None:
        self.app = app
        self.api_keys = api_keys
        self.rate_limits = rate_limits
        self.default_limit = default_limit
        self.count_rejection = count_rejection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["key"] = state["key_error"] = None
        try:
            state["key"] = self.api_keys.identify(Headers(scope=scope).get("authorization"))
        except InvalidApiKey as error:
            state["key_error"] = error  # whether it matters depends on the route
        if scope["method"] != "POST" or not scope["path"].startswith("/v1/"):  # whatever is posted there is to be made
            await self.app(scope, receive, send)
            return
        standing = None
        try:
            if state["key_error"] is not None:
                raise state["key_error"]
            standing = await self._count(state["key"], scope)
            if standing is not None and not standing.is_allowed:
                raise RateLimitExceeded(
                    f"more than {standing.limit} calls; the next one is possible in {standing.reset_s} s",
                    standing.reset_s,
                )
        except ServiceError as error:
            self.count_rejection(status_and_error(error)[1].code)
            response = await answer_error(Request(scope), error)
            response.headers["Connection"] = "close"  # else uvicorn reads the body to its end
            await response(scope, receive, _with_standing(send, standing))
            return
        await self.app(scope, receive, _with_standing(send, standing))

    async def _count(self, key: ApiKey | None, scope: Scope) -> Standing | None:
        limit = self.default_limit if key is None or key.rate_limit is None else key.rate_limit
        if limit is None:
            return None
        if key is not None:
            return await self.rate_limits.count(limit, "key", key.id)
        address = scope["client"][0] if scope.get("client") else "unknown"
        return await self.rate_limits.count(limit, "address", address)


def _with_standing(send: Send, standing: Standing | None) -> Send:
    """`send`, with OpenAI's headers about rate limits. Of a moving window the reset is when one more call is free."""
    if standing is None:
        return send

    async def send_with_standing(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-ratelimit-limit-requests"] = str(standing.limit)
            headers["x-ratelimit-remaining-requests"] = str(standing.remaining)
            headers["x-ratelimit-reset-requests"] = f"{standing.reset_s}s"
        await send(message)

    return send_with_standing


def require(scope: keys.Scope) -> Any:
    """A dependency that raises InvalidApiKey and InsufficientScope, and documents that a key is needed."""

    async def check(
        request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None
    ) -> None:
        if request.state.key_error is not None:
            raise request.state.key_error
        key: ApiKey | None = request.state.key
        if key is not None and not key.allows(scope):
            raise InsufficientScope(f"this key is for {', '.join(sorted(key.scopes))}; this call needs {scope}")

    return Depends(check)
