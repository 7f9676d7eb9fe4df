from collections.abc import Callable

import pytest

from service.jobs.job import TRANSITIONS, IllegalTransition, Job, JobStatus


@pytest.mark.parametrize("status", JobStatus)
@pytest.mark.parametrize("target", JobStatus)
def test_job_moves_only_where_the_table_says(
    status: JobStatus, target: JobStatus, make_job: Callable[..., Job]
) -> None:
    job = make_job("a")
    for step in {JobStatus.QUEUED: (), JobStatus.RUNNING: (JobStatus.RUNNING,)}.get(
        status, (JobStatus.RUNNING, status)
    ):
        job = job.moved_to(step)
    if target in TRANSITIONS[status]:
        assert job.moved_to(target).status is target
    else:
        with pytest.raises(IllegalTransition, match=f"from {status} to {target}"):
            job.moved_to(target)


def test_only_ends_are_terminal() -> None:
    assert {status for status in JobStatus if status.is_terminal} == {"succeeded", "failed", "cancelled"}


def test_remaining_seconds_shrink_with_the_steps(make_job: Callable[..., Job]) -> None:
    job = make_job("a", seeds=(0, 1))
    assert job.num_steps == 8
    assert job.remaining_seconds == job.predicted_seconds
