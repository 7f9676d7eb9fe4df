"""The client for asyncio."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, Self

import httpx2

from elastic_dit_client import protocol
from elastic_dit_client.protocol import ApiError, Call, File, Files, Job, Result, StreamEvent
from elastic_dit_client.retries import Attempts, ConnectionSettings, Watch


class AsyncClient:
    """`Client` for asyncio. Wrap a stream that you may leave early: `async with aclosing(client.stream_image(...))`.

    It reads image files in a thread, so that the event loop does not wait for them.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_retries: int = 5,
        http: httpx2.AsyncClient | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = ConnectionSettings(base_url, api_key, timeout_s, max_retries, clock)
        self._http = http or httpx2.AsyncClient()
        self._owns_http = http is None
        self._sleep = sleep
        self._abandoning: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await asyncio.gather(*self._abandoning)
        if self._owns_http:
            await self._http.aclose()

    async def generate_image(self, prompt: str, **fields: Any) -> Result:
        """Generate images and wait for them. A cancelled call cancels its job, best effort."""
        return await self._generate(protocol.image_call(prompt, fields))

    async def edit_image(self, images: Files, prompt: str, *, mask: File | None = None, **fields: Any) -> Result:
        """Edit an image file, or several where the model reads several, and wait. As `generate_image` else.

        `mask` is an image file that is transparent, or white if it has no transparency, where the image may change.
        """
        return await self._generate(await asyncio.to_thread(protocol.edit_call, images, prompt, mask, fields))

    async def generate_mesh(self, image: File, **fields: Any) -> Result:
        """Generate a mesh from an image file and wait for it. A cancelled call cancels its job, best effort."""
        return await self._generate(await asyncio.to_thread(protocol.mesh_call, image, fields))

    def stream_image(self, prompt: str, **fields: Any) -> AsyncGenerator[StreamEvent, None]:
        """Generate images and yield the job's events; the last one has the `result`. Raises ApiError if the job fails.

        The request is sent when the first event is read. If the connection breaks, the client connects again and goes
        on after the last event. Closing the generator early, or cancelling the task that reads it, cancels the job,
        best effort.
        """
        return self._stream(protocol.streaming(protocol.image_call(prompt, fields)))

    async def stream_edit(
        self, images: Files, prompt: str, *, mask: File | None = None, **fields: Any
    ) -> AsyncGenerator[StreamEvent, None]:
        """`stream_image`, for `edit_image`."""
        call = protocol.streaming(await asyncio.to_thread(protocol.edit_call, images, prompt, mask, fields))
        async with aclosing(self._stream(call)) as events:
            async for event in events:
                yield event

    async def stream_mesh(self, image: File, **fields: Any) -> AsyncGenerator[StreamEvent, None]:
        """`stream_image`, for a mesh from an image file."""
        call = protocol.streaming(await asyncio.to_thread(protocol.mesh_call, image, fields))
        async with aclosing(self._stream(call)) as events:
            async for event in events:
                yield event

    async def submit_image(self, prompt: str, **fields: Any) -> Job:
        """Submit a job for images and return at once; `wait` and `events` follow it. Only `cancel` cancels it."""
        return await self._submit(protocol.submitting(protocol.image_call(prompt, fields)))

    async def submit_edit(self, images: Files, prompt: str, *, mask: File | None = None, **fields: Any) -> Job:
        """`submit_image`, for `edit_image`."""
        return await self._submit(
            protocol.submitting(await asyncio.to_thread(protocol.edit_call, images, prompt, mask, fields))
        )

    async def submit_mesh(self, image: File, **fields: Any) -> Job:
        """`submit_image`, for a mesh from an image file."""
        return await self._submit(protocol.submitting(await asyncio.to_thread(protocol.mesh_call, image, fields)))

    async def job(self, job_id: str) -> Job:
        return protocol.job_of((await self._answer(protocol.job_call(job_id))).json())

    async def jobs(self, *, all_keys: bool = False) -> AsyncGenerator[Job, None]:
        """The jobs that this key created, the newest first, read page by page.

        Their receipts have no decisions. `all_keys` lists the jobs of all keys; it needs the scope admin.
        """
        after: str | None = None
        while True:
            page = (await self._answer(protocol.jobs_call(after, all_keys))).json()
            for body in page["data"]:
                yield protocol.job_of(body)
            if not page["has_more"]:
                return
            after = page["last_id"]

    def events(self, job_id: str, after: str | None = None) -> AsyncGenerator[StreamEvent, None]:
        """A job's events, from the first one or after the event with the id `after`. Raises ApiError if the job fails.

        If the connection breaks, the client connects again and goes on after the last event. Closing the generator does
        not cancel the job.
        """
        return self._follow(Watch(self._settings, job_id, after))

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Result:
        """Wait until a job ends and return its result. Raises ApiError if the job failed or was cancelled.

        Raises TimeoutError after `timeout_s`, at most two seconds late; the job goes on. The client reads the job's
        events. If no events arrive, for example because a proxy holds them back, it polls the job's status.
        """
        deadline = None if timeout_s is None else self._settings.clock() + timeout_s
        watch = Watch(self._settings, job_id, deadline=deadline)
        try:
            return await self._last_result(watch)
        except httpx2.TransportError:
            while not protocol.job_of((await self._send(protocol.job_call(job_id), watch.begin())).json()).is_terminal:
                await self._sleep(watch.poll_s())
            return await self._last_result(Watch(self._settings, job_id, deadline=deadline))

    async def content(self, job_id: str, index: int = 0) -> bytes:
        """The file of a succeeded job's mesh, or of its image number `index`."""
        return (await self._answer(protocol.content_call(job_id, index))).content

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job that has not ended, and return the job."""
        return protocol.job_of((await self._answer(protocol.cancel_call(job_id))).json())

    async def models(self) -> list[dict[str, Any]]:
        """The models that the server has loaded, with their defaults, limits and calibration curves."""
        return protocol.models_of(await self._answer(protocol.models_call()))

    async def _generate(self, call: Call) -> Result:
        attempts = self._settings.begin()
        try:
            return protocol.result_of((await self._send(call, attempts)).json())
        finally:
            if attempts.is_unanswered:
                await self._abandon(call)

    async def _submit(self, call: Call) -> Job:
        response = await self._answer(call)
        # A repeated call whose job has already succeeded is answered with the result.
        return (
            protocol.job_of(response.json())
            if response.status_code == 202
            else await self.job(protocol.job_id_of(response))
        )

    async def _stream(self, call: Call) -> AsyncGenerator[StreamEvent, None]:
        attempts, watch = self._settings.begin(), Watch(self._settings)
        try:
            response = await self._send(call, attempts)
            watch.job_id = protocol.job_id_of(response)
            async with aclosing(self._follow(watch, response)) as events:
                async for event in events:
                    yield event
        finally:
            if attempts.is_unanswered or (watch.job_id and not watch.is_over):
                await self._abandon(call, watch.job_id)

    async def _follow(self, watch: Watch, response: httpx2.Response | None = None) -> AsyncGenerator[StreamEvent, None]:
        """The events of `response`, if it is already open, and of every connection after it."""
        while True:
            response = response or await self._send(watch.call(), watch.begin())
            try:
                async for sent in httpx2.EventSource(response, max_event_size=None):
                    if (event := watch.take(sent)) is not None:
                        yield event
            except httpx2.TransportError as error:
                watch.note_broken(error)
            finally:
                await response.aclose()
            if watch.is_over or (watch.may_be_at_its_end and (await self.job(watch.job_id or "")).is_terminal):
                return
            response = None
            await self._sleep(watch.wait_s())

    async def _last_result(self, watch: Watch) -> Result:
        async with aclosing(self._follow(watch)) as events:
            async for event in events:
                if (result := event.result) is not None:
                    return result
        raise httpx2.RemoteProtocolError(f"the events of job {watch.job_id} have no end")

    async def _answer(self, call: Call) -> httpx2.Response:
        return await self._send(call, self._settings.begin())

    async def _send(self, call: Call, attempts: Attempts) -> httpx2.Response:
        """Send `call`, with retries, and return its answer. The answer of a stream is open and unread."""
        url, headers = self._settings.url(call), self._settings.headers(call)
        while True:
            failure: ApiError | httpx2.TransportError
            request = self._http.build_request(
                call.method, url, json=call.body, headers=headers, timeout=attempts.timeout(call)
            )
            attempts.is_unanswered = True
            try:
                response = await self._http.send(request, stream=call.is_stream)
                if not response.is_success:
                    await response.aread()
            except httpx2.TransportError as error:
                failure = error
            else:
                attempts.is_unanswered = False
                if response.is_success:
                    return response
                failure = protocol.error_of(response)
            await self._sleep(attempts.wait_s(failure))

    async def _abandon(self, call: Call, job_id: str | None = None) -> None:
        """Cancel the job that `call` made, even if the current task is cancelled meanwhile."""
        task = asyncio.create_task(self._cancel_job_of(call, job_id))
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)
        await asyncio.shield(task)

    async def _cancel_job_of(self, call: Call, job_id: str | None) -> None:
        with suppress(ApiError, httpx2.TransportError):
            if job_id is None:
                response = await self._send(protocol.finding(call), self._settings.begin_to_abandon())
                await response.aclose()
                job_id = protocol.job_id_of(response)
            await self._send(protocol.cancel_call(job_id), self._settings.begin_to_abandon())
