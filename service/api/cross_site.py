"""Refuses calls that pages of other sites make through a visitor's browser.

A browser lets any page send a form to any server that the visitor's machine reaches, also to one on localhost. And a
page can let its own name lead to 127.0.0.1 (DNS rebinding); the browser then takes this server for a part of its site.
See https://owasp.org/www-community/attacks/csrf and https://en.wikipedia.org/wiki/DNS_rebinding.
"""

import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import answer_error, status_and_error
from service.api.validation import shown
from service.errors import CrossSiteCall, HostNotAllowed, ServiceError
from service.settings import Settings

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class CrossSiteGuard:
    """Check the `Host` of every request, and where a browser says that a call comes from.

    `count_rejection` gets the error code of each refusal.
    """

    def __init__(self, app: ASGIApp, settings: Settings, count_rejection: Callable[[str], None]) -> None:
        self.app = app
        self.hosts = AllowedHosts(settings)
        self.origins = {*settings.cors_origins, *_origin_of(settings.public_url)}
        self.count_rejection = count_rejection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self.hosts.check(headers.get("host"))
            if scope["method"] not in _SAFE_METHODS:
                self._check_site(headers)
        except ServiceError as error:
            self.count_rejection(status_and_error(error)[1].code)
            response = await answer_error(Request(scope), error)
            response.headers["Connection"] = "close"  # otherwise uvicorn reads the whole body
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_site(self, headers: Headers) -> None:
        """Raise CrossSiteCall if a browser says that the page of another site calls. Other clients say nothing."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self.origins or "*" in self.origins:
            return
        if site is None:
            is_own = origin is None or _is_same_origin(origin, headers.get("host", ""))
        else:
            is_own = site in ("same-origin", "none")
        if not is_own:
            page = f"a page of {shown(origin)}" if origin else "a page of another site"
            raise CrossSiteCall(f"{page} may not call this server; its setting cors_origins can allow it")


class AllowedHosts:
    """The names under which a server answers; decision 20 has the rule."""

    def __init__(self, settings: Settings) -> None:
        self._names = {name.lower() for name in settings.allowed_hosts}
        if settings.public_url is not None and (name := urlsplit(settings.public_url).hostname) is not None:
            self._names.add(name)
        self._allows_all = "*" in self._names or (settings.has_keys and not settings.allowed_hosts)
        self._allows_local_names = not _is_loopback(settings.host)

    def check(self, host: str | None) -> None:
        """Raise HostNotAllowed for a `Host` header that a page may have chosen. Browsers always send the header."""
        if host is None or self._allows_all:
            return
        try:
            name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
        except ValueError:
            name = ""
        if name in self._names or _is_loopback(name) or (self._allows_local_names and _is_address_or_local(name)):
            return
        raise HostNotAllowed(f"this server is not {shown(host)}; its setting allowed_hosts can name it")


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return name == "localhost" or name.endswith(".localhost") if address is None else address.is_loopback


def _is_address_or_local(name: str) -> bool:
    """Whether no page can have the name: an address, or a name without a dot, which only a local network knows."""
    return _address(name) is not None or (name != "" and "." not in name)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _origin_of(url: str | None) -> list[str]:
    """The origin of pages below `url`, if any."""
    if url is None:
        return []
    parts = urlsplit(url)
    return [f"{parts.scheme}://{parts.netloc}".lower()]


def _is_same_origin(origin: str, host: str) -> bool:
    """Whether pages of `origin` come from `host`, a `Host` header. A proxy may speak HTTPS for this server."""
    try:
        page, server = urlsplit(origin), urlsplit(f"//{host}")
        port = _DEFAULT_PORTS.get(page.scheme)
        return port is not None and (page.hostname, page.port or port) == (server.hostname, server.port or port)
    except ValueError:
        return False
