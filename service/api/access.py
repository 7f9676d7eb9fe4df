"""What a route requires of its callers, declared at the route."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.security import APIKeyQuery, HTTPAuthorizationCredentials, HTTPBearer
from starlette.routing import Match
from starlette.types import Scope

from service import keys
from service.api.caller import caller_of
from service.errors import InsufficientScope
from service.settings import Settings

_bearer = HTTPBearer(
    auto_error=False, scheme_name="ApiKey", description="An API key of this server. Servers without keys ignore it."
)
_link = APIKeyQuery(
    name="signature",
    auto_error=False,
    scheme_name="SignedLink",
    description="The signature of a link that an answer had, in place of a key. `expires` belongs to it.",
)


def default_max_body_bytes(settings: Settings) -> int:
    return settings.max_body_bytes


@dataclass(frozen=True, slots=True)
class Access:
    """A dependency of a route or router, as in `dependencies=[Depends(Access(Scope.GENERATE))]`.

    A call needs a key with `scope`, which the OpenAPI document says. Calls of a `is_rate_limited` route count towards
    the caller's rate limit. FastAPI evaluates dependencies after it has read the body, so the middlewares look the
    declaration up before: `Authentication` checks the key and the rate limit of rate-limited routes, `BodyLimit` stops
    at `max_body_bytes` of the settings.
    """

    scope: keys.Scope
    is_rate_limited: bool = False
    max_body_bytes: Callable[[Settings], int] = default_max_body_bytes

    async def __call__(
        self, request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None
    ) -> None:
        """Raise InvalidApiKey or InsufficientScope unless the caller's key allows the call."""
        caller = caller_of(request.scope)
        if caller.key_error is not None:
            raise caller.link_error or caller.key_error
        if caller.key is not None and not caller.key.allows(self.scope):
            raise InsufficientScope(
                f"this key is for {', '.join(sorted(caller.key.scopes))}; this call needs {self.scope}"
            )


class AccessByLink(Access):
    """Access that a key or a signed link gives. `Authentication` checks the link, which is for one address alone."""

    async def __call__(
        self,
        request: Request,
        _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None,
        _signature: Annotated[str | None, Depends(_link)] = None,
        _expires: Annotated[str | None, Query(alias="expires", description="Of a signed link: Unix seconds.")] = None,
    ) -> None:
        """Raise InvalidLink, LinkExpired, InvalidApiKey or InsufficientScope unless the caller may call."""
        if not caller_of(request.scope).has_link:
            await super().__call__(request)


def access_of(scope: Scope) -> Access | None:
    """What the route of an HTTP request declares; None if no route matches, or if the route is open to all."""
    for context in iter_route_contexts(scope["app"].routes):
        route = context.original_route
        if isinstance(route, APIRoute) and route.matches(scope)[0] is Match.FULL:
            declared = [dependency.dependency for dependency in route.dependencies]
            return next((access for access in declared if isinstance(access, Access)), None)
    return None
