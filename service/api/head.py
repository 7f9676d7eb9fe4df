"""Answers HEAD wherever GET is answered."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadAsGet:
    """Answer HEAD with the headers that GET gets, so with the same checks. A stream ends where it would begin."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        is_answered = asyncio.Event()

        async def disconnect_after_answer() -> Message:
            await is_answered.wait()
            return {"type": "http.disconnect"}

        async def send_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body"})
                is_answered.set()

        # In place, because the middlewares around this one ask the scope which route it was.
        scope["method"] = "GET"
        try:
            await self.app(scope, disconnect_after_answer, send_headers)
        finally:
            scope["method"] = "HEAD"
