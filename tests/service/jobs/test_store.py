"""The contract of every job store."""

import asyncio
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from models.card import ImageCard, MeshCard
from models.curve import ComputedSteps, CurvePoint
from models.report import Decision, GenerationSummary, MeshReport, StepDecision
from models.request import ComputeBudget, ImageEdit, MeshRequest
from models.rules.router import RouterPolicy
from service.errors import IdempotencyKeyReused, JobNotFinished, JobNotFound, ResultExpired
from service.jobs import memory, redis_claims
from service.jobs.job import (
    Failure,
    FailureReason,
    Job,
    JobSnapshot,
    JobState,
    JobStatus,
    Priority,
    Receipt,
    StageSeconds,
)
from service.jobs.store import (
    END_ALONE,
    Changes,
    Claim,
    Ending,
    EventName,
    Fit,
    Fits,
    Idempotency,
    JobKind,
    Preview,
    Progress,
    ended,
    follow,
)
from service.scheduling.fleet import Load, ModelLoad, WorkerRecord, WorkerState

pytestmark = pytest.mark.anyio

MakeJob = Callable[..., Job]
BROKEN = Failure(FailureReason.GENERATION_FAILED, "broken")
RECEIPT = Receipt(
    GenerationSummary(
        *("forecast+router", 0.2, 0.4, 0.9, 0.5, 0.55, 3, 4, 5, 6, 0.75, 4, 3, 1, False),
        decisions=(
            StepDecision(0, "cond", "block.00", Decision.SKIP, 1.0),
            StepDecision(1, "cond", "block.00", Decision.FORECAST, 0.0),
        ),
    ),
    0.9,
    StageSeconds(0.1, 0.2, 0.3, 0.4, 1.0),
    2.5,
    MeshReport(8, 12, 1, 0, True),
)
MESH = MeshRequest(
    model="ball",
    num_inference_steps=4,
    guidance_scale=1.5,
    seed=2**63 - 1,
    budget=ComputeBudget(0.5),
    point=CurvePoint(
        RouterPolicy(0.3, 0.4, 2, width_bias=-1.5),
        *(0.5, 0.6, 0.7, 0.8),
        steps=ComputedSteps(3, 4),
        is_calibrated=False,
    ),
    is_guided=True,
    input_image=bytes(range(256)),
    octree_resolution=32,
)

# Two pictures and a mask, which the requests of a job share.
EDIT = ImageEdit((bytes(range(200)), b"second"), mask=b"mask", strength=0.5)


def only(shape: str, asked: list[JobKind]) -> Fits:
    """A worker that has room for jobs of this shape; `asked` is what it was asked."""

    def fits(kind: JobKind) -> Fit:
        asked.append(kind)
        return Fit.NOW if kind.shape == shape else Fit.NO

    return fits


def anything(_: JobKind) -> Fit:
    return Fit.NOW


async def claim(bench: Any) -> Claim:
    claimed: Claim | None = await bench.store.claim(anything)
    assert claimed is not None
    return claimed


async def test_job_comes_back_as_it_was_added(bench: Any, make_job: MakeJob) -> None:
    job = replace(make_job("a", seeds=(3, 4)), owner="key", num_previews=2, deadline_at=99.5)
    await bench.store.add(job)
    await bench.store.add(replace(make_job("m"), model="ball", requests=(MESH,)))
    assert await bench.store.get("a") == JobSnapshot(job, JobState())
    by_id = {claimed.job.id: claimed.job for claimed in (await claim(bench), await claim(bench))}
    assert by_id["a"].requests == job.requests
    assert by_id["m"].requests == (MESH,)


async def test_edit_comes_back_with_its_pictures(bench: Any, make_job: MakeJob) -> None:
    job = make_job("a", seeds=(3, 4), edit=EDIT)
    await bench.store.add(job)
    assert (await claim(bench)).job.requests == job.requests


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.CANCELLED])
async def test_pictures_of_an_edit_are_deleted_when_its_job_ends(
    status: JobStatus, bench: Any, make_job: MakeJob
) -> None:
    job = make_job("a", seeds=(3, 4), edit=EDIT)
    await bench.store.add(job)
    claimed = await claim(bench)
    assert (await bench.store.load()).image_bytes == 200 + 6 + 4  # not once for each request
    if status is JobStatus.CANCELLED:
        await bench.store.cancel("a")
    else:
        await bench.store.end(Ending(claimed, status, artifacts=(b"a", b"b")))
    emptied = ImageEdit((b"", b""), mask=b"", strength=0.5)
    assert (await bench.store.get("a")).job.requests == make_job("a", seeds=(3, 4), edit=emptied).requests
    assert (await bench.store.load()).image_bytes == 0


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.CANCELLED])
async def test_input_image_of_a_mesh_is_deleted_when_its_job_ends(
    status: JobStatus, bench: Any, make_job: MakeJob
) -> None:
    await bench.store.add(replace(make_job("m"), model="ball", requests=(MESH,)))
    claimed = await claim(bench)
    if status is JobStatus.CANCELLED:
        await bench.store.cancel("m")
    else:
        await bench.store.end(Ending(claimed, status, artifacts=(b"mesh",)))
    assert (await bench.store.get("m")).job.requests == (replace(MESH, input_image=b""),)


async def test_claims_go_by_priority_then_deadline_then_arrival(bench: Any, make_job: MakeJob) -> None:
    for number, (name, priority) in enumerate((("a", "low"), ("b", "normal"), ("c", "high"), ("d", "normal"))):
        await bench.store.add(replace(make_job(name, priority=Priority(priority)), created_at=1000.0 + number))
    await bench.store.add(replace(make_job("soon"), created_at=1010.0, deadline_at=1015.0))
    claimed = [(await claim(bench)).job for _ in range(5)]
    assert [job.id for job in claimed] == ["c", "soon", "b", "d", "a"]
    assert {(await bench.store.get(job.id)).state.status for job in claimed} == {JobStatus.RUNNING}
    assert await bench.store.claim(anything) is None


async def test_claim_passes_over_what_does_not_fit(bench: Any, make_job: MakeJob) -> None:
    for number in range(70):
        await bench.store.add(replace(make_job(f"a{number}"), created_at=float(number)))
    await bench.store.add(replace(make_job("wide", width=128), created_at=99.0))
    asked: list[JobKind] = []
    assert await bench.store.claim(only("drawn 128x128", asked)) is None
    assert [kind.shape for kind in asked] == ["drawn 64x64", "drawn 128x64"]  # once for each kind
    claimed = await bench.store.claim(only("drawn 128x64", asked))
    assert claimed.job.id == "wide"
    assert (await bench.store.load()).of("drawn").num_queued == 70
    # Room may be kept for urgent jobs
    await bench.store.add(make_job("high", priority=Priority.HIGH))
    await bench.store.add(make_job("other high", priority=Priority.HIGH))
    assert (await bench.store.claim(lambda kind: Fit.NOW if kind.is_urgent else Fit.NO)).job.id == "high"
    await bench.store.add(replace(make_job("deadline"), deadline_at=1e9))
    await bench.store.cancel("other high")
    assert (await bench.store.claim(lambda kind: Fit.NOW if kind.is_urgent else Fit.NO)).job.id == "deadline"


async def test_claim_judges_a_bounded_number_of_kinds(
    bench: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (memory, redis_claims):
        monkeypatch.setattr(module, "MOST_KINDS", 128)
    jobs = [replace(make_job(f"a{number}", width=64 + number), created_at=float(number)) for number in range(300)]
    await asyncio.gather(*map(bench.store.add, jobs))  # more at once than Redis gets connections
    asked: list[JobKind] = []
    for _ in range(2):
        assert await bench.store.claim(only("none", asked)) is None
    assert 128 <= len(asked) <= 2 * 2 * 128
    # The first ones are claimed as soon as they fit
    assert (await bench.store.claim(anything)).job.id in {job.id for job in jobs[:128]}


async def test_kind_that_waits_for_memory_holds_up_those_behind_it(bench: Any, make_job: MakeJob) -> None:
    for number, width in enumerate((64, 128, 192)):
        await bench.store.add(replace(make_job(f"{width}", width=width), created_at=float(number)))
    fits = {"drawn 64x64": Fit.NO, "drawn 128x64": Fit.WAITS, "drawn 192x64": Fit.NOW}
    assert await bench.store.claim(lambda kind: fits[kind.shape]) is None
    fits["drawn 128x64"] = Fit.NOW
    claimed = [await bench.store.claim(lambda kind: fits[kind.shape]) for _ in range(3)]
    assert [None if one is None else one.job.id for one in claimed] == ["128", "192", None]


async def test_two_never_claim_the_same_job(bench: Any, make_job: MakeJob) -> None:
    for number in range(20):
        await bench.store.add(make_job(f"a{number}"))
    claims = await asyncio.gather(*(bench.store.claim(anything) for _ in range(30)))
    ids = [claimed.job.id for claimed in claims if claimed is not None]
    assert len(ids) == len(set(ids)) == 20
    assert len({claimed.lease for claimed in claims if claimed is not None}) == 20


async def test_succeeded_job_has_its_artifacts_and_receipts(bench: Any, make_job: MakeJob) -> None:
    await bench.store.add(make_job("a"))
    ending = Ending(await claim(bench), JobStatus.SUCCEEDED, receipts=(RECEIPT,), artifacts=(b"image",))
    done = await bench.store.end(ending)
    assert done.state.status is JobStatus.SUCCEEDED
    finished = await bench.store.content("a")
    assert finished.artifacts == (b"image",)
    assert finished.state.receipts == (RECEIPT,)
    assert await bench.store.live_jobs() == []


async def test_first_end_decides(bench: Any, make_job: MakeJob) -> None:
    await bench.store.add(make_job("a"))
    claimed = await claim(bench)
    cancelled, is_news = await bench.store.cancel("a")
    assert (cancelled.state.status, is_news) == (JobStatus.CANCELLED, True)
    assert await bench.store.end(Ending(claimed, JobStatus.SUCCEEDED, artifacts=(b"late",))) is None
    assert await bench.store.fail("a", BROKEN) is None
    await bench.store.record(Progress(claimed, 1, 4, 0.5, 1.0))
    await bench.store.release(claimed)
    snapshot, is_news = await bench.store.cancel("a")
    assert (snapshot.state.status, snapshot.state.steps_done, is_news) == (JobStatus.CANCELLED, 0, False)
    with pytest.raises(JobNotFinished, match="cancelled"):
        await bench.store.content("a")


async def test_cancelled_job_leaves_the_queue_and_is_announced(bench: Any, make_job: MakeJob) -> None:
    for name in ("a", "b"):
        await bench.store.add(make_job(name))
    claimed = await claim(bench)
    for name in ("a", "b"):
        await bench.store.cancel(name)
    assert await bench.store.claim(anything) is None
    assert await bench.store.renew([claimed]) == {claimed.job.id}
    async with asyncio.timeout(20):
        assert await bench.cancelled.get() == claimed.job.id  # the other one was nobody's


async def test_failed_job_says_why(bench: Any, make_job: MakeJob) -> None:
    await bench.store.add(make_job("a"))
    done = await bench.store.end(Ending(await claim(bench), JobStatus.FAILED, failure=BROKEN))
    assert (done.state.status, done.state.failure) == (JobStatus.FAILED, BROKEN)
    with pytest.raises(JobNotFinished, match="failed"):
        await bench.store.content("a")


@pytest.mark.parametrize("call", ["get", "content", "cancel", "events"])
async def test_unknown_job_is_not_found(call: str, bench: Any) -> None:
    arguments = ("a", "0-0") if call == "events" else ("a",)
    with pytest.raises(JobNotFound, match="'a'"):
        await getattr(bench.store, call)(*arguments)


async def test_record_is_deleted_after_its_content(bench: Any, make_job: MakeJob) -> None:
    await bench.store.add(make_job("a"), Idempotency("o", "k", "f"))
    await bench.store.end(Ending(await claim(bench), JobStatus.SUCCEEDED, artifacts=(b"image",)))
    await bench.elapse(0.6)
    with pytest.raises(ResultExpired):
        await bench.store.content("a")
    assert (await bench.store.get("a")).state.status is JobStatus.SUCCEEDED
    await bench.elapse(0.6)
    with pytest.raises(JobNotFound):
        await bench.store.get("a")
    assert (await bench.store.add(make_job("b"), Idempotency("o", "k", "other"))).id == "b"


async def test_dead_workers_job_is_queued_again_then_given_up(bench: Any, make_job: MakeJob) -> None:
    await bench.store.add(make_job("a"))
    first = await claim(bench)
    await bench.store.record(Progress(first, 2, 3, 0.5, 1.0))
    assert (await bench.store.recover()).requeued == ()
    await bench.elapse(0.4)
    assert (await bench.store.recover()).requeued == ("a",)
    state = (await bench.store.get("a")).state
    assert (state.status, state.attempts) == (JobStatus.QUEUED, 1)
    assert await bench.store.renew([first]) == {"a"}
    second = await claim(bench)
    assert second.job.requests == first.job.requests  # and so the same seed
    state = (await bench.store.get("a")).state
    assert (state.steps_done, state.num_steps) == (0, None)
    assert await bench.store.end(Ending(first, JobStatus.SUCCEEDED, artifacts=(b"late",))) is None
    await bench.elapse(0.4)
    (failed,) = (await bench.store.recover()).failed
    assert failed.state.failure.reason is FailureReason.WORKER_LOST
    assert "2 workers" in failed.state.failure.message
    assert await bench.store.end(Ending(second, JobStatus.SUCCEEDED, artifacts=(b"late",))) is None
    assert (await bench.store.get("a")).state.status is JobStatus.FAILED


async def test_renewed_lease_holds(bench: Any, make_job: MakeJob) -> None:
    await bench.store.add(make_job("a"))
    claimed = await claim(bench)
    for _ in range(3):
        await bench.elapse(0.15)
        assert await bench.store.renew([claimed]) == set()
    assert (await bench.store.recover()).requeued == ()
    assert await bench.store.end(Ending(claimed, JobStatus.SUCCEEDED, artifacts=(b"x",))) is not None


async def test_released_job_returns_to_its_place_without_an_attempt(bench: Any, make_job: MakeJob) -> None:
    for number, name in enumerate(("a", "b")):
        await bench.store.add(replace(make_job(name), created_at=float(number)))
    for _ in range(4):
        claimed = await claim(bench)
        assert claimed.job.id == "a"
        assert (await bench.store.get("a")).state.attempts == 1
        await bench.store.release(claimed)


async def seconds(bench: Any) -> float:
    return (await bench.store.load()).of("drawn").seconds


async def test_load_counts_what_is_left(bench: Any, make_job: MakeJob) -> None:
    for number, name in enumerate(("a", "b")):
        await bench.store.add(replace(make_job(name), created_at=float(number)))
    assert await seconds(bench) == 4.0
    claimed = await claim(bench)
    await bench.store.record(Progress(claimed, 1, 4, 0.5, 1.0))
    assert await seconds(bench) == 3.5
    # A deadline has left out two of its steps
    await bench.store.record(Progress(claimed, 1, 2, 0.5, 1.0))
    load = await bench.store.load()
    assert load == Load({"drawn": ModelLoad(1, 1, queued_s=2.0, running_s=1.0)})
    assert (await bench.store.get("a")).num_steps == 2
    await bench.store.cancel("a")
    assert await seconds(bench) == 2.0


async def test_size_of_input_images_is_that_of_jobs_that_have_not_ended(bench: Any, make_job: MakeJob) -> None:
    assert (await bench.store.load()).image_bytes == 0
    for name in ("a", "b"):
        await bench.store.add(replace(make_job(name), model=MESH.model, requests=(MESH,)))
    await bench.store.add(make_job("c"))
    await claim(bench)
    assert (await bench.store.load()).image_bytes == 2 * 256
    await bench.store.cancel("a")
    assert (await bench.store.load()).image_bytes == 256


async def test_same_key_makes_one_job_however_many_ask_at_once(bench: Any, make_job: MakeJob) -> None:
    same = Idempotency("owner", "key", "print")
    made = await asyncio.gather(*(bench.store.add(make_job(f"a{n}"), same) for n in range(50)))
    assert len({job.id for job in made}) == 1
    assert len(await bench.store.live_jobs()) == 1
    assert (await bench.store.add(make_job("b"), replace(same, owner="other"))).id == "b"
    assert (await bench.store.add(make_job("c"), replace(same, key="other"))).id == "c"
    with pytest.raises(IdempotencyKeyReused, match="'key'"):
        await bench.store.add(make_job("d"), replace(same, fingerprint="another body"))
    assert len(await bench.store.live_jobs()) == 3


async def test_events_are_in_order_and_can_be_resumed(bench: Any, make_job: MakeJob) -> None:
    await bench.store.add(make_job("a", seeds=(0, 1)))
    claimed = await claim(bench)
    await bench.store.record(Progress(claimed, 3, 7, 0.25, 1.5))
    await bench.store.add_preview(Preview(claimed, 1, 0, b"small", 5.5))
    await bench.store.end(Ending(claimed, JobStatus.SUCCEEDED, artifacts=(b"x", b"y")))
    events = [event async for event in follow(bench.store, "a")]
    assert [event.name for event in events] == [
        EventName.QUEUED,
        EventName.STARTED,
        EventName.PROGRESS,
        EventName.PREVIEW,
        EventName.ENDED,
    ]
    assert events[2].data == {
        "step": 1,
        "num_computed_steps": 3,
        "num_inference_steps": 4,
        "compute_ratio": 0.25,
        "eta_s": 1.5,
    }
    assert events[3].data == {"b64_json": "c21hbGw=", "partial_image_index": 0, "index": 1, "created_at": 5}
    assert events[4].data == {"status": "succeeded"}
    assert [event async for event in follow(bench.store, "a", after=events[2].id)] == events[3:]
    assert [event async for event in follow(bench.store, "a", after=events[4].id)] == []


async def test_all_followers_learn_of_the_end(bench: Any, make_job: MakeJob) -> None:
    await bench.store.add(make_job("a"))
    claimed = await claim(bench)
    followers = [follow(bench.store, "a") for _ in range(5)]
    for follower in followers:
        assert [(await anext(follower)).name for _ in range(2)] == [EventName.QUEUED, EventName.STARTED]
    waiting = [asyncio.ensure_future(anext(follower)) for follower in followers]
    await bench.store.end(Ending(claimed, JobStatus.SUCCEEDED, artifacts=(b"x",)))
    async with asyncio.timeout(20):
        events = await asyncio.gather(*waiting)
    assert {event.name for event in events} == {EventName.ENDED}
    assert (await ended(bench.store, "a")).state.status is JobStatus.SUCCEEDED


async def test_follower_that_is_late_learns_of_the_end_though_its_events_are_gone(
    bench: Any, make_job: MakeJob
) -> None:
    await bench.store.add(make_job("a"))
    follower = follow(bench.store, "a")
    assert (await anext(follower)).name is EventName.QUEUED
    await bench.store.cancel("a")
    await bench.elapse(0.6)
    end = await anext(follower)
    assert (end.id, end.name, end.data) == (END_ALONE, EventName.ENDED, {"status": "cancelled"})
    assert [event async for event in follower] == []


async def test_followers_of_a_job_are_not_kept_after_they_leave() -> None:
    changes = Changes()
    with changes.of("a") as changed:
        changes.notify("a")
        assert changed.is_set()
    kept = weakref.ref(changed)
    del changed
    assert kept() is None


async def test_webhook_is_due_when_its_job_has_ended_and_given_to_one(bench: Any, make_job: MakeJob) -> None:
    await bench.store.add(replace(make_job("a"), webhook_url="https://hooks.example/"))
    await bench.store.add(make_job("b"))
    assert await bench.store.take_webhook() is None
    await bench.store.cancel("a")
    await bench.store.cancel("b")
    snapshot, num_failures = await bench.store.take_webhook()
    assert (snapshot.job.id, snapshot.job.webhook_url, num_failures) == ("a", "https://hooks.example/", 0)
    assert await bench.store.take_webhook() is None
    await bench.store.settle_webhook("a", 0.1)
    assert await bench.store.take_webhook() is None
    await bench.elapse(0.2)
    assert (await bench.store.take_webhook())[1] == 1
    await bench.store.settle_webhook("a", None)
    await bench.elapse(0.2)
    assert await bench.store.take_webhook() is None


async def test_events_are_deleted_before_the_record_but_the_end_is_still_an_event(
    bench: Any, make_job: MakeJob
) -> None:
    await bench.store.add(make_job("a"))
    claimed = await claim(bench)
    await bench.store.add_preview(Preview(claimed, 0, 0, b"small", 5.5))
    await bench.store.end(Ending(claimed, JobStatus.SUCCEEDED, artifacts=(b"x",)))
    await bench.elapse(0.6)
    events = [event async for event in follow(bench.store, "a")]
    assert [(event.name, event.data) for event in events] == [(EventName.ENDED, {"status": "succeeded"})]
    assert [event async for event in follow(bench.store, "a", after="5-0")] == []


async def test_key_lives_as_long_as_its_job(bench: Any, make_job: MakeJob) -> None:
    same = Idempotency("o", "k", "f")
    await bench.store.add(make_job("a"), same)
    await bench.elapse(1.2)
    assert (await bench.store.add(make_job("b"), same)).id == "a"
    await bench.store.cancel("a")
    await bench.elapse(0.6)
    assert (await bench.store.find(same)).id == "a"
    await bench.elapse(0.6)
    assert await bench.store.find(same) is None


async def test_jobs_are_listed_newest_first_page_by_page(bench: Any, make_job: MakeJob) -> None:
    for number in range(5):
        await bench.store.add(replace(make_job(f"a{number}"), owner="key" if number % 2 else "other"))
    await bench.store.add(make_job("nobody's"))
    await bench.store.cancel("a3")

    async def names(owner: str | None, **page: Any) -> list[str]:
        return [found.job.id for found in await bench.store.jobs(owner, **page)]

    assert await names(None, limit=9) == ["nobody's", "a4", "a3", "a2", "a1", "a0"]
    assert await names("key", limit=1) == ["a3"]
    assert await names("key", limit=9, before="a3") == ["a1"]
    assert await names("key", limit=9, before="a1") == []
    assert await names(None, limit=2, before="a3") == ["a2", "a1"]
    with pytest.raises(JobNotFound, match="'b'"):
        await names("key", limit=9, before="b")
    # Those whose record is deleted are no longer listed
    await bench.elapse(1.2)
    assert await names("key", limit=9) == ["a1"]


async def test_position_counts_the_jobs_of_the_model_that_come_before(bench: Any, make_job: MakeJob) -> None:
    for number, width in enumerate((64, 128, 64, 128)):
        await bench.store.add(replace(make_job(f"a{number}", width=width), created_at=float(number)))
    await bench.store.add(replace(make_job("m"), model="ball", requests=(MESH,)))
    await bench.store.add(replace(make_job("high", priority=Priority.HIGH), created_at=9.0))
    names = ("high", "a0", "a1", "a2", "a3", "m")
    assert await bench.store.positions(names) == [0, 1, 2, 3, 4, 0]
    assert (await claim(bench)).job.id == "high"
    await bench.store.cancel("a1")
    assert await bench.store.positions(names) == [None, 0, None, 1, 2, 0]
    assert await bench.store.positions(["unknown"]) == [None]
    assert await bench.store.positions([]) == []


async def test_load_is_that_of_each_model_and_of_one_key(bench: Any, make_job: MakeJob) -> None:
    assert await bench.store.load("key") == Load()
    await bench.store.add(replace(make_job("a"), owner="key", predicted_seconds=0.1))
    await bench.store.add(replace(make_job("b"), owner="other", predicted_seconds=0.2))
    await bench.store.add(replace(make_job("m"), owner="key", model="ball", requests=(MESH,)))
    models = {"drawn": ModelLoad(2, queued_s=0.3), "ball": ModelLoad(1, queued_s=2.0)}
    assert await bench.store.load("key") == Load(models, image_bytes=256, own_s=2.1, num_owners=2)
    assert (await bench.store.load("nobody")).own_s == (await bench.store.load()).own_s == 0.0
    for name in "abm":
        await bench.store.cancel(name)
    assert await bench.store.load("key") == Load()


async def test_load_says_how_much_of_it_is_urgent(bench: Any, make_job: MakeJob) -> None:
    async def urgent_s() -> float:
        load = (await bench.store.load()).of("drawn")
        assert load.seconds >= load.urgent_s
        return load.urgent_s

    await bench.store.add(replace(make_job("a"), predicted_seconds=4.0))
    assert await urgent_s() == 0.0
    await bench.store.add(replace(make_job("deadline"), predicted_seconds=1.0, deadline_at=1e9))
    await bench.store.add(replace(make_job("high", priority=Priority.HIGH), predicted_seconds=2.0))
    assert await urgent_s() == 3.0
    claimed = await claim(bench)
    assert claimed.job.id == "high"
    await bench.store.record(Progress(claimed, 1, 4, 0.25, 1.5))
    assert await urgent_s() == 2.5
    await bench.store.release(claimed)
    assert await urgent_s() == 3.0
    await bench.store.cancel("deadline")
    assert await urgent_s() == 2.0
    await bench.store.end(Ending(await claim(bench), JobStatus.CANCELLED))
    assert await urgent_s() == 0.0
    assert (await bench.store.load()).of("drawn").seconds == 4.0


async def test_worker_is_known_while_it_announces_itself(
    bench: Any, drawn_card: ImageCard, forecasting_card: ImageCard, mesh_card: MeshCard
) -> None:
    cards = {card.id: card for card in (drawn_card, forecasting_card, mesh_card)}
    record = WorkerRecord(
        *(bench.store.worker_id, "1.2", "cuda:0", WorkerState.BUSY, cards),
        pace=1.25,
        finish_s={"drawn": 0.5},
        num_held=3,
        max_running=16,
        step_s=0.75,
        step_pace=1.5,
        urgent_waits=False,
    )
    assert await bench.store.workers() == []
    await bench.store.announce(record)
    assert await bench.store.workers() == [record]
    # A card that has changed is sent again
    slower = replace(record, cards={**cards, "drawn": replace(drawn_card, dense_step_seconds=99.0)})
    await bench.store.announce(slower)
    assert await bench.store.workers() == [slower]
    await bench.store.withdraw()
    assert await bench.store.workers() == []
