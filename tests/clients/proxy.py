"""A reverse proxy that serves the server under a path prefix, as `location /prefix/ { proxy_pass http://server/; }` of
nginx does: it takes the prefix off the path.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from threading import Thread

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

_METHODS = ["GET", "HEAD", "POST", "DELETE", "OPTIONS"]
# Headers of one connection, which say nothing of the next one (RFC 9110, section 7.6.1).
_OF_A_CONNECTION = {"connection", "keep-alive", "te", "transfer-encoding", "upgrade"}


@contextmanager
def prefix_proxy(listener: socket.socket, prefix: str, server: str) -> Iterator[None]:
    """Pass `prefix`/x on to `server`/x, in a thread, for as long as the block runs."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, httpx2.AsyncClient]]:
        async with httpx2.AsyncClient(base_url=server, timeout=None) as client:
            yield {"client": client}

    async def pass_on(request: Request) -> Response:
        client: httpx2.AsyncClient = request.state.client
        path = request.url.path.removeprefix(prefix)
        asked = client.build_request(
            request.method,
            f"{path}?{request.url.query}" if request.url.query else path,
            headers=_passed_on(request.headers.items()) + _forwarded(request, prefix),
            content=request.stream() if "content-length" in request.headers else None,
        )
        answer = await client.send(asked, stream=True)
        return StreamingResponse(_body_of(answer), answer.status_code, dict(_passed_on(answer.headers.items())))

    async def nothing(request: Request) -> Response:
        return PlainTextResponse("nothing is served here", 404)

    routes = [Route(prefix + "/{path:path}", pass_on, methods=_METHODS), Route("/{path:path}", nothing)]
    proxy = uvicorn.Server(
        uvicorn.Config(Starlette(routes=routes, lifespan=lifespan), log_level="warning", timeout_graceful_shutdown=5)
    )
    thread = Thread(target=lambda: asyncio.run(proxy.serve([listener])))
    thread.start()
    yield
    proxy.should_exit = True
    thread.join()


def _passed_on(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in _OF_A_CONNECTION]


def _forwarded(request: Request, prefix: str) -> list[tuple[str, str]]:
    client = request.client.host if request.client else ""
    return [("X-Forwarded-For", client), ("X-Forwarded-Proto", "http"), ("X-Forwarded-Prefix", prefix)]


async def _body_of(answer: httpx2.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()
