"""Meshes between their claim and their start: another process prepares the input image."""

import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from models.families.hunyuan3d.preparation import ImageSettings, prepared_request
from models.request import MeshRequest
from service.jobs.job import FailureReason, Job, JobStatus

MakeJob = Callable[..., Job]
TIMEOUT_S = 20


def picture(colour: tuple[int, int, int, int]) -> bytes:
    """One colour with a transparent border."""
    image, file = Image.new("RGBA", (60, 40)), BytesIO()
    image.paste(colour, (10, 10, 50, 30))
    image.save(file, "PNG")
    return file.getvalue()


def prepare_small(request: MeshRequest) -> Callable[[], MeshRequest]:
    return partial(prepared_request, request, ImageSettings(32), None)


def test_engine_encodes_the_prepared_request(
    service: Any, engine: Any, make_mesh_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, encoded = engine.encode, []

    def encode_noted(request: Any, branches: Any) -> Any:
        encoded.append(request)
        return encode(request, branches)

    monkeypatch.setattr(engine, "preparation", prepare_small)
    monkeypatch.setattr(engine, "encode", encode_noted)
    job = make_mesh_job("mesh", input_image=picture((200, 0, 0, 255)))
    assert service.submit(job).result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED
    (request,) = encoded
    assert isinstance(request, MeshRequest)
    assert request.is_prepared
    assert Image.open(BytesIO(request.input_image)).size == (32, 32)


def test_image_that_shows_nothing_fails_its_job_as_the_clients_fault(
    service: Any, engine: Any, make_mesh_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "preparation", prepare_small)
    failure = service.submit(make_mesh_job("mesh", input_image=picture((0, 0, 0, 0)))).result(TIMEOUT_S).state.failure
    assert (failure.reason, failure.param) == (FailureReason.INVALID_REQUEST, "input_image")
    assert "fully transparent" in failure.message


def test_steps_of_others_go_on_while_an_image_is_prepared(
    service: Any, engine: Any, make_job: MakeJob, make_mesh_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preparation(request: Any) -> Callable[[], Any] | None:
        return partial(time.sleep, 60) if isinstance(request, MeshRequest) else None

    monkeypatch.setattr(engine, "preparation", preparation)
    mesh = service.submit(make_mesh_job("mesh", seed=7))
    service.wait_until_taken("mesh", are_encoded=False)
    assert service.submit(make_job("image")).result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED
    assert not mesh.done()
    service.cancel("mesh")
    assert mesh.result(TIMEOUT_S).state.status is JobStatus.CANCELLED
    assert 7 not in engine.started
