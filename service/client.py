"""A client of the server for Python, sync and async.

    with Client("http://127.0.0.1:8000") as client:
        result = client.generate_image("a red circle", budget={"preset": "fast"})
        Path("circle.png").write_bytes(result.files[0])

It knows the HTTP contract and nothing else of the server. `Client` and `AsyncClient` have the same methods; all that is
no input or output stands between them once, above.

Every POST carries an `Idempotency-Key` that the client makes, so that one that is sent again still makes one job. With
such a key the server does not cancel the job of a client that hangs up. So the client does it: a `generate_` or
`stream_` call that is interrupted, runs out of time or loses the server, and a stream that is closed before its end,
cancel their job. That is best effort: a client that is killed leaves its job running.
"""

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx2

_CONNECT_S = 10.0
# The server says something every 15 seconds in a stream, and answers at once whatever does not generate.
_SILENCE_S = 60.0
# How often a wait that has a limit looks at the clock, while the server is silent.
_LOOK_S = 2.0
_POLL_S = 1.0
# What an interrupted call has left, for each of the two requests that cancel its job.
_ABANDON_S = 5.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 8.0

_IMAGES, _MESHES = "/v1/images", "/v1/meshes"
_ASYNC = {"Prefer": "respond-async"}
_OWN_FIELDS = {"stream", "response_format"}
_TERMINAL = {"succeeded", "failed", "cancelled"}


class ApiError(Exception):
    """The server's no, or a job's failure. `code` is stable and tells errors apart; README and OpenAPI list them.

    `status` is None for an error of a job whose call had been answered before: at the end of its events. `code` is None
    if what answered was not the server but something before it.
    """

    def __init__(
        self,
        status: int | None,
        code: str | None,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(status, code, message, param, retry_after_s, request_id)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    def __str__(self) -> str:
        parts = [str(part) for part in (self.status, self.code) if part is not None]
        return f"{' '.join(parts)}: {self.message}" if parts else self.message


@dataclass(frozen=True, slots=True)
class Result:
    """What a job made: a file and a seed for each picture, or one of each for a mesh. `receipt` is what was done."""

    job_id: str
    model: str
    files: tuple[bytes, ...]
    seeds: tuple[int, ...]
    output_format: str
    receipt: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """`status` is queued, running, succeeded, failed or cancelled; `error` is why it failed, as the server says it."""

    id: str
    status: str
    step: int
    num_inference_steps: int
    receipt: dict[str, Any] | None
    error: dict[str, Any] | None

    @property
    def is_terminal(self) -> bool:
        return self.status in _TERMINAL


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """`id` is what `events` can go on after; `data` is the event's JSON."""

    name: str
    id: str | None
    data: dict[str, Any]

    @property
    def is_last(self) -> bool:
        return self.name.endswith("_generation.completed")

    @property
    def file(self) -> bytes | None:
        """The picture or mesh of the event: a preview, or the first of the result."""
        return base64.b64decode(self.data["b64_json"]) if "b64_json" in self.data else None

    @property
    def result(self) -> Result | None:
        """The result, if this is the last event."""
        return _result_of(self.data) if self.is_last else None


@dataclass(frozen=True, slots=True)
class _Call:
    """A request. `silence_s` is how long the server may say nothing; None is for as long as the call may take."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_stream: bool = False
    silence_s: float | None = _SILENCE_S


def _generation_call(path: str, fields: Mapping[str, Any]) -> _Call:
    if own := _OWN_FIELDS & fields.keys():
        raise ValueError(f"{', '.join(sorted(own))}: the client chooses that itself; use generate, stream or submit")
    return _Call("POST", path, fields, {"Idempotency-Key": str(uuid.uuid4())}, silence_s=None)


def _submitting(call: _Call) -> _Call:
    return replace(call, headers={**call.headers, **_ASYNC}, silence_s=_SILENCE_S)


def _streaming(call: _Call) -> _Call:
    return replace(call, body={**(call.body or {}), "stream": True}, is_stream=True, silence_s=_SILENCE_S)


def _finding(call: _Call) -> _Call:
    """A call that tells at once which job `call` has made: it has the same key and the same body."""
    return call if call.is_stream else _submitting(call)


def _image_call(prompt: str, fields: Mapping[str, Any]) -> _Call:
    return _generation_call(_IMAGES, {"prompt": prompt, **fields})


def _mesh_call(picture: bytes, fields: Mapping[str, Any]) -> _Call:
    return _generation_call(_MESHES, {"input_image": base64.b64encode(picture).decode("ascii"), **fields})


def _bytes_of(picture: bytes | Path) -> bytes:
    return picture.read_bytes() if isinstance(picture, Path) else picture


def _job_path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _job_call(job_id: str) -> _Call:
    return _Call("GET", _job_path(job_id))


def _cancel_call(job_id: str) -> _Call:
    return _Call("DELETE", _job_path(job_id))


def _content_call(job_id: str, index: int) -> _Call:
    return _Call("GET", f"{_job_path(job_id)}/content?index={index}")


def _result_of(body: Mapping[str, Any]) -> Result:
    return Result(
        job_id=body["id"],
        model=body["model"],
        files=tuple(base64.b64decode(file["b64_json"]) for file in body["data"]),
        seeds=tuple(file["seed"] for file in body["data"]),
        output_format=body["output_format"],
        receipt=body["receipt"],
    )


def _job_of(body: Mapping[str, Any]) -> Job:
    progress = body["progress"]
    return Job(
        body["id"], body["status"], progress["step"], progress["num_inference_steps"], body["receipt"], body["error"]
    )


def _job_id_of(response: httpx2.Response) -> str:
    """Of a stream, that has not been read, or of any other answer to a POST."""
    return str(response.headers.get("X-Job-ID") or response.json()["id"])


def _models_of(response: httpx2.Response) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = response.json()["data"]
    return models


def _error_of(response: httpx2.Response) -> ApiError:
    try:
        error = response.json()["error"]
        code, message, param = error.get("code"), error["message"], error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):  # of a proxy, perhaps
        code, message, param = None, response.text[:500] or response.reason_phrase, None
    request_id = response.headers.get("X-Request-ID")
    return ApiError(response.status_code, code, message, param, _retry_after_s(response), request_id)


def _retry_after_s(response: httpx2.Response) -> float | None:
    """Seconds, or a date (RFC 9110, section 10.2.3); that is compared with the server's own clock, if it tells it."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    due = _date_of(value)
    if due is None:
        return None
    now = _date_of(response.headers.get("Date", "")) or datetime.now(UTC)
    return max(0.0, (due - now).total_seconds())


def _date_of(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _backoff_s(num_failures: int) -> float:
    return min(_FIRST_BACKOFF_S * 2.0 ** (num_failures - 1), _MAX_BACKOFF_S)


@dataclass(slots=True)
class _Attempts:
    """One call's: `deadline` is when it has taken too long, by `clock`.

    `is_out` says whether a request has been sent that was not answered, and so may have made a job.
    """

    max_retries: int
    deadline: float
    clock: Callable[[], float]
    num_failures: int = 0
    is_out: bool = False

    def timeout(self, call: _Call) -> httpx2.Timeout:
        left_s = max(self.deadline - self.clock(), 0.001)
        silence_s = left_s if call.silence_s is None else min(left_s, call.silence_s)
        return httpx2.Timeout(silence_s, connect=min(left_s, _CONNECT_S))

    def wait_s(self, failure: ApiError | httpx2.TransportError) -> float:
        """How long to wait before the next attempt. Raises `failure` if there is to be none."""
        self.num_failures += 1
        if isinstance(failure, ApiError):
            wait_s = failure.retry_after_s if failure.status in (429, 503) else None
        else:
            wait_s = _backoff_s(self.num_failures)
        if wait_s is None or self.num_failures > self.max_retries or self.clock() + wait_s >= self.deadline:
            raise failure
        return wait_s


@dataclass(frozen=True, slots=True)
class _Settings:
    """What both clients are told; `timeout_s` is for one call with all its retries."""

    base_url: str
    api_key: str | None
    timeout_s: float
    max_retries: int
    clock: Callable[[], float]

    def begin(self, deadline: float | None = None) -> _Attempts:
        latest = self.clock() + self.timeout_s
        return _Attempts(self.max_retries, latest if deadline is None else min(latest, deadline), self.clock)

    def begin_to_abandon(self) -> _Attempts:
        return _Attempts(0, self.clock() + _ABANDON_S, self.clock)

    def url(self, call: _Call) -> str:
        return f"{self.base_url.rstrip('/')}{call.path}"

    def headers(self, call: _Call) -> dict[str, str]:
        key = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return {**call.headers, **key}


@dataclass(slots=True)
class _Watch:
    """What has been read of a job's events, over as many connections as it takes.

    With a `deadline` it raises TimeoutError after it. `is_over` is set by the job's last event.
    """

    settings: _Settings
    job_id: str | None = None
    last_id: str | None = None
    deadline: float | None = None
    is_over: bool = False
    _num_failures: int = 0
    _has_news: bool = False
    _failure: ApiError | httpx2.TransportError | None = None

    def begin(self) -> _Attempts:
        self.check_time()
        self._has_news, self._failure = False, None
        return self.settings.begin(self.deadline)

    def call(self) -> _Call:
        assert self.job_id is not None
        headers = {} if self.last_id is None else {"Last-Event-ID": self.last_id}
        silence_s = _SILENCE_S if self.deadline is None else _LOOK_S
        return _Call("GET", f"{_job_path(self.job_id)}/events", headers=headers, is_stream=True, silence_s=silence_s)

    def check_time(self) -> None:
        if self.deadline is not None and self.settings.clock() >= self.deadline:
            raise TimeoutError(f"job {self.job_id} has not ended in time")

    def take(self, sent: httpx2.ServerSentEvent) -> StreamEvent | None:
        """The event; None if it tells of the server, and not of the job. Raises ApiError for the job's failure."""
        self.check_time()
        data = json.loads(sent.data)
        # Ids are of a job's events. The parser repeats the last one for an event without.
        is_of_job = sent.id not in ("", self.last_id)
        if sent.event == "error":
            detail = data["error"]
            error = ApiError(None, detail["code"], detail["message"], detail["param"])
            if is_of_job:
                self.is_over = True
                raise error
            self._failure = error
            return None
        event = StreamEvent(sent.event, sent.id or None, data)
        self.last_id, self.is_over = sent.id or self.last_id, event.is_last
        self._num_failures, self._has_news = 0, True
        return event

    def note(self, error: httpx2.TransportError) -> None:
        """The connection broke."""
        self._failure = error

    @property
    def may_be_at_its_end(self) -> bool:
        """Whether there was nothing left to read, which is so after a job's last event, and else seldom."""
        return not self._has_news and self._failure is None

    def wait_s(self) -> float:
        """How long to wait before the next connection. Raises what ended the last one, if it is to be the last."""
        if self.deadline is not None and isinstance(self._failure, httpx2.ReadTimeout):
            return 0.0  # it has only looked at the clock
        self._num_failures += 1
        if self._num_failures > self.settings.max_retries:
            raise self._failure or httpx2.RemoteProtocolError(f"the events of job {self.job_id} end before the job")
        return _backoff_s(self._num_failures)

    def poll_s(self) -> float:
        self.check_time()
        return _POLL_S


class Client:
    """`base_url` is the server's address, without `/v1`. `api_key` is one of its keys, if it has any.

    429 and 503 are asked again after their `Retry-After`, and broken connections after a pause, `max_retries` times in
    a row and within `timeout_s`, which is for a whole call; streams and waits may last longer. What remains is raised:
    ApiError, or httpx2.TransportError if the server could not be reached. `http` is an HTTP client of your own, with
    the proxies and certificates you need; you close it yourself. May be used by several threads.

    Fields of requests are those of the HTTP API, such as `seed`, `size`, `n`, `budget={"quality": 0.9}`.
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
        self._settings = _Settings(base_url, api_key, timeout_s, max_retries, clock)
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
        """Make pictures, and wait for them. An interrupted call cancels its job, best effort."""
        return self._generate(_image_call(prompt, fields))

    def generate_mesh(self, picture: bytes | Path, **fields: Any) -> Result:
        """Make a mesh of a picture's file, and wait for it. An interrupted call cancels its job, best effort."""
        return self._generate(_mesh_call(_bytes_of(picture), fields))

    def stream_image(self, prompt: str, **fields: Any) -> Generator[StreamEvent, None, None]:
        """Make pictures, and tell what happens; the last event has the `result`. Raises ApiError if the job fails.

        The request is sent when the first event is asked for. A connection that breaks is made again where it broke.
        Closing the generator before its end (a `break` does), or interrupting it, cancels the job, best effort.
        """
        return self._stream(_streaming(_image_call(prompt, fields)))

    def stream_mesh(self, picture: bytes | Path, **fields: Any) -> Generator[StreamEvent, None, None]:
        """As `stream_image`, of a mesh."""
        return self._stream(_streaming(_mesh_call(_bytes_of(picture), fields)))

    def submit_image(self, prompt: str, **fields: Any) -> Job:
        """Have pictures made; `wait` and `events` tell what becomes of them. Only `cancel` cancels the job."""
        return self._submit(_submitting(_image_call(prompt, fields)))

    def submit_mesh(self, picture: bytes | Path, **fields: Any) -> Job:
        """As `submit_image`, of a mesh."""
        return self._submit(_submitting(_mesh_call(_bytes_of(picture), fields)))

    def job(self, job_id: str) -> Job:
        return _job_of(self._answer(_job_call(job_id)).json())

    def events(self, job_id: str, after: str | None = None) -> Generator[StreamEvent, None, None]:
        """A job's events, from the first or after the one with the id `after`. Raises ApiError if the job fails.

        A connection that breaks is made again where it broke. Closing the generator does not cancel the job.
        """
        return self._follow(_Watch(self._settings, job_id, after))

    def wait(self, job_id: str, timeout_s: float | None = None) -> Result:
        """The result of a job, once it has ended. Raises ApiError if it failed or was cancelled.

        Raises TimeoutError after `timeout_s`, at most two seconds late; the job goes on. It reads the job's events, or
        asks for its status if something between here and the server lets no events through.
        """
        deadline = None if timeout_s is None else self._settings.clock() + timeout_s
        watch = _Watch(self._settings, job_id, deadline=deadline)
        try:
            return self._last_result(watch)
        except httpx2.TransportError:
            while not _job_of(self._send(_job_call(job_id), watch.begin()).json()).is_terminal:
                self._sleep(watch.poll_s())
            return self._last_result(_Watch(self._settings, job_id, deadline=deadline))

    def content(self, job_id: str, index: int = 0) -> bytes:
        """The file of one picture, or of the mesh, of a job that has succeeded."""
        return self._answer(_content_call(job_id, index)).content

    def cancel(self, job_id: str) -> Job:
        """The job, cancelled unless it had ended before."""
        return _job_of(self._answer(_cancel_call(job_id)).json())

    def models(self) -> list[dict[str, Any]]:
        """What the server has loaded, with defaults, limits and calibration curves."""
        return _models_of(self._answer(_Call("GET", "/v1/models")))

    def _generate(self, call: _Call) -> Result:
        attempts = self._settings.begin()
        try:
            return _result_of(self._send(call, attempts).json())
        finally:
            if attempts.is_out:
                self._abandon(call)

    def _submit(self, call: _Call) -> Job:
        response = self._answer(call)
        # A call that is repeated when its job has succeeded is answered with the result.
        return _job_of(response.json()) if response.status_code == 202 else self.job(_job_id_of(response))

    def _stream(self, call: _Call) -> Generator[StreamEvent, None, None]:
        attempts, watch = self._settings.begin(), _Watch(self._settings)
        try:
            response = self._send(call, attempts)
            watch.job_id = _job_id_of(response)
            yield from self._follow(watch, response)
        finally:
            if attempts.is_out or (watch.job_id and not watch.is_over):
                self._abandon(call, watch.job_id)

    def _follow(self, watch: _Watch, response: httpx2.Response | None = None) -> Generator[StreamEvent, None, None]:
        """The events of `response`, if there is one already, and all that follow."""
        while True:
            response = response or self._send(watch.call(), watch.begin())
            try:
                for sent in httpx2.EventSource(response, max_event_size=None):
                    if (event := watch.take(sent)) is not None:
                        yield event
            except httpx2.TransportError as error:
                watch.note(error)
            finally:
                response.close()
            if watch.is_over or (watch.may_be_at_its_end and self.job(watch.job_id or "").is_terminal):
                return
            response = None
            self._sleep(watch.wait_s())

    def _last_result(self, watch: _Watch) -> Result:
        for event in self._follow(watch):
            if (result := event.result) is not None:
                return result
        raise httpx2.RemoteProtocolError(f"the events of job {watch.job_id} have no end")

    def _answer(self, call: _Call) -> httpx2.Response:
        return self._send(call, self._settings.begin())

    def _send(self, call: _Call, attempts: _Attempts) -> httpx2.Response:
        """The answer to `call`; that of a stream has not been read."""
        url, headers = self._settings.url(call), self._settings.headers(call)
        while True:
            failure: ApiError | httpx2.TransportError
            request = self._http.build_request(
                call.method, url, json=call.body, headers=headers, timeout=attempts.timeout(call)
            )
            attempts.is_out = True
            try:
                response = self._http.send(request, stream=call.is_stream)
                if not response.is_success:
                    response.read()
            except httpx2.TransportError as error:
                failure = error
            else:
                attempts.is_out = False
                if response.is_success:
                    return response
                failure = _error_of(response)
            self._sleep(attempts.wait_s(failure))

    def _abandon(self, call: _Call, job_id: str | None = None) -> None:
        """Cancel the job of `call`, for which nobody waits any more."""
        with suppress(ApiError, httpx2.TransportError):
            if job_id is None:
                response = self._send(_finding(call), self._settings.begin_to_abandon())
                response.close()
                job_id = _job_id_of(response)
            self._send(_cancel_call(job_id), self._settings.begin_to_abandon())


class AsyncClient:
    """As `Client`, for asyncio. Close streams that you leave early: `async with aclosing(client.stream_image(...))`."""

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
        self._settings = _Settings(base_url, api_key, timeout_s, max_retries, clock)
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
        """Make pictures, and wait for them. A call that is cancelled cancels its job, best effort."""
        return await self._generate(_image_call(prompt, fields))

    async def generate_mesh(self, picture: bytes | Path, **fields: Any) -> Result:
        """Make a mesh of a picture's file, and wait for it. A call that is cancelled cancels its job, best effort."""
        return await self._generate(_mesh_call(await asyncio.to_thread(_bytes_of, picture), fields))

    def stream_image(self, prompt: str, **fields: Any) -> AsyncGenerator[StreamEvent, None]:
        """Make pictures, and tell what happens; the last event has the `result`. Raises ApiError if the job fails.

        The request is sent when the first event is asked for. A connection that breaks is made again where it broke.
        Closing the generator before its end, or cancelling who reads it, cancels the job, best effort.
        """
        return self._stream(_streaming(_image_call(prompt, fields)))

    async def stream_mesh(self, picture: bytes | Path, **fields: Any) -> AsyncGenerator[StreamEvent, None]:
        """As `stream_image`, of a mesh."""
        call = _streaming(_mesh_call(await asyncio.to_thread(_bytes_of, picture), fields))
        async with aclosing(self._stream(call)) as events:
            async for event in events:
                yield event

    async def submit_image(self, prompt: str, **fields: Any) -> Job:
        """Have pictures made; `wait` and `events` tell what becomes of them. Only `cancel` cancels the job."""
        return await self._submit(_submitting(_image_call(prompt, fields)))

    async def submit_mesh(self, picture: bytes | Path, **fields: Any) -> Job:
        """As `submit_image`, of a mesh."""
        return await self._submit(_submitting(_mesh_call(await asyncio.to_thread(_bytes_of, picture), fields)))

    async def job(self, job_id: str) -> Job:
        return _job_of((await self._answer(_job_call(job_id))).json())

    def events(self, job_id: str, after: str | None = None) -> AsyncGenerator[StreamEvent, None]:
        """A job's events, from the first or after the one with the id `after`. Raises ApiError if the job fails.

        A connection that breaks is made again where it broke. Closing the generator does not cancel the job.
        """
        return self._follow(_Watch(self._settings, job_id, after))

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Result:
        """The result of a job, once it has ended. Raises ApiError if it failed or was cancelled.

        Raises TimeoutError after `timeout_s`, at most two seconds late; the job goes on. It reads the job's events, or
        asks for its status if something between here and the server lets no events through.
        """
        deadline = None if timeout_s is None else self._settings.clock() + timeout_s
        watch = _Watch(self._settings, job_id, deadline=deadline)
        try:
            return await self._last_result(watch)
        except httpx2.TransportError:
            while not _job_of((await self._send(_job_call(job_id), watch.begin())).json()).is_terminal:
                await self._sleep(watch.poll_s())
            return await self._last_result(_Watch(self._settings, job_id, deadline=deadline))

    async def content(self, job_id: str, index: int = 0) -> bytes:
        """The file of one picture, or of the mesh, of a job that has succeeded."""
        return (await self._answer(_content_call(job_id, index))).content

    async def cancel(self, job_id: str) -> Job:
        """The job, cancelled unless it had ended before."""
        return _job_of((await self._answer(_cancel_call(job_id))).json())

    async def models(self) -> list[dict[str, Any]]:
        """What the server has loaded, with defaults, limits and calibration curves."""
        return _models_of(await self._answer(_Call("GET", "/v1/models")))

    async def _generate(self, call: _Call) -> Result:
        attempts = self._settings.begin()
        try:
            return _result_of((await self._send(call, attempts)).json())
        finally:
            if attempts.is_out:
                await self._abandon(call)

    async def _submit(self, call: _Call) -> Job:
        response = await self._answer(call)
        # A call that is repeated when its job has succeeded is answered with the result.
        return _job_of(response.json()) if response.status_code == 202 else await self.job(_job_id_of(response))

    async def _stream(self, call: _Call) -> AsyncGenerator[StreamEvent, None]:
        attempts, watch = self._settings.begin(), _Watch(self._settings)
        try:
            response = await self._send(call, attempts)
            watch.job_id = _job_id_of(response)
            async with aclosing(self._follow(watch, response)) as events:
                async for event in events:
                    yield event
        finally:
            if attempts.is_out or (watch.job_id and not watch.is_over):
                await self._abandon(call, watch.job_id)

    async def _follow(
        self, watch: _Watch, response: httpx2.Response | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """The events of `response`, if there is one already, and all that follow."""
        while True:
            response = response or await self._send(watch.call(), watch.begin())
            try:
                async for sent in httpx2.EventSource(response, max_event_size=None):
                    if (event := watch.take(sent)) is not None:
                        yield event
            except httpx2.TransportError as error:
                watch.note(error)
            finally:
                await response.aclose()
            if watch.is_over or (watch.may_be_at_its_end and (await self.job(watch.job_id or "")).is_terminal):
                return
            response = None
            await self._sleep(watch.wait_s())

    async def _last_result(self, watch: _Watch) -> Result:
        async with aclosing(self._follow(watch)) as events:
            async for event in events:
                if (result := event.result) is not None:
                    return result
        raise httpx2.RemoteProtocolError(f"the events of job {watch.job_id} have no end")

    async def _answer(self, call: _Call) -> httpx2.Response:
        return await self._send(call, self._settings.begin())

    async def _send(self, call: _Call, attempts: _Attempts) -> httpx2.Response:
        """The answer to `call`; that of a stream has not been read."""
        url, headers = self._settings.url(call), self._settings.headers(call)
        while True:
            failure: ApiError | httpx2.TransportError
            request = self._http.build_request(
                call.method, url, json=call.body, headers=headers, timeout=attempts.timeout(call)
            )
            attempts.is_out = True
            try:
                response = await self._http.send(request, stream=call.is_stream)
                if not response.is_success:
                    await response.aread()
            except httpx2.TransportError as error:
                failure = error
            else:
                attempts.is_out = False
                if response.is_success:
                    return response
                failure = _error_of(response)
            await self._sleep(attempts.wait_s(failure))

    async def _abandon(self, call: _Call, job_id: str | None = None) -> None:
        """Cancel the job of `call`, for which nobody waits any more, even if this task may wait no more itself."""
        task = asyncio.create_task(self._cancel_job_of(call, job_id))
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)
        await asyncio.shield(task)

    async def _cancel_job_of(self, call: _Call, job_id: str | None) -> None:
        with suppress(ApiError, httpx2.TransportError):
            if job_id is None:
                response = await self._send(_finding(call), self._settings.begin_to_abandon())
                await response.aclose()
                job_id = _job_id_of(response)
            await self._send(_cancel_call(job_id), self._settings.begin_to_abandon())
