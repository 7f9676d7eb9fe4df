"""The client that blocks while it waits."""

import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any, Self

import httpx2

from elastic_dit_client import protocol
from elastic_dit_client.protocol import ApiError, Call, File, Files, Job, Result, StreamEvent
from elastic_dit_client.retries import Attempts, ConnectionSettings, Watch


class Client:
    """A client of one server. Threads may share it.

    `base_url` is the server's address, without `/v1`. `api_key` is one of the server's keys, if it has keys. The fields
    of a request are the HTTP API's, such as `seed`, `size`, `n`, `budget={"quality": 0.9}`.

    After 429 and 503 with `Retry-After` the client waits that long and repeats the call; after a broken connection it
    waits a little and connects again. It retries at most `max_retries` times in a row and within `timeout_s`, which
    limits a whole call (streams and waits may last longer). Then it raises ApiError, or httpx2.TransportError if it
    could not reach the server.

    `http` is an HTTP client with your own proxies and certificates; this client does not close it.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_retries: int = 5,
        http: httpx2.Client | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = ConnectionSettings(base_url, api_key, timeout_s, max_retries, clock)
        self._http = http or httpx2.Client()
        self._owns_http = http is None
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._owns_http:
            self._http.close()

    def generate_image(self, prompt: str, **fields: Any) -> Result:
        """Generate images and wait for them. An interrupted call cancels its job, best effort."""
        return self._generate(protocol.image_call(prompt, fields))

    def edit_image(self, images: Files, prompt: str, *, mask: File | None = None, **fields: Any) -> Result:
        """Edit an image file, or several where the model reads several, and wait. As `generate_image` else.

        `mask` is an image file that is transparent, or white if it has no transparency, where the image may change.
        """
        return self._generate(protocol.edit_call(images, prompt, mask, fields))

    def generate_mesh(self, image: File, **fields: Any) -> Result:
        """Generate a mesh from an image file and wait for it. An interrupted call cancels its job, best effort."""
        return self._generate(protocol.mesh_call(image, fields))

    def stream_image(self, prompt: str, **fields: Any) -> Generator[StreamEvent, None, None]:
        """Generate images and yield the job's events; the last one has the `result`. Raises ApiError if the job fails.

        The request is sent when the first event is read. If the connection breaks, the client connects again and goes
        on after the last event. Closing the generator early (`break` does that) or interrupting it cancels the job,
        best effort.
        """
        return self._stream(protocol.streaming(protocol.image_call(prompt, fields)))

    def stream_edit(
        self, images: Files, prompt: str, *, mask: File | None = None, **fields: Any
    ) -> Generator[StreamEvent, None, None]:
        """`stream_image`, for `edit_image`."""
        return self._stream(protocol.streaming(protocol.edit_call(images, prompt, mask, fields)))

    def stream_mesh(self, image: File, **fields: Any) -> Generator[StreamEvent, None, None]:
        """`stream_image`, for a mesh from an image file."""
        return self._stream(protocol.streaming(protocol.mesh_call(image, fields)))

    def submit_image(self, prompt: str, **fields: Any) -> Job:
        """Submit a job for images and return at once; `wait` and `events` follow it. Only `cancel` cancels it."""
        return self._submit(protocol.submitting(protocol.image_call(prompt, fields)))

    def submit_edit(self, images: Files, prompt: str, *, mask: File | None = None, **fields: Any) -> Job:
        """`submit_image`, for `edit_image`."""
        return self._submit(protocol.submitting(protocol.edit_call(images, prompt, mask, fields)))

    def submit_mesh(self, image: File, **fields: Any) -> Job:
        """`submit_image`, for a mesh from an image file."""
        return self._submit(protocol.submitting(protocol.mesh_call(image, fields)))

    def job(self, job_id: str) -> Job:
        return protocol.job_of(self._answer(protocol.job_call(job_id)).json())

    def jobs(self, *, all_keys: bool = False) -> Generator[Job, None, None]:
        """The jobs that this key created, the newest first, read page by page.

        Their receipts have no decisions. `all_keys` lists the jobs of all keys; it needs the scope admin.
        """
        after: str | None = None
        while True:
            page = self._answer(protocol.jobs_call(after, all_keys)).json()
            yield from map(protocol.job_of, page["data"])
            if not page["has_more"]:
                return
            after = page["last_id"]

    def events(self, job_id: str, after: str | None = None) -> Generator[StreamEvent, None, None]:
        """A job's events, from the first one or after the event with the id `after`. Raises ApiError if the job fails.

        If the connection breaks, the client connects again and goes on after the last event. Closing the generator does
        not cancel the job.
        """
        return self._follow(Watch(self._settings, job_id, after))

    def wait(self, job_id: str, timeout_s: float | None = None) -> Result:
        """Wait until a job ends and return its result. Raises ApiError if the job failed or was cancelled.

        Raises TimeoutError after `timeout_s`, at most two seconds late; the job goes on. The client reads the job's
        events. If no events arrive, for example because a proxy holds them back, it polls the job's status.
        """
        deadline = None if timeout_s is None else self._settings.clock() + timeout_s
        watch = Watch(self._settings, job_id, deadline=deadline)
        try:
            return self._last_result(watch)
        except httpx2.TransportError:
            while not protocol.job_of(self._send(protocol.job_call(job_id), watch.begin()).json()).is_terminal:
                self._sleep(watch.poll_s())
            return self._last_result(Watch(self._settings, job_id, deadline=deadline))

    def content(self, job_id: str, index: int = 0) -> bytes:
        """The file of a succeeded job's mesh, or of its image number `index`."""
        return self._answer(protocol.content_call(job_id, index)).content

    def cancel(self, job_id: str) -> Job:
        """Cancel a job that has not ended, and return the job."""
        return protocol.job_of(self._answer(protocol.cancel_call(job_id)).json())

    def models(self) -> list[dict[str, Any]]:
        """The models that the server has loaded, with their defaults, limits and calibration curves."""
        return protocol.models_of(self._answer(protocol.models_call()))

    def _generate(self, call: Call) -> Result:
        attempts = self._settings.begin()
        try:
            return protocol.result_of(self._send(call, attempts).json())
        finally:
            if attempts.is_unanswered:
                self._abandon(call)

    def _submit(self, call: Call) -> Job:
        response = self._answer(call)
        # A repeated call whose job has already succeeded is answered with the result.
        return (
            protocol.job_of(response.json()) if response.status_code == 202 else self.job(protocol.job_id_of(response))
        )

    def _stream(self, call: Call) -> Generator[StreamEvent, None, None]:
        attempts, watch = self._settings.begin(), Watch(self._settings)
        try:
            response = self._send(call, attempts)
            watch.job_id = protocol.job_id_of(response)
            yield from self._follow(watch, response)
        finally:
            if attempts.is_unanswered or (watch.job_id and not watch.is_over):
                self._abandon(call, watch.job_id)

    def _follow(self, watch: Watch, response: httpx2.Response | None = None) -> Generator[StreamEvent, None, None]:
        """The events of `response`, if it is already open, and of every connection after it."""
        while True:
            response = response or self._send(watch.call(), watch.begin())
            try:
                for sent in httpx2.EventSource(response, max_event_size=None):
                    if (event := watch.take(sent)) is not None:
                        yield event
            except httpx2.TransportError as error:
                watch.note_broken(error)
            finally:
                response.close()
            if watch.is_over or (watch.may_be_at_its_end and self.job(watch.job_id or "").is_terminal):
                return
            response = None
            self._sleep(watch.wait_s())

    def _last_result(self, watch: Watch) -> Result:
        for event in self._follow(watch):
            if (result := event.result) is not None:
                return result
        raise httpx2.RemoteProtocolError(f"the events of job {watch.job_id} have no end")

    def _answer(self, call: Call) -> httpx2.Response:
        return self._send(call, self._settings.begin())

    def _send(self, call: Call, attempts: Attempts) -> httpx2.Response:
        """Send `call`, with retries, and return its answer. The answer of a stream is open and unread."""
        url, headers = self._settings.url(call), self._settings.headers(call)
        while True:
            failure: ApiError | httpx2.TransportError
            request = self._http.build_request(
                call.method, url, json=call.body, headers=headers, timeout=attempts.timeout(call)
            )
            attempts.is_unanswered = True
            try:
                response = self._http.send(request, stream=call.is_stream)
                if not response.is_success:
                    response.read()
            except httpx2.TransportError as error:
                failure = error
            else:
                attempts.is_unanswered = False
                if response.is_success:
                    return response
                failure = protocol.error_of(response)
            self._sleep(attempts.wait_s(failure))

    def _abandon(self, call: Call, job_id: str | None = None) -> None:
        """Cancel the job that `call` made, since nobody waits for it any more."""
        with suppress(ApiError, httpx2.TransportError):
            if job_id is None:
                response = self._send(protocol.finding(call), self._settings.begin_to_abandon())
                response.close()
                job_id = protocol.job_id_of(response)
            self._send(protocol.cancel_call(job_id), self._settings.begin_to_abandon())
