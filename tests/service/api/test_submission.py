"""From orders to jobs in a store, without HTTP."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.requests import Request

from models.card import ImageCard
from models.errors import InvalidRequest
from models.request import QualityBudget
from service.api.caller import Caller, caller_of, set_caller
from service.api.generation_route import GenerationHeaders
from service.api.model_names import card_of
from service.api.parsing import parse_image_body
from service.api.schemas import ImageBody
from service.api.submission import submit
from service.errors import DeadlineUnreachable, IdempotencyKeyReused, Overloaded
from service.jobs.job import Job, Priority
from service.jobs.memory import MemoryStore
from service.keys import ApiKey, Scope
from service.running.dispatcher import Dispatcher
from service.scheduling.fleet import Load
from service.settings import Settings

pytestmark = pytest.mark.anyio

SubmitImage = Callable[..., Awaitable[Job]]
SETTINGS = Settings(
    max_backlog_s=10.0,
    max_trace_decisions=16,
    webhook_hosts=("hooks.example",),
    webhook_secret=SecretStr("whsec_" + "A" * 32),
)
PLAIN = GenerationHeaders()
KEYED = GenerationHeaders(idempotency_key="k")


@pytest.fixture
def dispatcher(make_dispatcher: Callable[[Settings], Dispatcher]) -> Iterator[Dispatcher]:
    """A dispatcher that is not running, so that jobs stay queued."""
    dispatcher = make_dispatcher(SETTINGS)
    yield dispatcher
    assert dispatcher.worker.stop(20)


def call(path: str = "/v1/images", owner: str = "maker", weight: float = 1000.0) -> Request:
    """An HTTP request, of which submission reads the path and the caller. A key of so much weight has the server."""
    scope: dict[str, Any] = {"type": "http", "path": path, "headers": [], "server": ("test", 80), "query_string": b""}
    set_caller(scope, Caller("request-1", ApiKey(owner, frozenset({Scope.GENERATE}), weight=weight)))
    return Request(scope)


@pytest.fixture
def submit_image(dispatcher: Dispatcher) -> SubmitImage:
    """Submit the order of an image body with these fields."""

    async def submit_image(request: Request | None = None, *, headers: GenerationHeaders = PLAIN, **fields: Any) -> Job:
        body = ImageBody.model_validate({"prompt": "a red circle", **fields})
        card = card_of(body.model, dispatcher.fleet, ImageCard, {})
        order = parse_image_body(body, card, default_budget=SETTINGS.default_budget, random_seed=0)
        return await submit(order, card, body, headers, request or call(), dispatcher, SETTINGS)

    return submit_image


async def test_job_holds_the_order_and_its_caller(dispatcher: Dispatcher, submit_image: SubmitImage) -> None:
    request = call()
    fields = {"n": 2, "seed": 5, "priority": "high", "webhook_url": "https://hooks.example/x"}
    job = await submit_image(request, budget={"quality": 0.9}, partial_images=2, stream=True, **fields)
    assert [asked.seed for asked in job.requests] == [5, 6]
    assert (job.model, job.priority, job.num_previews) == ("drawn", Priority.HIGH, 2)
    assert (job.owner, job.request_id, job.webhook_url) == ("maker", "request-1", "https://hooks.example/x")
    # Two images of four steps, each 0.5 s dense, at the curve point of quality 0.9.
    assert job.quality_requested == 0.9
    assert job.predicted_seconds == pytest.approx(2 * 4 * 0.5 * 0.64)
    # And it is in the queue, and named in the log.
    assert (await dispatcher.store.get(job.id)).job == job
    assert caller_of(request.scope).job_id == job.id
    assert (await submit_image(call())).id != job.id


async def test_job_begins_at_the_time_of_its_store(dispatcher: Dispatcher, submit_image: SubmitImage) -> None:
    assert isinstance(dispatcher.store, MemoryStore)
    dispatcher.store.clock = lambda: 5e9
    job = await submit_image(budget={"latency_ms": 30_000})
    assert (job.created_at, job.deadline_at) == (5e9, 5e9 + 30)


@pytest.mark.parametrize(
    ("fields", "is_async", "param"),
    [
        ({"stream": True}, True, "stream"),
        ({"stream": True, "response_format": "binary"}, False, "response_format"),
        ({"partial_images": 1}, False, "partial_images"),
        ({"webhook_url": "https://elsewhere.example/"}, False, "webhook_url"),
    ],
)
async def test_ways_of_answering_that_exclude_each_other_are_refused(
    fields: dict[str, Any], is_async: bool, param: str, dispatcher: Dispatcher, submit_image: SubmitImage
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await submit_image(headers=GenerationHeaders(is_async=is_async), **fields)
    assert caught.value.param == param
    assert await dispatcher.store.live_jobs() == []


async def test_longest_trace_is_bounded(dispatcher: Dispatcher, submit_image: SubmitImage) -> None:
    fields = {"num_inference_steps": 4, "budget": {"quality": 0.5}, "trace": True}
    await submit_image(n=2, **fields)  # twice four steps of two blocks
    with pytest.raises(InvalidRequest, match="n 3 and num_inference_steps 4 has 24 decisions, more than the 16"):
        await submit_image(n=3, **fields)
    await submit_image(n=3, **{**fields, "trace": False})
    assert len(await dispatcher.store.live_jobs()) == 2


async def test_key_returns_its_job_and_is_bound_to_owner_path_and_body(
    dispatcher: Dispatcher, submit_image: SubmitImage
) -> None:
    first = await submit_image(headers=KEYED)
    again = call()
    assert await submit_image(again, headers=KEYED) == first
    assert caller_of(again.scope).job_id == first.id
    other = await submit_image(call(owner="other"), headers=KEYED)
    assert other.id != first.id
    for request, fields in ((call(path="/v1/images/generations"), {}), (call(), {"seed": 1})):
        with pytest.raises(IdempotencyKeyReused, match="'k'"):
            await submit_image(request, headers=KEYED, **fields)
    assert {live.job.id for live in await dispatcher.store.live_jobs()} == {first.id, other.id}


@pytest.mark.parametrize("key", ["", "x" * 256, "ä", "a\n"])
async def test_key_that_no_store_could_hold_is_refused(key: str, submit_image: SubmitImage) -> None:
    with pytest.raises(InvalidRequest, match="1 to 255"):
        await submit_image(headers=GenerationHeaders(idempotency_key=key))


@pytest.mark.parametrize(("weight", "num_accepted"), [(1000.0, 5), (1.0, 4)], ids=["server", "key"])
async def test_calls_that_arrive_together_are_not_all_accepted(
    dispatcher: Dispatcher,
    submit_image: SubmitImage,
    monkeypatch: pytest.MonkeyPatch,
    weight: float,
    num_accepted: int,
) -> None:
    """Each call of a burst reads the backlog before the others are recorded, as with Redis."""
    num_calls, num_reads = 20, 0
    all_have_read = asyncio.Event()
    read = dispatcher.store.load

    async def load(owner: str | None = None) -> Load:
        nonlocal num_reads
        found = await read(owner)
        num_reads += 1
        if num_reads == num_calls:
            all_have_read.set()
        await all_have_read.wait()
        return found

    monkeypatch.setattr(dispatcher.store, "load", load)
    calls = [submit_image(call(weight=weight), budget={"quality": 1.0}) for _ in range(num_calls)]  # 2 s each
    answers = await asyncio.gather(*calls, return_exceptions=True)
    jobs = [answer for answer in answers if isinstance(answer, Job)]
    assert len(jobs) == num_accepted
    assert sum(isinstance(answer, Overloaded) for answer in answers) == num_calls - num_accepted
    assert (await read()).of("drawn").seconds == 2.0 * num_accepted
    patience = {round((job.due_at or 0.0) - job.created_at, 3) for job in jobs}
    assert len(patience) == num_accepted  # each one counts those before it
    with pytest.raises(Overloaded, match=rf"has {2 * num_accepted}\.0 s of work"):
        await submit_image(call(weight=weight), budget={"quality": 1.0})


async def test_overloaded_server_records_nothing(dispatcher: Dispatcher, submit_image: SubmitImage) -> None:
    exact = {"budget": {"quality": 1.0}}
    first = await submit_image(headers=KEYED, **exact)
    for _ in range(4):  # 2 s each, up to the limit of 10 s
        await submit_image(**exact)
    request = call()
    with pytest.raises(Overloaded, match=r"10\.0 s of work") as caught:
        await submit_image(request, **exact)
    assert caught.value.retry_after_s == 7
    assert caller_of(request.scope).job_id is None
    assert len(await dispatcher.store.live_jobs()) == 5
    # And a key still finds the job that it created.
    assert (await submit_image(headers=KEYED, **exact)).id == first.id
    # High priority has a quarter more room
    await submit_image(**exact, priority="high")
    with pytest.raises(Overloaded, match=r"12\.0 s of work"):
        await submit_image(**exact, priority="high")


async def test_latency_budget_becomes_a_deadline_or_is_refused(submit_image: SubmitImage) -> None:
    job = await submit_image(budget={"latency_ms": 30_000})
    assert job.deadline_at == pytest.approx(job.created_at + 30)
    with pytest.raises(DeadlineUnreachable, match="latency_ms 100 can't be met"):
        await submit_image(budget={"latency_ms": 100})


async def test_load_lowers_quality_down_to_min_quality(submit_image: SubmitImage) -> None:
    asked = {"budget": {"quality": 1.0, "min_quality": 0.8}}
    idle = await submit_image(**asked)
    assert (idle.is_degraded, idle.predicted_seconds) == (False, 2.0)
    for _ in range(3):
        await submit_image(budget={"quality": 1.0})  # 8 s of work in all
    busy = await submit_image(**asked)
    assert busy.is_degraded
    assert busy.requests[0].budget == QualityBudget(0.8)
    assert busy.quality_requested == 1.0
    assert busy.predicted_seconds == pytest.approx(4 * 0.5 * 0.55)


async def test_one_key_can_not_fill_the_backlog_alone(submit_image: SubmitImage) -> None:
    one = call(owner="one", weight=1.0)
    jobs = [await submit_image(one, budget={"quality": 1.0}) for _ in range(3)]  # 2 s each, of 10 s
    await submit_image(one, budget={"quality": 1.0})
    with pytest.raises(Overloaded, match="this API key has"):
        await submit_image(one, budget={"quality": 0.6})
    other = await submit_image(call(owner="other", weight=1.0), budget={"quality": 1.0})
    assert other.place < jobs[-1].place
