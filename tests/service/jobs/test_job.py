from collections.abc import Callable
from dataclasses import replace

import pytest

from models.card import ImageCard
from models.curve import EXACT, Preset
from models.request import Budget, ComputeBudget, MeshRequest, PresetBudget
from service.jobs.job import IllegalTransition, Job, JobSnapshot, JobState, JobStatus, Priority

LEGAL_MOVES = {
    ("queued", "running"),
    ("queued", "failed"),
    ("queued", "cancelled"),
    ("running", "queued"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
}


@pytest.mark.parametrize("status", JobStatus)
@pytest.mark.parametrize("target", JobStatus)
def test_state_makes_legal_moves_and_no_others(status: JobStatus, target: JobStatus) -> None:
    state = JobState(status, steps_done=3)
    if (status, target) in LEGAL_MOVES:
        assert state.moved_to(target) == JobState(target, steps_done=3)
    else:
        with pytest.raises(IllegalTransition, match=f"from {status} to {target}"):
            state.moved_to(target)


def test_only_ends_are_terminal() -> None:
    assert {status for status in JobStatus if status.is_terminal} == {"succeeded", "failed", "cancelled"}


def test_remaining_seconds_shrink_with_the_steps(make_job: Callable[..., Job]) -> None:
    job = make_job("a", seeds=(0, 1))
    assert job.num_steps == 8
    states = [JobState(), *(JobState(steps_done=done, num_steps=steps) for done, steps in ((2, 8), (2, 4), (8, 8)))]
    remaining = [JobSnapshot(job, state).remaining_seconds / job.predicted_seconds for state in states]
    assert remaining == [1.0, 0.75, 0.5, 0.0]


@pytest.mark.parametrize(
    ("budget", "num_steps"),
    [(PresetBudget(Preset.BALANCED), 4), (ComputeBudget(0.5), 4), (ComputeBudget(0.125), 1), (ComputeBudget(1), 8)],
)
def test_job_expects_the_steps_that_its_budget_computes(
    budget: Budget, num_steps: int, make_job: Callable[..., Job], forecasting_card: ImageCard
) -> None:
    assert make_job("a", seeds=(0, 1, 2), card=forecasting_card, budget=budget).num_steps == 3 * num_steps


def test_decoding_is_left_until_the_job_has_ended(make_mesh_job: Callable[..., Job]) -> None:
    job = replace(make_mesh_job("a"), predicted_seconds=12.0, decode_seconds=10.0)
    assert [job.seconds_left(done, 4) for done in (0, 2, 4)] == [12.0, 11.0, 10.0]


def test_place_goes_by_priority_then_by_deadline(make_job: Callable[..., Job]) -> None:
    early, late = (replace(make_job(name), created_at=at) for name, at in (("early", 100.0), ("late", 101.0)))
    urgent = replace(late, deadline_at=159.0)  # a job without a deadline sorts as if due 60 s after its arrival
    patient = replace(early, deadline_at=162.0)
    high, low = replace(late, priority=Priority.HIGH), replace(early, priority=Priority.LOW, deadline_at=0.0)
    assert sorted((low, patient, late, early, urgent, high), key=lambda job: job.place) == [
        *(high, urgent, early, late, patient, low)
    ]


def test_without_input_images_changes_only_requests_that_have_some(make_job: Callable[..., Job]) -> None:
    image_job = make_job("a")
    assert image_job.without_input_images() == image_job
    mesh = MeshRequest(
        model="ball",
        num_inference_steps=4,
        guidance_scale=1.5,
        seed=0,
        budget=ComputeBudget(0.5),
        point=EXACT,
        is_guided=True,
        input_image=b"png",
        octree_resolution=32,
    )
    mesh_job = replace(image_job, requests=(mesh,))
    assert mesh_job.without_input_images() == replace(mesh_job, requests=(replace(mesh, input_image=b""),))
