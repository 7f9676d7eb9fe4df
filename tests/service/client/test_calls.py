"""The Python client with scripted answers and a fake clock. Tests that take `scripted` run with both clients."""

import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx2
import pytest

from elastic_dit_client import ApiError, Client

DATES = {"Date": "Tue, 24 Nov 2026 12:00:00 GMT", "Retry-After": "Tue, 24 Nov 2026 12:00:07 GMT"}


@pytest.fixture
def scripted(start: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a client whose requests are answered by the function `answer`."""
    return lambda answer, **options: start("http://server", httpx2.MockTransport(answer), **options)


def answered(job_id: str = "job_1") -> dict[str, Any]:
    """The body of a result."""
    file = {"b64_json": base64.b64encode(b"file").decode(), "seed": 3}
    return {"id": job_id, "model": "tiny", "data": [file], "output_format": "png", "receipt": {}, "created": 1}


def job_body(status: str = "queued") -> dict[str, Any]:
    progress = {"step": 0, "num_computed_steps": 2, "num_inference_steps": 4}
    return {"id": "job_1", "status": status, "progress": progress, "receipt": None, "error": None}


def error_body(code: str) -> dict[str, Any]:
    return {"error": {"message": f"no: {code}", "type": "server_error", "param": None, "code": code}}


def refusal(status: int, code: str, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, json=error_body(code), headers={"X-Request-ID": "r1", **headers})


def sse(name: str, event_id: str | None = None, **data: Any) -> bytes:
    lines = [f"event: {name}", f"data: {json.dumps(data)}"] + ([] if event_id is None else [f"id: {event_id}"])
    return ("\n".join(lines) + "\n\n").encode()


QUEUED, STEP, DONE = (
    sse("job.queued", "1-0", id="job_1"),
    sse("job.progress", "2-0", step=1),
    sse("image_generation.completed", "3-0", **answered()),
)


class Broken(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body whose connection breaks after `parts`."""

    def __init__(self, *parts: bytes, error: type[httpx2.TransportError] = httpx2.ReadError) -> None:
        self.parts, self.error = parts, error

    def __iter__(self) -> Iterator[bytes]:
        yield from self.parts
        raise self.error("gone")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self:
            yield part


def events_answer(*parts: bytes) -> httpx2.Response:
    return stream_answer(httpx2.ByteStream(b"".join(parts)))


def stream_answer(body: Any) -> httpx2.Response:
    return httpx2.Response(200, stream=body, headers={"Content-Type": "text/event-stream", "X-Job-ID": "job_1"})


class Script:
    """Returns `answers` one after the other, or raises those that are exceptions. `asked` lists the requests."""

    def __init__(self, *answers: httpx2.Response | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def calls(self) -> list[str]:
        return [f"{request.method} {request.url.path}" for request in self.asked]


@pytest.mark.parametrize("status", [429, 503])
def test_refused_call_is_repeated_after_its_retry_after(status: int, scripted: Callable[..., Any], clock: Any) -> None:
    answers = Script(
        refusal(status, "busy", **{"Retry-After": "3"}),
        refusal(status, "busy", **DATES),
        httpx2.Response(200, json=answered()),
    )
    assert scripted(answers).generate_image("a").files == (b"file",)
    assert clock.slept == [3, 7]
    assert len({request.headers["Idempotency-Key"] for request in answers.asked}) == 1
    assert len({request.content for request in answers.asked}) == 1


def test_two_calls_have_two_keys(scripted: Callable[..., Any]) -> None:
    answers = Script(*(httpx2.Response(200, json=answered()) for _ in range(2)))
    api = scripted(answers)
    for _ in range(2):
        api.generate_image("a")
    assert len({request.headers["Idempotency-Key"] for request in answers.asked}) == 2


@pytest.mark.parametrize(
    ("status", "headers"), [*((status, {"Retry-After": "1"}) for status in (400, 404, 409, 422, 500)), (503, {})]
)
def test_other_refusals_are_raised_at_once(
    status: int, headers: dict[str, str], scripted: Callable[..., Any], clock: Any
) -> None:
    answers = Script(refusal(status, "no", **headers))
    with pytest.raises(ApiError) as caught:
        scripted(answers).generate_image("a")
    assert (caught.value.status, caught.value.code, caught.value.request_id) == (status, "no", "r1")
    assert (clock.slept, len(answers.asked)) == ([], 1)


def test_last_refusal_is_raised_after_max_retries(scripted: Callable[..., Any], clock: Any) -> None:
    answers = Script(*(refusal(429, "rate_limit_exceeded", **{"Retry-After": "1"}) for _ in range(9)))
    with pytest.raises(ApiError, match=r"^429 rate_limit_exceeded: no") as caught:
        scripted(answers, max_retries=2).models()
    assert caught.value.retry_after_s == 1
    assert (clock.slept, len(answers.asked)) == ([1, 1], 3)


def test_wait_that_is_longer_than_the_call_may_take_is_not_begun(scripted: Callable[..., Any], clock: Any) -> None:
    answers = Script(*(refusal(503, "overloaded", **{"Retry-After": "40"}) for _ in range(2)))
    with pytest.raises(ApiError, match="overloaded"):
        scripted(answers, timeout_s=60).generate_image("a")
    assert clock.slept == [40]


@pytest.mark.parametrize("error", [httpx2.ConnectError, httpx2.ReadError, httpx2.RemoteProtocolError])
def test_broken_connection_is_tried_again_with_the_same_key(
    error: type[httpx2.TransportError], scripted: Callable[..., Any], clock: Any
) -> None:
    answers = Script(error("gone"), error("gone"), httpx2.Response(200, json=answered()))
    assert scripted(answers).generate_image("a").job_id == "job_1"
    assert clock.slept == [0.5, 1]
    assert len({request.headers["Idempotency-Key"] for request in answers.asked}) == 1


def test_call_that_loses_the_server_cancels_its_job(scripted: Callable[..., Any]) -> None:
    answers = Script(
        httpx2.ReadError("gone"),
        httpx2.ReadTimeout("nothing"),
        httpx2.Response(202, json=job_body()),
        httpx2.Response(200, json=job_body("cancelled")),
    )
    with pytest.raises(httpx2.ReadTimeout):
        scripted(answers, max_retries=1).generate_image("a")
    assert answers.calls == ["POST /v1/images"] * 3 + ["DELETE /v1/jobs/job_1"]
    assert answers.asked[2].headers["Prefer"] == "respond-async"
    assert len({(request.headers["Idempotency-Key"], request.content) for request in answers.asked[:3]}) == 1


def test_interrupted_call_cancels_its_job_and_stays_interrupted(clock: Any) -> None:
    answers = Script(httpx2.Response(202, json=job_body()), httpx2.Response(200, json=job_body("cancelled")))

    def answer(request: httpx2.Request) -> httpx2.Response:
        if "Prefer" not in request.headers and request.method == "POST":
            raise KeyboardInterrupt
        return answers(request)

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    with pytest.raises(KeyboardInterrupt):
        Client("http://server", http=http, sleep=clock.sleep).generate_image("a")
    assert answers.calls == ["POST /v1/images", "DELETE /v1/jobs/job_1"]


def test_call_interrupted_while_it_waits_to_ask_again_has_no_job_to_cancel() -> None:
    answers = Script(refusal(429, "rate_limit_exceeded", **{"Retry-After": "5"}))

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    http = httpx2.Client(transport=httpx2.MockTransport(answers))
    with pytest.raises(KeyboardInterrupt):
        Client("http://server", http=http, sleep=interrupt).generate_image("a")
    assert answers.calls == ["POST /v1/images"]


def test_server_that_cannot_cancel_changes_nothing_of_what_is_raised(scripted: Callable[..., Any]) -> None:
    answers = Script(httpx2.ReadError("first"), httpx2.ConnectError("second"))
    with pytest.raises(httpx2.ReadError, match="first"):
        scripted(answers, max_retries=0).generate_image("a")
    assert len(answers.asked) == 2


def test_broken_stream_goes_on_at_the_jobs_events(scripted: Callable[..., Any], clock: Any) -> None:
    answers = Script(stream_answer(Broken(QUEUED, STEP[:9])), stream_answer(Broken(STEP)), events_answer(DONE))
    events = list(scripted(answers).stream_image("a"))
    assert [event.id for event in events] == ["1-0", "2-0", "3-0"]
    assert answers.calls == ["POST /v1/images"] + ["GET /v1/jobs/job_1/events"] * 2
    assert [request.headers["Last-Event-ID"] for request in answers.asked[1:]] == ["1-0", "2-0"]
    assert clock.slept == [0.5, 0.5]


def test_events_that_end_early_without_breaking_go_on_too(scripted: Callable[..., Any]) -> None:
    answers = Script(
        events_answer(QUEUED),
        events_answer(),
        httpx2.Response(200, json=job_body("running")),
        events_answer(STEP, DONE),
    )
    assert [event.id for event in scripted(answers).events("job_1")] == ["1-0", "2-0", "3-0"]


def test_error_of_the_server_is_no_event_of_the_job(scripted: Callable[..., Any]) -> None:
    answers = Script(events_answer(QUEUED, sse("error", **error_body("draining"))), events_answer(DONE))
    assert [event.id for event in scripted(answers).events("job_1")] == ["1-0", "3-0"]


def test_events_that_only_break_are_given_up_after_max_retries(scripted: Callable[..., Any], clock: Any) -> None:
    answers = Script(*(stream_answer(Broken()) for _ in range(9)))
    with pytest.raises(httpx2.ReadError):
        list(scripted(answers).events("job_1"))
    assert clock.slept == [0.5, 1, 2, 4, 8]


def test_stream_without_an_answer_finds_its_job_by_its_key_and_cancels_it(scripted: Callable[..., Any]) -> None:
    answers = Script(
        httpx2.ReadError("gone"), stream_answer(Broken()), httpx2.Response(200, json=job_body("cancelled"))
    )
    with pytest.raises(httpx2.ReadError):
        list(scripted(answers, max_retries=0).stream_image("a"))
    assert answers.calls == ["POST /v1/images"] * 2 + ["DELETE /v1/jobs/job_1"]
    assert answers.asked[0].content == answers.asked[1].content


def test_wait_polls_the_status_if_no_events_arrive(scripted: Callable[..., Any], clock: Any) -> None:
    answers = Script(
        *(stream_answer(Broken(error=httpx2.ReadTimeout)) for _ in range(2)),
        httpx2.Response(200, json=job_body("running")),
        httpx2.Response(200, json=job_body("succeeded")),
        events_answer(QUEUED, STEP, DONE),
    )
    assert scripted(answers, max_retries=1).wait("job_1").files == (b"file",)
    assert clock.slept == [0.5, 1]


def test_wait_times_out_and_leaves_the_job(scripted: Callable[..., Any], clock: Any) -> None:
    timeouts = []

    def say_nothing(request: httpx2.Request) -> httpx2.Response:
        timeouts.append(request.extensions["timeout"]["read"])
        clock.now += timeouts[-1]
        return stream_answer(Broken(error=httpx2.ReadTimeout))

    with pytest.raises(TimeoutError, match="job_1 has not ended"):
        scripted(say_nothing, max_retries=1).wait("job_1", timeout_s=5)
    assert timeouts == [2, 2, 1]


def test_submit_that_is_repeated_after_its_job_has_ended_answers_with_the_job(scripted: Callable[..., Any]) -> None:
    answers = Script(
        httpx2.ReadError("gone"),
        httpx2.Response(200, json=answered()),
        httpx2.Response(200, json=job_body("succeeded")),
    )
    assert scripted(answers).submit_image("a").status == "succeeded"


def test_key_is_sent_and_a_proxys_answer_is_an_error_too(scripted: Callable[..., Any]) -> None:
    answers = Script(httpx2.Response(502, text="<p>Bad gateway</p>"), httpx2.Response(504))
    api = scripted(answers, api_key="secret")
    with pytest.raises(ApiError, match=r"^502: <p>Bad gateway") as caught:
        api.models()
    assert caught.value.code is None
    with pytest.raises(ApiError, match=r"^504: Gateway Timeout$"):
        api.job("job_1")
    assert answers.asked[0].headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("field", ["stream", "response_format"])
def test_fields_that_the_client_sets_itself_are_refused(field: str, scripted: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=field):
        scripted(Script()).generate_image("a", **{field: True})


def test_client_closes_only_its_own_connections() -> None:
    given = httpx2.Client()
    with Client("http://server", http=given):
        pass
    assert not given.is_closed
    given.close()
    with Client("http://127.0.0.1:9", max_retries=0) as client, suppress(httpx2.TransportError):
        client.models()
