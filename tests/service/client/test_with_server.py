"""The Python client with the real application over real connections. Tests that take `api` run with both clients."""

import asyncio
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import trimesh
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from elastic_dit_client import ApiError, AsyncClient, Client, Job, Result
from examples import async_streams, image_and_mesh
from service.app import create_app
from service.settings import Settings

ROOT = Path(__file__).parents[3]


@pytest.fixture
def server(make_dispatcher: Callable[..., Any], engine: Any) -> Iterator[str]:
    """The address of the real application behind a real socket, with the engine that draws images from seeds."""
    # Another default than the client's: it asks for the files themselves.
    settings = Settings(
        default_response_format="url", max_mesh_body_bytes=200_000, max_image_pixels=1_000_000, grace_s=0
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:  # clients can connect from here on
        server = uvicorn.Server(uvicorn.Config(create_app(settings, make_dispatcher(settings)), log_config=None))
        thread = Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        engine.gate.set()
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def api(start: Callable[..., Any], server: str) -> Any:
    return start(server)


@pytest.fixture
def image() -> bytes:
    file = BytesIO()
    Image.new("RGB", (32, 32), (10, 20, 200)).save(file, "PNG")
    return file.getvalue()


def test_image_is_made_with_its_fields(api: Any) -> None:
    result = api.generate_image("a red circle", seed=3, n=2, size="64x32", budget={"preset": "fast"})
    assert isinstance(result, Result)
    assert [Image.open(BytesIO(file)).size for file in result.files] == [(64, 32)] * 2
    assert (result.seeds, result.model, result.output_format) == ((3, 4), "drawn", "png")
    assert result.receipt["quality_applied"] == 0.8
    assert [api.content(result.job_id, index) for index in range(2)] == list(result.files)


def test_mesh_is_made_from_bytes_or_a_file(api: Any, image: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image)
    results = [api.generate_mesh(given, seed=3, output_format="stl") for given in (image, tmp_path / "a.png")]
    assert results[0].files == results[1].files
    assert isinstance(trimesh.load(BytesIO(results[0].files[0]), "stl", force="mesh"), trimesh.Trimesh)
    assert results[0].output_format == "stl"


def test_edit_is_made_of_pictures_and_a_mask(api: Any, image: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image)
    white = BytesIO()
    Image.new("L", (32, 32), 255).save(white, "PNG")
    results = [
        api.edit_image(given, "a circle", mask=mask, seed=3, n=2)
        for given, mask in ((image, None), (tmp_path / "a.png", white.getvalue()), ([image], None))
    ]
    assert results[0].files == results[1].files == results[2].files
    assert results[0].seeds == (3, 4)
    job = api.submit_edit(image, "a circle", seed=3)
    events = list(api.stream_edit(image, "a circle", seed=3))
    assert (events[-1].name, events[-1].is_last) == ("image_edit.completed", True)
    assert events[-1].result is not None
    assert api.wait(job.id).files == events[-1].result.files == results[0].files[:1]
    with pytest.raises(ApiError, match="nothing may change") as caught:
        api.edit_image(image, "a circle", mask=image)
    assert caught.value.param == "mask"


def test_stream_has_progress_and_previews_and_ends_in_the_result(api: Any, image: bytes) -> None:
    for made, events in (
        ("image", list(api.stream_image("a red circle", seed=3, partial_images=2))),
        ("mesh", list(api.stream_mesh(image, seed=3, partial_images=2))),
    ):
        names = [event.name for event in events]
        assert names[:2] == ["job.queued", "job.started"]
        assert names.count(f"{made}_generation.partial_{made}") == 2
        assert all(event.file for event in events if "partial" in event.name)
        assert [event.is_last for event in events] == [False] * (len(events) - 1) + [True]
        result = events[-1].result
        assert result is not None
        assert (result.files, result.seeds) == ((events[-1].file,), (3,))


def test_stream_of_several_images_has_an_event_for_each_and_ends_in_the_result(api: Any) -> None:
    *_, first, last = api.stream_image("a red circle", seed=3, n=2)
    assert (first.name, first.is_last, first.result) == ("image_generation.completed", False, None)
    assert last.result.files == (first.file, last.file) == api.generate_image("a red circle", seed=3, n=2).files


def test_wait_returns_the_result_of_a_submitted_job(api: Any, image: bytes) -> None:
    for job in (api.submit_image("a red circle", seed=3, partial_images=1), api.submit_mesh(image, seed=3)):
        assert isinstance(job, Job)
        assert (job.step <= job.num_computed_steps <= job.num_inference_steps, job.error) == (True, None)
        result = api.wait(job.id, timeout_s=60)
        assert (result.job_id, result.seeds) == (job.id, (3,))
        ended = api.job(job.id)
        assert (ended.status, ended.is_terminal, ended.receipt) == ("succeeded", True, result.receipt)
        events = list(api.events(job.id))
        assert events[-1].result == result
        assert list(api.events(job.id, after=events[1].id)) == events[2:]
        assert list(api.events(job.id, after=events[-1].id)) == []


def test_waiting_for_a_cancelled_job_raises(api: Any, engine: Any) -> None:
    engine.gate.clear()
    job = api.submit_image("a red circle")
    assert engine.stepping.wait(20)
    for _ in range(2):
        assert api.cancel(job.id).status == "cancelled"
    engine.gate.set()
    with pytest.raises(ApiError) as caught:
        api.wait(job.id)
    assert (caught.value.status, caught.value.code) == (None, "job_cancelled")


def test_failure_is_raised_by_call_stream_and_wait(api: Any) -> None:
    with pytest.raises(ApiError) as caught:
        api.generate_image("break at step")
    assert (caught.value.status, caught.value.code) == (500, "generation_failed")
    with pytest.raises(ApiError, match=r"^generation_failed: "):
        list(api.stream_image("break at step"))
    job = api.submit_image("break at step")
    with pytest.raises(ApiError, match=r"^generation_failed: "):
        api.wait(job.id)
    ended = api.job(job.id)
    assert (ended.status, ended.error["code"]) == ("failed", "generation_failed")


def test_refusal_names_the_field(api: Any) -> None:
    with pytest.raises(ApiError, match=r"^422 invalid_parameter: .*num_inference_steps") as caught:
        api.generate_image("a", num_inference_steps=1000)
    assert (caught.value.status, caught.value.param) == (422, "num_inference_steps")
    assert caught.value.request_id
    with pytest.raises(ApiError, match="job_not_found"):
        api.job("nothing")


def test_models_are_listed(api: Any) -> None:
    assert [model["id"] for model in api.models()] == ["drawn", "guided", "ball"]


def test_jobs_are_listed_from_the_newest_over_all_pages(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_dit_client.protocol._PAGE", 2)
    made = [api.generate_image("a", seed=seed).job_id for seed in range(3)]
    assert [job.id for job in api.jobs()] == made[::-1]
    assert [job.id for job in api.jobs(all_keys=True)] == made[::-1]


def test_queued_job_has_its_place(api: Any, engine: Any) -> None:
    engine.gate.clear()
    jobs = [api.submit_image("a", n=10) for _ in range(9)]
    waiting = [job for job in map(api.job, [job.id for job in jobs]) if job.status == "queued"]
    assert [job.position for job in waiting] == list(range(len(waiting)))
    assert waiting
    for job in jobs:
        api.cancel(job.id)
    assert api.job(jobs[0].id).position is None


def test_stream_that_is_closed_early_cancels_its_job(api: Any, engine: Any) -> None:
    engine.gate.clear()
    with closing(api.stream_image("a red circle")) as events:
        job_id = next(events).data["id"]
    assert api.job(job_id).status == "cancelled"


def test_stream_that_has_ended_cancels_nothing(api: Any) -> None:
    with closing(api.stream_image("a red circle")) as events:
        last = next(event for event in events if event.is_last)
    assert api.job(last.data["id"]).status == "succeeded"


def test_events_that_are_closed_early_leave_the_job(api: Any, engine: Any) -> None:
    engine.gate.clear()
    job = api.submit_image("a red circle")
    with closing(api.events(job.id)) as events:
        assert next(events).name == "job.queued"
    engine.gate.set()
    assert api.wait(job.id).job_id == job.id


def test_call_that_is_cancelled_cancels_its_job(server: str, engine: Any) -> None:
    engine.gate.clear()

    async def run() -> None:
        async with AsyncClient(server) as client:
            call = asyncio.create_task(client.generate_image("a red circle", seed=3))
            assert await asyncio.to_thread(engine.stepping.wait, 20)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            engine.gate.set()
            await client.generate_image("another", seed=4, num_inference_steps=2)

    asyncio.run(run())
    assert [3] not in engine.batches[1:]


def test_client_runs_on_the_test_client_of_the_application(client: TestClient) -> None:
    api = Client("http://testserver", http=client)
    result = api.generate_image("a", seed=1)
    assert list(api.stream_image("a", seed=1))[-1].file == result.files[0]
    assert api.wait(api.submit_image("a", seed=1).id).files == result.files


def test_every_example_of_the_documentation_runs(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: bytes
) -> None:
    text = (ROOT / "docs" / "client.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chair.png").write_bytes(image)
    for example in examples:
        exec(compile(example.replace("http://127.0.0.1:8000", server), "client.md", "exec"), {"__name__": "example"})
    assert {path.suffix for path in tmp_path.iterdir()} >= {".png", ".glb"}


@pytest.mark.parametrize(
    ("example", "files"),
    [(image_and_mesh, ["image.png", "mesh.glb"]), (async_streams, ["circle.png", "ring.png", "square.png"])],
    ids=["image_and_mesh", "async_streams"],
)
def test_example_scripts_write_their_files(example: ModuleType, files: list[str], server: str, tmp_path: Path) -> None:
    example.main(["--url", server, "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert all(path.stat().st_size for path in tmp_path.iterdir())
