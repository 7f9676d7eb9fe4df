"""The middlewares around every route, built from the settings."""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware

from service.api.auth import Authentication
from service.api.body_limit import BodyLimit
from service.api.cross_site import CrossSiteGuard
from service.api.errors import answer_error
from service.api.head import HeadAsGet
from service.api.links import link_signer
from service.api.path_prefix import PathPrefix
from service.api.request_log import AccessLog, RequestId
from service.api.security_headers import SecurityHeaders
from service.errors import BadConfiguration
from service.keys import load_keys
from service.rate_limits import RateLimits, parse_rate_limit
from service.settings import Settings

if TYPE_CHECKING:  # from the extra "tracing", which most servers do not install
    from opentelemetry.sdk.trace import TracerProvider


class Middlewares:
    """Owns what outlives a request: the keys, the counts of calls, and the traces that wait to be sent."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        """`clock` is the one by which links expire. Raises BadConfiguration and OSError for impossible settings."""
        self._settings = settings
        self.link_signer = link_signer(settings, clock)
        self.keys = load_keys(settings.api_keys_file, settings.api_keys)
        self._rate_limits = RateLimits(settings.redis_url)
        self._tracer_provider = None if settings.otlp_endpoint is None else _tracer_provider(settings.otlp_endpoint)

    @property
    def telemetry(self) -> TelemetryConfig | None:
        """The value of FastAPI's argument `telemetry`."""
        if self._tracer_provider is None:
            return None
        from service.tracing import telemetry_config

        return telemetry_config(self._tracer_provider)

    def add_to(self, app: FastAPI, count_rejection: Callable[[str], None]) -> None:
        """`count_rejection` is called with the error code of each request that is refused before it reaches a route."""
        settings = self._settings
        # The middleware that is added last is the outermost.
        app.add_middleware(BodyLimit, settings=settings)
        app.add_middleware(
            Authentication,
            api_keys=self.keys,
            rate_limits=self._rate_limits,
            default_limit=None if settings.rate_limit is None else parse_rate_limit(settings.rate_limit),
            link_signer=self.link_signer,
            count_rejection=count_rejection,
        )
        app.add_middleware(CrossSiteGuard, settings=settings, count_rejection=count_rejection)
        # Starlette has one around everything, whose answer has none of the headers that are added from here on.
        app.add_middleware(ServerErrorMiddleware, handler=answer_error)
        if settings.cors_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "HEAD", "POST", "DELETE"),
                # SDKs, tracers and proxies add headers of their own. None means more than it does from curl: there are
                # no cookies, and the page must hold the key.
                allow_headers=("*",),
                allow_private_network=True,
                expose_headers=("*",),
            )
        app.add_middleware(PathPrefix, prefix=settings.path_prefix)
        app.add_middleware(HeadAsGet)
        app.add_middleware(SecurityHeaders)
        app.add_middleware(AccessLog)
        app.add_middleware(RequestId)

    async def close(self) -> None:
        await self._rate_limits.close()
        if self._tracer_provider is not None:
            await asyncio.to_thread(self._tracer_provider.shutdown)


def _tracer_provider(otlp_endpoint: str) -> "TracerProvider":
    try:
        from service.tracing import tracer_provider
    except ModuleNotFoundError as error:
        raise BadConfiguration(
            f"otlp_endpoint needs the package of {error.name}: pip install 'elastic-dit-serve[tracing]'"
        ) from error
    return tracer_provider(otlp_endpoint)
