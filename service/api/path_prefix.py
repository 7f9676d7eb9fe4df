"""Serves everything below a path, which a proxy in front may have removed or not."""

from starlette.types import ASGIApp, Receive, Scope, Send


class PathPrefix:
    """Make every path begin with `prefix`, and tell Starlette so, which then routes by the rest.

    A path that does not begin with it comes from a proxy that has removed it, or from a caller inside. A slash at the
    end means nothing. Redirects would do the same, but clients may drop their key, and proxies change the address.
    """

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        """`prefix` is empty or such as /images."""
        self.app = app
        self.prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            rest = path.removeprefix(self.prefix) if f"{path}/".startswith(f"{self.prefix}/") else path
            # In place, because the middlewares around this one ask the scope which route it was.
            scope["path"] = self.prefix + (rest.removesuffix("/") or "/")
            scope["root_path"] = self.prefix
        await self.app(scope, receive, send)
