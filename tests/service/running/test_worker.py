import time
from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING, Any, cast

import pytest

from models.card import ImageCard
from models.curve import Preset
from models.errors import DeviceLost, WeightsError
from models.request import LatencyBudget, PresetBudget
from service.app import build_dispatcher
from service.jobs.job import FailureReason, Job, JobStatus, Priority
from service.running.held import preview_steps
from service.settings import Settings
from tests.fixtures.waiting import wait_until

if TYPE_CHECKING:
    from models.engine import Engine

StartService = Callable[[Settings], Any]
MakeJob = Callable[..., Job]
TIMEOUT_S = 20


def test_job_succeeds_with_one_receipt_for_each_image(service: Any, engine: Any, make_job: MakeJob) -> None:
    engine.gate.clear()
    submitted = service.submit(make_job("a", seeds=(5, 6, 7)))
    service.wait_until_taken("a")
    engine.gate.set()
    finished = submitted.result(TIMEOUT_S)
    assert finished.state.status is JobStatus.SUCCEEDED
    assert len(set(finished.artifacts)) == len(finished.state.receipts) == 3
    assert finished.state.steps_done == 12
    # The first one may step before the others are encoded.
    assert all(2 < receipt.batch_size_mean <= 3 for receipt in finished.state.receipts)


def test_requests_of_one_shape_share_steps_as_they_come(service: Any, engine: Any, make_job: MakeJob) -> None:
    engine.gate.clear()
    first = service.submit(make_job("a", seeds=(1,)))
    assert engine.stepping.wait(TIMEOUT_S)
    second = service.submit(make_job("b", seeds=(2,), num_inference_steps=2))
    service.wait_until_taken("a", "b")
    engine.gate.set()
    first.result(TIMEOUT_S)
    second.result(TIMEOUT_S)
    assert [sorted(batch) for batch in engine.batches] == [[1], [1, 2], [1, 2], [1]]


def test_only_computed_steps_take_turns(
    service: Any, engine: Any, make_job: MakeJob, forecasting_card: ImageCard
) -> None:
    engine.gate.clear()
    fields = {"card": forecasting_card, "budget": PresetBudget(Preset.EXACT)}
    first = service.submit(make_job("a", seeds=(1,), **fields))
    assert engine.stepping.wait(TIMEOUT_S)
    second = service.submit(make_job("b", seeds=(2,), **{**fields, "budget": PresetBudget(Preset.DRAFT)}))
    service.wait_until_taken("a", "b")
    engine.gate.set()
    first.result(TIMEOUT_S)
    state = second.result(TIMEOUT_S).state
    assert [sorted(batch) for batch in engine.batches] == [[1], [1, 2], [1, 2], *[[1]] * 5]
    assert (state.steps_done, state.num_steps) == (2, 2)
    (receipt,) = state.receipts
    assert (receipt.summary.num_steps_computed, receipt.summary.num_steps_forecast) == (2, 6)
    assert receipt.batch_size_mean == 2


@pytest.mark.parametrize(
    ("num_previews", "num_steps", "due"),
    [(0, 8, []), (3, 8, [2, 4, 6]), (3, 4, [1, 2, 3]), (3, 3, [1, 2]), (3, 2, [1]), (3, 1, [])],
)
def test_previews_are_spread_over_the_computed_steps(num_previews: int, num_steps: int, due: list[int]) -> None:
    assert preview_steps(num_previews, num_steps) == due


def test_backlog_follows_the_measured_pace(service: Any, engine: Any, make_job: MakeJob) -> None:
    # Given a job that was predicted to take 2 s, and takes some milliseconds
    service.submit(make_job("a")).result(TIMEOUT_S)
    pace = service.dispatcher.worker.pace
    wait_until(lambda: pace.ratio < 1.0)
    ratio = pace.ratio
    # Then the next one counts less, until it ends
    engine.gate.clear()
    waiting = service.submit(make_job("b"))
    assert service.run(service.dispatcher.backlog_s("drawn")) == pytest.approx(2.0 * ratio)
    # And what is cancelled before its first step proves nothing
    service.wait_until_taken("b")
    service.cancel("b")
    assert pace.ratio >= ratio
    engine.gate.set()
    waiting.result(TIMEOUT_S)


def test_batch_does_not_change_an_image(service: Any, make_job: MakeJob) -> None:
    alone = service.submit(make_job("a", seeds=(1,))).result(TIMEOUT_S)
    together = service.submit(make_job("b", seeds=(0, 1, 2))).result(TIMEOUT_S)
    assert together.artifacts[1] == alone.artifacts[0]


def test_batch_is_limited_and_the_rest_follows(start_service: StartService, engine: Any, make_job: MakeJob) -> None:
    service = start_service(Settings(max_batch_size=3))
    finished = service.submit(make_job("a", seeds=range(8))).result(TIMEOUT_S)
    assert len(finished.artifacts) == 8
    assert max(len(batch) for batch in engine.batches) == 3


def test_models_own_batch_limit_counts_too(service: Any, engine: Any, make_job: MakeJob) -> None:
    service.submit(make_job("a", seeds=range(8))).result(TIMEOUT_S)
    assert max(len(batch) for batch in engine.batches) == 4


def test_other_shapes_take_turns(service: Any, engine: Any, make_job: MakeJob) -> None:
    engine.gate.clear()
    waiting = [service.submit(make_job("a", seeds=(1,), num_inference_steps=20))]
    assert engine.stepping.wait(TIMEOUT_S)
    waiting += [service.submit(make_job("b", seeds=(2,), width=128)), service.submit(make_job("c", seeds=(3,)))]
    service.wait_until_taken("a", "b", "c")
    engine.gate.set()
    for finished in waiting:
        finished.result(TIMEOUT_S)
    wide_turns = [turn for turn, batch in enumerate(engine.batches) if batch == [2]]
    assert len(wide_turns) == 4
    # As two shapes of three images: the two that share steps get two for each of the other's.
    assert wide_turns[-1] < 13


def test_a_light_request_takes_steps_without_dense_ones(service: Any, engine: Any, make_job: MakeJob) -> None:
    engine.gate.clear()
    exact, draft = PresetBudget(Preset.EXACT), PresetBudget(Preset.DRAFT)
    waiting = [service.submit(make_job("dense", seeds=(1,), num_inference_steps=20, budget=exact))]
    assert engine.stepping.wait(TIMEOUT_S)
    waiting.append(service.submit(make_job("light", seeds=(2,), num_inference_steps=20, budget=draft)))
    service.wait_until_taken("dense", "light")
    engine.gate.set()
    for finished in waiting:
        finished.result(TIMEOUT_S)
    # It would end first with fair shares of the device, so all of its steps come after the one that ran.
    assert [turn for turn, batch in enumerate(engine.batches) if batch == [2]] == [*range(1, 21)]


def test_images_with_a_deadline_come_before_others_that_take_about_as_long(
    service: Any, engine: Any, make_job: MakeJob
) -> None:
    engine.gate.clear()
    exact = PresetBudget(Preset.EXACT)
    waiting = [service.submit(make_job("a", seeds=(1,), num_inference_steps=20, budget=exact))]
    assert engine.stepping.wait(TIMEOUT_S)
    urgent = make_job("b", seeds=(2,), width=128, num_inference_steps=12, budget=LatencyBudget(latency_s=1e12))
    waiting.append(service.submit(replace(urgent, deadline_at=1e12)))
    service.wait_until_taken("a", "b")
    engine.gate.set()
    for finished in waiting:
        finished.result(TIMEOUT_S)
    assert [turn for turn, batch in enumerate(engine.batches) if batch == [2]] == [*range(1, 13)]


@pytest.mark.parametrize(("left_s", "turns"), [(1e9, [*range(4, 44)]), (0.0, [*range(1, 41)])])
def test_one_that_would_miss_its_deadline_by_waiting_comes_before_lighter_ones(
    left_s: float, turns: list[int], service: Any, engine: Any, make_job: MakeJob
) -> None:
    engine.gate.clear()
    exact = PresetBudget(Preset.EXACT)
    waiting = [service.submit(make_job("light", seeds=(1,), num_inference_steps=4, budget=exact))]
    assert engine.stepping.wait(TIMEOUT_S)
    heavy = make_job("heavy", seeds=(2,), width=128, num_inference_steps=40, budget=LatencyBudget(1e9))
    waiting.append(service.submit(replace(heavy, deadline_at=time.time() + left_s)))
    service.wait_until_taken("light", "heavy")
    engine.gate.set()
    for finished in waiting:
        finished.result(TIMEOUT_S)
    assert [turn for turn, batch in enumerate(engine.batches) if batch == [2]] == turns


def test_beside_others_with_a_deadline_none_is_better_than_planned(
    service: Any, engine: Any, make_job: MakeJob
) -> None:
    def with_deadline(name: str, seed: int, num_steps: int) -> Job:
        job = make_job(name, seeds=(seed,), num_inference_steps=num_steps, budget=LatencyBudget(1e9))
        planned = replace(job.requests[0], point=engine.cards["drawn"].curve[-1])
        return replace(job, requests=(planned,), deadline_at=time.time() + 1e9)

    engine.gate.clear()
    waiting = [service.submit(with_deadline("a", 1, 8))]
    assert engine.stepping.wait(TIMEOUT_S)
    waiting.append(service.submit(with_deadline("b", 2, 4)))
    service.wait_until_taken("a", "b")
    engine.gate.set()
    for finished in waiting:
        finished.result(TIMEOUT_S)
    # The first one is exact in its first step, and after the other one has ended
    qualities = [move.quality for move in engine.moves]
    assert qualities[0] == qualities[-1] == 1.0
    assert qualities.count(0.6) >= 8
    assert len(qualities) == 12


@pytest.mark.parametrize(
    ("is_first_urgent", "taken", "left"), [(True, 7, ["u7"]), (False, 6, ["n6", "n7"])], ids=["urgent", "others"]
)
def test_urgent_requests_and_others_keep_places_for_each_other(
    is_first_urgent: bool,
    taken: int,
    left: list[str],
    start_service: StartService,
    engine: Any,
    make_job: MakeJob,
) -> None:
    service = start_service(Settings(max_batch_size=8, max_running=8))
    engine.gate.clear()

    def submit(name: str, *, is_urgent: bool) -> Any:
        seed, budget = int(name[1:]), LatencyBudget(1e9) if is_urgent else PresetBudget(Preset.BALANCED)
        job = make_job(name, seeds=(seed,), width=64 if seed % 2 else 128, budget=budget)
        return service.submit(replace(job, deadline_at=1e12) if is_urgent else job)

    letter = "u" if is_first_urgent else "n"
    waiting = [submit(f"{letter}{number}", is_urgent=is_first_urgent) for number in range(8)]
    service.wait_until_taken(*(f"{letter}{number}" for number in range(taken)))
    waiting.append(submit("x9", is_urgent=not is_first_urgent))
    service.wait_until_taken("x9")
    worker = service.dispatcher.worker
    assert {claim.job.id for claim in worker.held()}.isdisjoint(left)
    assert not worker.record("w", is_leaving=False).urgent_waits
    engine.gate.set()
    for finished in waiting:
        finished.result(TIMEOUT_S)


def test_urgent_requests_wait_for_others_where_places_are_few(start_service: StartService) -> None:
    service = start_service(Settings(max_running=7))
    assert service.dispatcher.worker.record("w", is_leaving=False).urgent_waits


def test_high_priority_starts_and_steps_before_all_others(
    start_service: StartService, engine: Any, make_job: MakeJob
) -> None:
    # Given as many others as there is room for
    service = start_service(Settings(max_batch_size=4, max_running=8))
    engine.gate.clear()
    shapes = [64, 64, 64, 64, 128, 128, 128, 128]
    waiting = [
        service.submit(make_job(str(seed), seeds=(seed,), width=width, num_inference_steps=10))
        for seed, width in enumerate(shapes)
    ]
    service.wait_until_taken(*"012345")
    assert engine.stepping.wait(TIMEOUT_S)
    # When one of high priority comes
    waiting.append(service.submit(make_job("high", seeds=(9,), num_inference_steps=10, priority=Priority.HIGH)))
    service.wait_until_taken("high")
    engine.gate.set()
    for finished in waiting:
        finished.result(TIMEOUT_S)
    # Then it waits for nothing but the step that was running
    turns = [turn for turn, batch in enumerate(engine.batches) if 9 in batch]
    assert turns == [*range(1, 11)]


def test_others_are_not_encoded_while_high_priority_runs(
    start_service: StartService, engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.cards, "drawn", replace(engine.cards["drawn"], encode_seconds=1e9))
    service = start_service(Settings())
    encoded_after: dict[int, int] = {}
    encode = engine.encode

    def recorded(request: Any, branches: Any) -> Any:
        encoded_after[request.seed] = len(engine.batches)
        return encode(request, branches)

    monkeypatch.setattr(engine, "encode", recorded)
    engine.gate.clear()
    waiting = [service.submit(make_job("other", seeds=(1,), width=128, num_inference_steps=5))]
    assert engine.stepping.wait(TIMEOUT_S)
    # Of a model whose encoding takes no time: else others would be owed time for it, and have it first
    high = make_job("high", card=engine.cards["guided"], seeds=(2,), num_inference_steps=10, priority=Priority.HIGH)
    waiting.append(service.submit(high))
    waiting.append(service.submit(make_job("late", seeds=(3,), num_inference_steps=5)))
    service.wait_until_taken("other", "high", "late", are_encoded=False)
    engine.gate.set()
    for finished in waiting:
        finished.result(TIMEOUT_S)
    assert encoded_after[3] > max(turn for turn, batch in enumerate(engine.batches) if 2 in batch)


def test_high_priority_overtakes_the_queue(start_service: StartService, engine: Any, make_job: MakeJob) -> None:
    service = start_service(Settings(max_batch_size=1))
    engine.gate.clear()
    waiting = [service.submit(make_job("running", seeds=(0,)))]
    assert engine.stepping.wait(TIMEOUT_S)
    for seed, priority in enumerate(("low", "normal", "high", "normal"), start=1):
        waiting.append(service.submit(make_job(priority + str(seed), seeds=(seed,), priority=Priority(priority))))
    engine.gate.set()
    for finished in waiting:
        finished.result(TIMEOUT_S)
    assert engine.started == [0, 3, 2, 4, 1]


def test_memory_limit_holds_back_other_shapes(start_service: StartService, engine: Any, make_job: MakeJob) -> None:
    service = start_service(Settings(max_running=1))
    engine.gate.clear()
    first = service.submit(make_job("a", seeds=(1,)))
    assert engine.stepping.wait(TIMEOUT_S)
    second = service.submit(make_job("b", seeds=(2,), width=128))
    engine.gate.set()
    first.result(TIMEOUT_S)
    second.result(TIMEOUT_S)
    assert engine.batches == [[1]] * 4 + [[2]] * 4


@pytest.mark.parametrize("stage", ["start", "step", "finish"])
def test_failure_hits_only_its_own_job_and_the_worker_goes_on(
    stage: str, service: Any, engine: Any, make_job: MakeJob
) -> None:
    engine.gate.clear()
    first = service.submit(make_job("first", seeds=(1,)))
    assert engine.stepping.wait(TIMEOUT_S)
    broken = service.submit(make_job("broken", seeds=(2, 3), prompt=f"break at {stage}"))
    companion = service.submit(make_job("companion", seeds=(4,)))
    service.wait_until_taken("first", "broken", "companion")
    engine.gate.set()
    failed = broken.result(TIMEOUT_S)
    assert failed.state.status is JobStatus.FAILED
    assert failed.state.failure is not None
    assert failed.state.failure.reason is FailureReason.GENERATION_FAILED
    assert "broken" in failed.state.failure.message
    assert "secret" not in failed.state.failure.message
    assert first.result(TIMEOUT_S).state.status is companion.result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED
    assert service.submit(make_job("next")).result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED


def test_engines_refusal_is_the_clients_fault(service: Any, make_job: MakeJob) -> None:
    failure = service.submit(make_job("a", prompt="refuse")).result(TIMEOUT_S).state.failure
    assert failure is not None
    assert failure.reason is FailureReason.INVALID_REQUEST
    assert failure.param == "prompt"


def test_image_that_cannot_be_encoded_fails_its_job(
    service: Any, engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "finish", lambda state: "no pixels")
    finished = service.submit(make_job("a", seeds=(1, 2))).result(TIMEOUT_S)
    assert finished.state.status is JobStatus.FAILED


def test_cancelled_running_job_leaves_at_the_next_step(service: Any, engine: Any, make_job: MakeJob) -> None:
    engine.gate.clear()
    unwanted = service.submit(make_job("a", seeds=(1,), num_inference_steps=50))
    assert engine.stepping.wait(TIMEOUT_S)
    service.cancel("a")
    assert unwanted.result(TIMEOUT_S).state.status is JobStatus.CANCELLED
    engine.gate.set()
    service.submit(make_job("b", seeds=(2,))).result(TIMEOUT_S)
    assert engine.batches == [[1]] + [[2]] * 4
    service.cancel("b")
    assert service.get("b").state.status is JobStatus.SUCCEEDED


def test_cancelled_queued_job_never_runs(start_service: StartService, engine: Any, make_job: MakeJob) -> None:
    service = start_service(Settings(max_batch_size=1))
    engine.gate.clear()
    first = service.submit(make_job("a", seeds=(1,)))
    assert engine.stepping.wait(TIMEOUT_S)
    service.submit(make_job("b", seeds=(2,)))
    service.cancel("b")
    engine.gate.set()
    first.result(TIMEOUT_S)
    service.drain()
    assert engine.started == [1]


def test_engine_that_cannot_be_loaded_fails_the_start(settings: Settings) -> None:
    def fail() -> "Engine":
        raise WeightsError("no model_index.json in nowhere")

    worker = build_dispatcher(settings, fail).worker
    with pytest.raises(WeightsError, match="nowhere"):
        worker.start()


@pytest.mark.parametrize("news", ["it stops", "the device is lost"])
def test_news_just_before_the_worker_looks_for_them_is_not_missed(
    news: str, engine: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = build_dispatcher(settings, lambda: cast("Engine", engine)).worker

    class Late(Event):
        def clear(self) -> None:
            if news == "it stops":
                worker._is_stopping = True
                self.set()
            else:
                worker._stop_without_device(DeviceLost("the device is lost"))
            super().clear()

    monkeypatch.setattr(worker, "_wake", Late())
    worker.start()
    worker._thread.join(TIMEOUT_S)
    assert not worker.is_alive
    assert worker.is_broken == (news != "it stops")
