"""Meshes between their last step and their file, decoded in turns by the worker's thread."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from threading import Event
from typing import Any

import pytest
import trimesh

from models.curve import Preset
from models.mesh.size import grid_bytes, surface_bytes
from models.request import LatencyBudget
from service.jobs.job import FailureReason, Job, JobStatus
from service.running import publisher
from service.running.sandbox import Sandbox
from service.settings import Settings

StartService = Callable[[Settings], Any]
MakeJob = Callable[..., Job]
TIMEOUT_S = 20


@pytest.fixture(autouse=True)
def decoding(engine: Any) -> Iterator[None]:
    """The engine decodes meshes in turns, without end until a test sets `field_gate`."""
    engine.has_fields = True
    yield
    engine.field_gate.set()


def test_steps_of_others_go_on_while_a_mesh_is_decoded(
    service: Any, engine: Any, make_job: MakeJob, make_mesh_job: MakeJob
) -> None:
    mesh = service.submit(make_mesh_job("mesh"))
    assert engine.is_decoding.wait(TIMEOUT_S)
    assert service.submit(make_job("image")).result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED
    assert not mesh.done()
    engine.field_gate.set()
    finished = mesh.result(TIMEOUT_S)
    opened = trimesh.load(BytesIO(finished.artifacts[0]), file_type="glb", force="mesh")
    (receipt,) = finished.state.receipts
    assert receipt.mesh is not None
    assert isinstance(opened, trimesh.Trimesh)
    assert opened.is_watertight
    assert len(opened.faces) == receipt.mesh.num_faces > 100
    assert receipt.seconds.decode > 0


def test_mesh_that_would_miss_its_deadline_is_decoded_before_others_step(
    service: Any, engine: Any, make_job: MakeJob, make_mesh_job: MakeJob
) -> None:
    now = time.time()
    hurried = make_mesh_job("mesh", budget=LatencyBudget(1.0))
    mesh = service.submit(replace(hurried, created_at=now, deadline_at=now))
    assert engine.is_decoding.wait(TIMEOUT_S)
    image = service.submit(make_job("image", num_inference_steps=1))
    service.wait_until_taken("mesh", "image")
    time.sleep(0.3)  # several turns
    assert not image.done()
    engine.field_gate.set()
    assert mesh.result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED
    assert image.result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED


def test_cancelled_mesh_is_decoded_no_further(
    service: Any, engine: Any, make_job: MakeJob, make_mesh_job: MakeJob
) -> None:
    service.submit(make_mesh_job("mesh"))
    assert engine.is_decoding.wait(TIMEOUT_S)
    assert service.cancel("mesh").state.status is JobStatus.CANCELLED
    service.submit(make_job("later")).result(TIMEOUT_S)
    assert engine.dropped_fields == [0]


def test_grids_of_meshes_are_bounded_and_a_larger_one_goes_alone(
    start_service: StartService, engine: Any, make_job: MakeJob, make_mesh_job: MakeJob
) -> None:
    service = start_service(Settings(max_decode_bytes=2 * grid_bytes(32)))
    jobs = [make_mesh_job(str(seed), seed=seed, octree_resolution=cells) for seed, cells in enumerate((32, 32, 64, 32))]
    meshes = [service.submit(job) for job in jobs]
    service.wait_until_taken("0", "1", "2", "3")
    while sum(3 in seeds for seeds in engine.batches) < 3 or len(engine.fields) < 2:  # until all are denoised
        service.submit(make_job(f"image {len(engine.batches)}")).result(TIMEOUT_S)
    service.submit(make_job("one more image")).result(TIMEOUT_S)
    assert sorted(engine.fields) == [0, 1]
    engine.field_gate.set()
    assert all(mesh.result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED for mesh in meshes)
    assert sorted(engine.fields) == [0, 1, 2, 3]


def test_mesh_that_waits_for_a_grid_goes_on_when_another_is_cancelled(
    start_service: StartService, engine: Any, make_job: MakeJob, make_mesh_job: MakeJob
) -> None:
    service = start_service(Settings(max_decode_bytes=1))
    service.submit(make_mesh_job("first", seed=1))
    assert engine.is_decoding.wait(TIMEOUT_S)
    second = service.submit(make_mesh_job("second", seed=2))
    while sum(2 in seeds for seeds in engine.batches) < 3:  # until it is denoised
        service.submit(make_job(f"image {len(engine.batches)}")).result(TIMEOUT_S)
    service.cancel("first")
    while engine.dropped_fields != [1]:
        time.sleep(0.001)
    engine.field_gate.set()
    assert second.result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED


def test_deadline_leaves_time_for_the_decoding(service: Any, engine: Any, make_mesh_job: MakeJob) -> None:
    engine.field_gate.set()
    now = time.time()
    job = replace(make_mesh_job("mesh", budget=LatencyBudget(1e9)), created_at=now, deadline_at=now + 1e9)
    service.submit(job).result(TIMEOUT_S)
    assert {move.preset for move in engine.moves} == {Preset.EXACT}
    engine.moves.clear()
    service.submit(replace(job, id="hasty", decode_seconds=1e9)).result(TIMEOUT_S)
    assert {move.preset for move in engine.moves} == {Preset.DRAFT}


def test_field_that_cannot_be_decoded_fails_its_job_alone(
    service: Any, engine: Any, make_job: MakeJob, make_mesh_job: MakeJob
) -> None:
    engine.field_gate.set()
    failure = service.submit(make_mesh_job("mesh", seed=666)).result(TIMEOUT_S).state.failure
    assert failure.message == "job mesh failed: no surface: the field is not finite at 3 points"
    assert service.submit(make_job("later")).result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED


def test_shutdown_does_not_wait_for_a_mesh(start_service: StartService, engine: Any, make_mesh_job: MakeJob) -> None:
    service = start_service(Settings(grace_s=0))
    mesh = service.submit(make_mesh_job("mesh"))
    assert engine.is_decoding.wait(TIMEOUT_S)
    service.drain()
    assert not service.dispatcher.worker.is_alive
    assert mesh.result(TIMEOUT_S).state.failure.reason is FailureReason.DRAINING


@pytest.mark.parametrize("end", ["cancel", "shutdown"])
def test_process_that_makes_a_file_ends_with_its_job(
    start_service: StartService, engine: Any, make_mesh_job: MakeJob, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    service, has_begun = start_service(Settings(grace_s=0)), Event()
    run = Sandbox.run

    def run_for_long(self: Sandbox, *arguments: Any, max_bytes: int, is_wanted: Callable[[], bool]) -> Any:
        has_begun.set()
        return run(self, time.sleep, 3600, max_bytes=max_bytes, is_wanted=is_wanted)

    monkeypatch.setattr(Sandbox, "run", run_for_long)
    engine.field_gate.set()
    mesh = service.submit(make_mesh_job("mesh"))
    assert has_begun.wait(TIMEOUT_S)
    if end == "cancel":
        service.cancel("mesh")
        assert mesh.result(TIMEOUT_S).state.status is JobStatus.CANCELLED
    service.drain()
    assert not service.dispatcher.worker.is_alive  # it waits for its processes
    if end == "shutdown":
        assert mesh.result(TIMEOUT_S).state.failure.reason is FailureReason.DRAINING


def test_mesh_that_needs_too_much_memory_fails_with_the_reason(
    service: Any, engine: Any, make_mesh_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert surface_bytes(512) < 4_000_000_000
    monkeypatch.setattr(publisher, "surface_bytes", lambda _: 1)
    engine.field_gate.set()
    failure = service.submit(make_mesh_job("mesh")).result(TIMEOUT_S).state.failure
    assert failure.reason is FailureReason.GENERATION_FAILED
    assert failure.message.startswith("job mesh failed: its process ")


def test_killed_process_fails_its_job_and_the_next_gets_another(
    service: Any, engine: Any, make_mesh_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.field_gate.set()
    run = Sandbox.run

    def run_in_a_dying_process(self: Sandbox, *arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(Sandbox, "run", run)
        return self.run(os.abort, **options)

    monkeypatch.setattr(Sandbox, "run", run_in_a_dying_process)
    failure = service.submit(make_mesh_job("first")).result(TIMEOUT_S).state.failure
    assert failure.message == (
        f"job first failed: its process ended by signal {signal.SIGABRT.name}; try an octree_resolution of less than 32"
    )
    assert service.submit(make_mesh_job("second")).result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED
