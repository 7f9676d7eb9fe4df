import asyncio
import base64
import json
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types import ImagesResponse
from PIL import Image

from models.card import ImageCard
from models.file_formats import read_metadata
from service.app import create_app
from service.jobs.job import JobStatus
from service.jobs.store import ended
from service.running.dispatcher import Dispatcher
from service.settings import Settings

PROMPT = {"prompt": "a red circle"}


@pytest.mark.parametrize("path", ["/v1/images", "/v1/images/generations"])
def test_image_comes_with_a_receipt(path: str, client: TestClient) -> None:
    response = client.post(path, json={**PROMPT, "seed": 3, "size": "96x64", "budget": {"preset": "fast"}})
    assert response.status_code == 200
    body = response.json()
    openais = {"created", "data", "size", "output_format", "quality", "background", "usage"}
    assert set(body) == {*openais, "id", "model", "receipt"}
    assert response.headers["x-job-id"] == body["id"]
    assert (body["model"], body["size"], body["output_format"]) == ("drawn", "96x64", "png")
    (image,) = body["data"]
    assert set(image) == {"b64_json", "seed"}
    data = base64.b64decode(image["b64_json"])
    with Image.open(BytesIO(data)) as image:
        assert (image.format, image.size) == ("PNG", (96, 64))
    assert read_metadata(data) == {
        "prompt": "a red circle",
        "seed": "3",
        "model": "drawn",
        "budget": '{"preset": "fast"}',
    }
    receipt = body["receipt"]
    seconds = receipt.pop("seconds")
    assert set(seconds) == {"queue", "encode", "denoise", "decode", "total"}
    assert seconds["total"] >= seconds["denoise"] > 0
    assert receipt == {
        "rule": "router",
        "skip_threshold": [0.5, 0.5],
        "quality_requested": 0.8,
        "quality_applied": 0.8,
        "compute_ratio": 0.5,
        "compute_ratio_predicted": 0.5,
        "steps": {"computed": 4, "forecast": 0},
        "exact": False,
        "calibrated": False,  # its size is not the default
        "blocks": {"run": 8, "skipped": 0, "reused": 0, "forecast": 0},
        "mean_mlp_width": 1.0,
        "num_inference_steps": 4,
        "batch_size_mean": 1.0,
        "degraded": False,
        "deadline_met": None,
    }


def test_answer_has_the_fields_of_openais_type(client: TestClient) -> None:
    body = client.post("/v1/images", json={**PROMPT, "size": "96x64", "budget": {"preset": "fast"}}).json()
    assert ImagesResponse.model_validate(body, strict=True)
    assert (body["quality"], body["background"]) == ("medium", "opaque")
    assert body["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 3},
        "output_tokens": 24,
        "total_tokens": 27,
    }


def test_quality_that_the_server_chooses_on_the_way_is_auto(client: TestClient) -> None:
    body = client.post("/v1/images", json={**PROMPT, "budget": {"latency_ms": 60_000}}).json()
    assert body["quality"] == "auto"


def test_several_images_have_receipts_of_their_own(client: TestClient) -> None:
    body = client.post("/v1/images", json={**PROMPT, "n": 3, "seed": 10, "trace": True}).json()
    assert [image["seed"] for image in body["data"]] == [10, 11, 12]
    assert len({image["b64_json"] for image in body["data"]}) == 3
    assert all(len(image["receipt"]["decisions"]) == 4 for image in body["data"])
    assert "decisions" not in body["receipt"]
    assert body["receipt"]["blocks"]["run"] == 24
    assert 1 < body["receipt"]["batch_size_mean"] <= 3  # the first one may step before the others are encoded
    assert body["usage"]["input_tokens_details"] == {"image_tokens": 0, "text_tokens": 9}
    assert (body["usage"]["output_tokens"], body["usage"]["total_tokens"]) == (48, 57)


def test_trace_lists_every_decision(client: TestClient) -> None:
    receipt = client.post("/v1/images", json={**PROMPT, "num_inference_steps": 2, "trace": True}).json()["receipt"]
    step = [
        {"block": block, "branch": "cond", "decision": "run", "mlp_width": 1.0} for block in ("double.00", "single.00")
    ]
    assert receipt["decisions"] == [step, step]


def test_forecast_steps_are_in_the_receipt(client: TestClient, forecasting_card: ImageCard) -> None:
    body = {**PROMPT, "model": forecasting_card.id, "budget": {"preset": "balanced"}, "trace": True}
    receipt = client.post("/v1/images", json=body).json()["receipt"]
    assert (receipt["rule"], receipt["compute_ratio_predicted"], receipt["num_inference_steps"]) == ("forecast", 0.5, 8)
    assert receipt["steps"] == {"computed": 4, "forecast": 4}
    assert receipt["blocks"] == {"run": 8, "skipped": 0, "reused": 0, "forecast": 8}
    decisions = [[(entry["decision"], entry["mlp_width"]) for entry in step] for step in receipt["decisions"]]
    assert decisions == [[("run", 1.0)] * 2, [("forecast", 0.0)] * 2] * 4


def test_receipt_says_whether_the_curve_was_measured_for_such_a_request(
    client: TestClient, forecasting_card: ImageCard
) -> None:
    body = {**PROMPT, "model": forecasting_card.id, "budget": {"preset": "balanced"}}
    for other in ({}, {"size": "96x64"}, {"num_inference_steps": 16}):
        receipt = client.post("/v1/images", json={**body, **other}).json()["receipt"]
        assert receipt["calibrated"] is not bool(other)
        assert receipt["steps"]["computed"] == 4 + bool(other)


def test_random_seed_is_returned_and_repeats_the_image(client: TestClient) -> None:
    first = client.post("/v1/images", json=PROMPT).json()["data"][0]
    assert client.post("/v1/images", json={**PROMPT, "seed": first["seed"]}).json()["data"][0] == first
    assert client.post("/v1/images", json=PROMPT).json()["data"][0]["seed"] != first["seed"]


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_binary_answers_the_file_itself(output_format: str, client: TestClient) -> None:
    response = client.post(
        "/v1/images",
        json={**PROMPT, "seed": 4, "response_format": "binary", "output_format": output_format, "trace": True},
    )
    assert response.headers["content-type"] == f"image/{output_format}"
    with Image.open(BytesIO(response.content)) as image:
        assert image.format == output_format.upper()
    assert response.headers["x-seed"] == "4"
    assert "decisions" not in json.loads(response.headers["x-receipt"])
    job = client.get(f"/v1/jobs/{response.headers['x-job-id']}").json()
    assert job["status"] == "succeeded"


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_metadata_can_be_left_out(output_format: str, client: TestClient) -> None:
    body = {**PROMPT, "response_format": "binary", "output_format": output_format, "metadata": False}
    assert read_metadata(client.post("/v1/images", json=body).content) == {}


def test_urls_lead_to_the_images(client: TestClient) -> None:
    body = client.post("/v1/images", json={**PROMPT, "n": 2, "response_format": "url", "output_format": "webp"}).json()
    files = [client.get(image["url"]) for image in body["data"]]
    assert [file.headers["content-type"] for file in files] == ["image/webp"] * 2
    assert files[0].content != files[1].content
    assert body["data"][1]["url"] == f"http://testserver/v1/jobs/{body['id']}/content?index=1"


def test_server_may_answer_with_urls_by_default(start_client: Callable[..., TestClient]) -> None:
    client = start_client(Settings(default_response_format="url"))
    body = client.post("/v1/images", json=PROMPT).json()
    assert set(body["data"][0]) == {"url", "seed"}
    assert client.get(body["data"][0]["url"]).status_code == 200
    (image,) = client.post("/v1/images", json={**PROMPT, "response_format": "b64_json"}).json()["data"]
    assert set(image) == {"b64_json", "seed"}
    stream = client.post("/v1/images", json={**PROMPT, "stream": True}).text
    assert '"b64_json"' in stream  # which OpenAI's clients read there


def test_links_begin_with_the_public_url(start_client: Callable[..., TestClient]) -> None:
    client = start_client(Settings(public_url="https://pictures.example/"))
    body = client.post("/v1/images", json={**PROMPT, "response_format": "url"}).json()
    assert body["data"][0]["url"] == f"https://pictures.example/v1/jobs/{body['id']}/content?index=0"


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "safety_identifier": "s", "background": "opaque", "moderation": "low", "style": "vivid"},
        {"user": "", "style": "anything", "complexity": "low", "background": "auto", "moderation": "auto"},
        {name: None for name in ("user", "safety_identifier", "style", "complexity", "background", "moderation")},
        {"svg": None, "markup": None, "frame_count": None, "frame_duration_ms": None, "stream": None},
        {
            name: None
            for name in ("quality", "response_format", "output_format", "output_compression", "partial_images")
        },
        {"frame_count": 1, "size": "auto", "quality": "auto"},
        {"output_compression": 100},
        {"negative_prompt": ""},
        {"n": 10},
        {"stream": False, "partial_images": 0, "model": None, "n": None, "seed": None, "budget": None},
        {"output_format": "jpeg", "output_compression": 0},
        {"budget": {"quality": 0.9, "min_quality": 0.5}, "priority": "high"},
        {"guidance_scale": 3, "true_cfg_scale": 1},
        {"quality": "hd"},
    ],
)
def test_harmless_fields_are_accepted(fields: dict[str, Any], client: TestClient) -> None:
    assert client.post("/v1/images", json={**PROMPT, **fields}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"model": "\ud800"}, "model"),
        ({"size": "\ud800"}, "size"),
        ({"model": "guided", "guidance_scale": 2, "negative_prompt": "\ud800"}, "negative_prompt"),
        ({"user": "\ud800"}, "user"),
        ({"safety_identifier": "\ud800"}, "safety_identifier"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": True}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 1.0}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1e400}, "seed"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": 1e400}, "guidance_scale"),
        ({"guidance_scale": True}, "guidance_scale"),
        ({"guidance_scale": "3"}, "guidance_scale"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"size": "1000x1000"}, "size"),
        ({"width": 64.5, "height": 64}, "width"),
        ({"budget": {}}, "budget"),
        ({"budget": "fast"}, "budget"),
        ({"budget": {"quality": 2}}, "budget.quality"),
        ({"budget": {"quality": float("nan")}}, "budget.quality"),
        ({"budget": {"quality": True}}, "budget.quality"),
        ({"budget": {"compute_ratio": 0}}, "budget.compute_ratio"),
        ({"budget": {"latency_ms": -1}}, "budget.latency_ms"),
        ({"budget": {"quality": 0.9, "speed": 1}}, "budget.speed"),
        ({"quality": "ultra"}, "quality"),
        ({"quality": "low", "budget": {"quality": 1}}, "quality"),
        ({"response_format": "svg"}, "response_format"),
        ({"response_format": "binary", "n": 2}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_compression": 101, "output_format": "webp"}, "output_compression"),
        ({"metadata": "yes"}, "metadata"),
        ({"trace": 1}, "trace"),
        ({"priority": "urgent"}, "priority"),
        ({"background": "transparent", "output_format": "jpeg"}, "background"),
        ({"background": "clear"}, "background"),
        ({"moderation": "high"}, "moderation"),
        ({"style": 5}, "style"),
        ({"frame_count": 4}, "frame_count"),
        ({"frame_duration_ms": 100}, "frame_duration_ms"),
        ({"svg": {"model": "gpt-5"}}, "svg"),
        ({"markup": []}, "markup"),
        ({"output_format": "svg"}, "output_format"),
        ({"stream": True, "response_format": "binary"}, "response_format"),
        ({"stream": 0}, "stream"),
        ({"partial_images": 2}, "partial_images"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"negative_prompt": "blue"}, "negative_prompt"),
        ({"true_cfg_scale": 0.5}, "true_cfg_scale"),
        ({"model": "guided", "true_cfg_scale": 2, "negative_prompt": ""}, "true_cfg_scale"),
        ({"model": "guided", "guidance_scale": 1, "negative_prompt": "blue"}, "negative_prompt"),
        ({"promt": "a"}, "promt"),
        ({"prompt": "refuse"}, "prompt"),
    ],
)
def test_invalid_parameter_is_named(fields: dict[str, Any], param: str, client: TestClient) -> None:
    body = json.dumps({**PROMPT, **fields}).replace("Infinity", "1e400")
    response = client.post("/v1/images", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"], error["param"]) == ("invalid_parameter", "invalid_request_error", param)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"promt": "a"}, "unknown field promt; did you mean prompt?"),
        ({"negativePrompt": "a"}, "unknown field negativePrompt; did you mean negative_prompt?"),
        ({"guidance": 3}, "unknown field guidance; did you mean guidance_scale?"),
        ({"budget": {"qualty": 1}}, "unknown field budget.qualty; did you mean quality?"),
        ({"zzz": 1}, "unknown field zzz"),
        ({"z" * 10_000: 1}, f"unknown field {'z' * 60}…"),
        ({"seed": -1}, "seed -1 is below 0; leave seed out for a random one"),
        ({"frame_count": 4}, "frame_count 4 is not possible: images have one frame; try 1"),
        ({"svg": {"a": 1}}, "svg {'a': 1} is not possible: this server makes png, webp and jpeg files; leave it out"),
        ({"output_format": "gif"}, "output_format 'gif' is not one of 'png', 'webp' or 'jpeg'"),
        ({"moderation": "high"}, "moderation 'high' is not 'auto' or 'low'; this server does not filter at all"),
    ],
)
def test_message_says_what_was_given_and_what_is_possible(
    fields: dict[str, Any], message: str, client: TestClient
) -> None:
    assert client.post("/v1/images", json={**PROMPT, **fields}).json()["error"]["message"] == message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"prompt": "\xe9"}', b"[" * 100_000, b"9" * 5000])
def test_body_that_is_not_json(content: bytes, start_client: Callable[..., TestClient]) -> None:
    client = start_client(Settings())
    response = client.post("/v1/images", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("content", [b"[]", b'"text"', b"null", b"3"])
def test_body_that_is_not_an_object(content: bytes, client: TestClient) -> None:
    response = client.post("/v1/images", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.json()["error"]["code"] in ("invalid_parameter", "invalid_json")


@pytest.mark.parametrize("media_type", ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""])
def test_other_media_types_are_not_supported(media_type: str, client: TestClient) -> None:
    response = client.post("/v1/images", content=b'{"prompt": "a"}', headers={"Content-Type": media_type})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


def test_media_type_may_name_its_charset(client: TestClient) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert client.post("/v1/images", content=b'{"prompt": "a"}', headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("fields", "model"),
    [({}, "drawn"), ({"model": "drawn"}, "drawn"), ({"model": "guided", "negative_prompt": "blue"}, "guided")],
)
def test_each_request_chooses_its_model(fields: dict[str, Any], model: str, client: TestClient) -> None:
    response = client.post("/v1/images", json={**PROMPT, **fields})
    assert response.status_code == 200
    assert response.json()["model"] == model


def test_unknown_model_is_not_found(client: TestClient) -> None:
    response = client.post("/v1/images", json={**PROMPT, "model": "nothing"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("stage", ["start", "step", "finish"])
def test_failed_generation_names_its_job_and_the_server_goes_on(stage: str, client: TestClient) -> None:
    response = client.post("/v1/images", json={"prompt": f"break at {stage}"})
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("generation_failed", "server_error")
    assert "secret" not in response.text
    job_id = error["message"].split()[1]
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert (job["status"], job["error"]) == ("failed", error)
    assert client.post("/v1/images", json=PROMPT).status_code == 200


def test_overloaded_server_says_when_to_come_back(engine: Any, start_client: Callable[..., TestClient]) -> None:
    client = start_client(Settings(max_backlog_s=3))
    engine.gate.clear()
    accepted = {**PROMPT, "budget": {"preset": "exact"}}  # 2 s of work
    assert client.post("/v1/images", json=accepted, headers={"Prefer": "respond-async"}).status_code == 202
    response = client.post("/v1/images", json={**accepted, "num_inference_steps": 10})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"
    assert response.headers["retry-after"] == "2"
    engine.gate.set()


def test_draining_server_refuses(client: Any) -> None:
    client.portal.call(client.app.state.dispatcher.drain)
    response = client.post("/v1/images", json=PROMPT)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"
    assert response.headers["retry-after"] == "20"


def test_job_unfinished_after_the_grace_period_is_answered_draining(
    engine: Any, make_dispatcher: Callable[[Settings], Dispatcher]
) -> None:
    settings = Settings(grace_s=0)
    dispatcher = make_dispatcher(settings)

    async def drain_while_stepping() -> list[dict[str, Any]]:
        async with dispatcher.running():
            engine.gate.clear()
            answer = asyncio.create_task(call_images(dispatcher, settings, hangs_up=asyncio.Event()))
            await asyncio.to_thread(engine.stepping.wait, 20)
            drained = asyncio.create_task(dispatcher.drain())
            while dispatcher.worker.held():  # the grace is over
                await asyncio.sleep(0.001)
            engine.gate.set()
            await drained
            return await answer

    messages = asyncio.run(drain_while_stepping())
    assert messages[0]["status"] == 503
    assert json.loads(messages[1]["body"])["error"]["code"] == "draining"


@pytest.mark.parametrize("streams", [False, True])
def test_client_that_disconnects_cancels_its_job(
    streams: bool, engine: Any, make_dispatcher: Callable[[Settings], Dispatcher], settings: Settings
) -> None:
    status = asyncio.run(_hang_up_while_stepping(engine, make_dispatcher(settings), settings, streams=streams))
    assert status is JobStatus.CANCELLED
    assert len(engine.batches) == 1


def test_client_that_disconnects_but_gave_a_key_finds_its_job_again(
    engine: Any, make_dispatcher: Callable[[Settings], Dispatcher], settings: Settings
) -> None:
    status = asyncio.run(_hang_up_while_stepping(engine, make_dispatcher(settings), settings, key="k"))
    assert status is JobStatus.SUCCEEDED


async def _hang_up_while_stepping(
    engine: Any, dispatcher: Dispatcher, settings: Settings, *, streams: bool = False, key: str | None = None
) -> JobStatus:
    """The status in which the job ends."""
    headers = {} if key is None else {"idempotency-key": key}
    async with dispatcher.running():
        engine.gate.clear()
        hangs_up = asyncio.Event()
        answer = asyncio.create_task(call_images(dispatcher, settings, hangs_up, stream=streams, headers=headers))
        await asyncio.to_thread(engine.stepping.wait, 20)
        (live,) = await dispatcher.store.live_jobs()
        hangs_up.set()
        await answer
        if key is None:  # it ends before its step does
            await ended(dispatcher.store, live.job.id)
        engine.gate.set()
        return (await ended(dispatcher.store, live.job.id)).state.status


def test_bug_is_answered_500_in_our_format(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.app.state.dispatcher.store, "load", lambda: 1 / 0)
    response = client.post("/v1/images", json=PROMPT)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "ZeroDivisionError" not in response.text
    assert response.headers["x-request-id"]


async def call_images(
    dispatcher: Dispatcher,
    settings: Settings,
    hangs_up: asyncio.Event,
    *,
    stream: bool = False,
    headers: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """What the app sends to a client who disconnects on `hangs_up`."""
    content = json.dumps({**PROMPT, "stream": stream}).encode()
    body = [{"type": "http.request", "body": content, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if body:
            return body.pop()
        await hangs_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/images",
        "raw_path": b"/v1/images",
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"content-type", b"application/json"),
            *((name.encode(), value.encode()) for name, value in (headers or {}).items()),
        ],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
    }
    await create_app(settings, dispatcher)(scope, receive, send)
    return sent


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_transparent_image_has_alpha_and_its_answer_says_so(
    client: TestClient, engine: Any, drawn_card: ImageCard, output_format: str
) -> None:
    engine.cards["drawn"] = replace(drawn_card, can_be_transparent=True)
    answer = client.post("/v1/images", json={**PROMPT, "background": "transparent", "output_format": output_format})
    assert answer.json()["background"] == "transparent"
    with Image.open(BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))) as image:
        assert image.mode == "RGBA"
    refused = client.post("/v1/images", json={**PROMPT, "background": "transparent", "output_format": "jpeg"})
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert error["param"] == "background"
    assert "not possible in jpeg files; try output_format png or webp" in error["message"]
