"""From valid requests to jobs in a store, without HTTP."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.requests import Request

from models.card import ImageCard, MeshCard
from models.errors import InvalidRequest, UnknownModel
from models.request import ImageRequest, LatencyBudget, QualityBudget
from service.api.caller import Caller, set_caller
from service.api.generation_route import GenerationHeaders
from service.api.schemas import ImageBody, ResponseFormat
from service.api.submission import card_of, job_of, submit
from service.errors import DeadlineUnreachable, IdempotencyKeyReused, Overloaded
from service.jobs.job import Job, Output, Priority
from service.keys import ApiKey, Scope
from service.running.dispatcher import Dispatcher
from service.settings import Settings

pytestmark = pytest.mark.anyio

MakeRequest = Callable[..., ImageRequest]
SETTINGS = Settings(max_backlog_s=10.0, webhook_hosts=("hooks.example",), webhook_secret=SecretStr("whsec_" + "A" * 32))
PLAIN = GenerationHeaders()
KEYED = GenerationHeaders(idempotency_key="k")


@pytest.fixture
def dispatcher(make_dispatcher: Callable[[Settings], Dispatcher]) -> Iterator[Dispatcher]:
    """A dispatcher that is not running, so that jobs stay queued."""
    dispatcher = make_dispatcher(SETTINGS)
    yield dispatcher
    assert dispatcher.worker.stop(20)


def call(path: str = "/v1/images", owner: str = "maker") -> Request:
    """An HTTP request, of which submission reads the path and the caller."""
    scope: dict[str, Any] = {"type": "http", "path": path, "headers": [], "server": ("test", 80), "query_string": b""}
    set_caller(scope, Caller("request-1", ApiKey(owner, frozenset({Scope.GENERATE}))))
    return Request(scope)


def body(**fields: Any) -> ImageBody:
    return ImageBody(prompt="a red circle", **fields)


def test_model_without_a_name_is_the_first_of_its_kind(dispatcher: Dispatcher) -> None:
    assert card_of(None, dispatcher.cards, ImageCard).id == "drawn"
    assert card_of(None, dispatcher.cards, MeshCard).id == "ball"
    assert card_of("guided", dispatcher.cards, ImageCard).id == "guided"


def test_model_of_another_kind_and_unknown_models_are_refused(dispatcher: Dispatcher) -> None:
    with pytest.raises(InvalidRequest, match="'ball' makes no image, but a mesh; try drawn, guided"):
        card_of("ball", dispatcher.cards, ImageCard)
    with pytest.raises(UnknownModel, match="'x'; loaded: drawn, guided, ball"):
        card_of("x", dispatcher.cards, ImageCard)
    with pytest.raises(UnknownModel, match="no mesh model is loaded"):
        card_of(None, {"drawn": dispatcher.cards["drawn"]}, MeshCard)


def test_job_holds_what_was_asked_and_who_asked(drawn_card: ImageCard, make_request: MakeRequest) -> None:
    requests = (make_request(seed=1), make_request(seed=2))
    asked = body(priority="high", partial_images=2, stream=True, webhook_url="https://hooks.example/x")
    caller = Caller("request-1", ApiKey("maker", frozenset({Scope.GENERATE})))
    job = job_of(requests, Output(), asked, drawn_card, PLAIN, caller, SETTINGS)
    assert (job.model, job.requests, job.output) == ("drawn", requests, Output())
    assert (job.priority, job.num_previews, job.webhook_url) == (Priority.HIGH, 2, "https://hooks.example/x")
    assert (job.owner, job.request_id, job.quality_requested) == ("maker", "request-1", 0.9)
    # Two images of four steps, each 0.5 s dense, at the curve point of quality 0.9.
    assert job.predicted_seconds == pytest.approx(2 * 4 * 0.5 * 0.64)
    other = job_of(requests, Output(), asked, drawn_card, PLAIN, caller, SETTINGS)
    assert other.id != job.id


@pytest.mark.parametrize(
    ("fields", "is_async", "param"),
    [
        ({"stream": True}, True, "stream"),
        ({"stream": True, "response_format": ResponseFormat.BINARY}, False, "response_format"),
        ({"partial_images": 1}, False, "partial_images"),
        ({"webhook_url": "https://elsewhere.example/"}, False, "webhook_url"),
    ],
)
def test_ways_of_answering_that_exclude_each_other_are_refused(
    fields: dict[str, Any], is_async: bool, param: str, drawn_card: ImageCard, make_request: MakeRequest
) -> None:
    headers = GenerationHeaders(is_async=is_async)
    with pytest.raises(InvalidRequest) as caught:
        job_of((make_request(),), Output(), body(**fields), drawn_card, headers, Caller("r"), SETTINGS)
    assert caught.value.param == param


async def test_submitted_job_is_queued_and_named_for_the_log(
    dispatcher: Dispatcher, make_job: Callable[..., Job]
) -> None:
    request = call()
    job = await submit(make_job("a"), body(), PLAIN, request, dispatcher, SETTINGS)
    assert (await dispatcher.store.get("a")).job == job == make_job("a")
    assert request.state.caller.job_id == "a"


async def test_key_returns_its_job_and_is_bound_to_owner_path_and_body(
    dispatcher: Dispatcher, make_job: Callable[..., Job]
) -> None:
    async def submit_as(job_id: str, request: Request, seed: int = 0) -> str:
        return (await submit(make_job(job_id), body(seed=seed), KEYED, request, dispatcher, SETTINGS)).id

    assert await submit_as("first", call()) == "first"
    again = call()
    assert await submit_as("second", again) == "first"
    assert again.state.caller.job_id == "first"
    assert await submit_as("third", call(owner="other")) == "third"
    for request, seed in ((call(path="/v1/meshes"), 0), (call(), 1)):
        with pytest.raises(IdempotencyKeyReused, match="'k'"):
            await submit_as("fourth", request, seed)
    assert {live.job.id for live in await dispatcher.store.live_jobs()} == {"first", "third"}


@pytest.mark.parametrize("key", ["", "x" * 256, "ä", "a\n"])
async def test_key_that_no_store_could_hold_is_refused(
    key: str, dispatcher: Dispatcher, make_job: Callable[..., Job]
) -> None:
    headers = GenerationHeaders(idempotency_key=key)
    with pytest.raises(InvalidRequest, match="1 to 255"):
        await submit(make_job("a"), body(), headers, call(), dispatcher, SETTINGS)


async def test_overloaded_server_records_nothing(dispatcher: Dispatcher, make_job: Callable[..., Job]) -> None:
    for name in "abcde":  # 2 s each, up to the limit of 10 s
        await submit(make_job(name), body(), KEYED if name == "a" else PLAIN, call(), dispatcher, SETTINGS)
    request = call()
    with pytest.raises(Overloaded, match=r"10\.0 s of work") as caught:
        await submit(make_job("f"), body(), PLAIN, request, dispatcher, SETTINGS)
    assert caught.value.retry_after_s == 2
    assert request.state.caller.job_id is None
    assert len(await dispatcher.store.live_jobs()) == 5
    # And a key still finds the job that it created.
    assert (await submit(make_job("g"), body(), KEYED, call(), dispatcher, SETTINGS)).id == "a"


async def test_latency_budget_becomes_a_deadline_or_is_refused(
    dispatcher: Dispatcher, make_job: Callable[..., Job]
) -> None:
    job = replace(make_job("a", budget=LatencyBudget(30.0)), created_at=100.0)
    assert (await submit(job, body(), PLAIN, call(), dispatcher, SETTINGS)).deadline_at == 130.0
    with pytest.raises(DeadlineUnreachable, match="latency_ms 100 can't be met"):
        await submit(make_job("b", budget=LatencyBudget(0.1)), body(), PLAIN, call(), dispatcher, SETTINGS)


async def test_load_lowers_quality_down_to_min_quality(dispatcher: Dispatcher, make_job: Callable[..., Job]) -> None:
    asked = body(budget={"quality": 1.0, "min_quality": 0.8})
    exact = make_job("idle", budget=QualityBudget(1.0))
    assert await submit(exact, asked, PLAIN, call(), dispatcher, SETTINGS) == exact
    for name in "abc":
        await submit(make_job(name), body(), PLAIN, call(), dispatcher, SETTINGS)  # 8 s of work in all
    lowered = await submit(replace(exact, id="busy"), asked, PLAIN, call(), dispatcher, SETTINGS)
    assert lowered.is_degraded
    assert lowered.requests[0].budget == QualityBudget(0.8)
    assert lowered.predicted_seconds == pytest.approx(4 * 0.5 * 0.55)
