import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.card import ImageCard
from models.curve import Preset
from models.report import BlockReport, GenerationSummary, StepReport
from models.request import Budget, ComputeBudget, LatencyBudget, PresetBudget, QualityBudget
from service.jobs.job import Job, JobSnapshot, JobState, JobStatus, Receipt, StageSeconds
from service.metrics import Metrics
from service.scheduling.fleet import Load, ModelLoad, WorkerState
from tests.fixtures.workers import worker

MakeJob = Callable[..., Job]
SUCCEEDED = JobState(JobStatus.SUCCEEDED, started_at=2.0, ended_at=5.0)


def samples(metrics: Metrics) -> dict[str, float]:
    """The value of each series, by its name and its label values in the order of the labels' names."""
    page = metrics.exposition({}).decode()
    return {
        " ".join((sample.name, *(value for _, value in sorted(sample.labels.items())))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def test_counters_of_loaded_models_begin_at_zero(metrics: Metrics, drawn_card: ImageCard) -> None:
    metrics.declare([drawn_card])
    values = samples(metrics)
    for name in (
        "elastic_block_decisions_total double.00 skip drawn",
        "elastic_block_decisions_total single.00 reuse drawn",
        "elastic_block_decisions_total single.00 forecast drawn",
        "elastic_steps_total computed drawn",
        "elastic_steps_total forecast drawn",
        "elastic_requests_total drawn cancelled",
        "elastic_requests_total drawn succeeded",
        "elastic_deadline_total drawn missed",
        "elastic_quality_degraded_total drawn",
    ):
        assert values[name] == 0.0
    assert "elastic_requests_total drawn running" not in values


def test_step_is_counted_by_block_and_decision(metrics: Metrics) -> None:
    block = BlockReport("double.00", 0.125, 2, 1, 0, (0.5, 1.0))
    report = StepReport(0.5, 0.25, 3, (block,), num_forecast=4, num_forecast_rows=5)
    for _ in range(2):
        metrics.observe_step("drawn", report)
    values = samples(metrics)
    assert values["elastic_block_decisions_total double.00 run drawn"] == 4.0
    assert values["elastic_block_decisions_total double.00 skip drawn"] == 2.0
    assert values["elastic_block_decisions_total double.00 reuse drawn"] == 0.0
    assert values["elastic_block_decisions_total double.00 forecast drawn"] == 10.0
    assert values["elastic_steps_total computed drawn"] == 6.0
    assert values["elastic_steps_total forecast drawn"] == 8.0
    assert values["elastic_block_latency_seconds_sum double.00 drawn"] == 0.25
    assert values["elastic_block_mlp_width_ratio_sum double.00 drawn"] == 3.0
    assert values["elastic_step_latency_seconds_sum drawn"] == 1.0
    assert values["elastic_router_latency_seconds_sum drawn"] == 0.5
    assert values["elastic_generation_batch_size_sum drawn"] == 6.0


def test_ended_job_is_counted_with_its_times(metrics: Metrics, make_job: MakeJob) -> None:
    job = replace(make_job("a"), created_at=1.0)
    metrics.observe_end(JobSnapshot(job, SUCCEEDED))
    values = samples(metrics)
    assert values["elastic_requests_total drawn succeeded"] == 1.0
    assert values["elastic_request_queue_time_seconds_sum drawn"] == 1.0
    assert values["elastic_e2e_request_latency_seconds_sum drawn quality"] == 4.0
    assert "elastic_quality_degraded_total drawn" not in values
    assert "elastic_deadline_total drawn met" not in values


def test_failed_job_has_no_latency(metrics: Metrics, make_job: MakeJob) -> None:
    job = replace(make_job("a"), deadline_at=1.0, is_degraded=True)
    metrics.observe_end(JobSnapshot(job, replace(SUCCEEDED, status=JobStatus.FAILED)))
    values = samples(metrics)
    assert values["elastic_requests_total drawn failed"] == 1.0
    assert not [name for name in values if name.startswith(("elastic_e2e", "elastic_deadline", "elastic_quality"))]


@pytest.mark.parametrize(("deadline_at", "outcome"), [(5.0, "met"), (4.9, "missed")])
def test_deadlines_are_met_or_missed(metrics: Metrics, make_job: MakeJob, deadline_at: float, outcome: str) -> None:
    metrics.observe_end(JobSnapshot(replace(make_job("a"), deadline_at=deadline_at), SUCCEEDED))
    counted = {name: value for name, value in samples(metrics).items() if name.startswith("elastic_deadline_total")}
    assert counted == {f"elastic_deadline_total drawn {outcome}": 1.0}


def test_lowered_quality_and_compute_are_counted(
    metrics: Metrics, make_job: MakeJob, summary: GenerationSummary
) -> None:
    measured = replace(summary, compute_ratio=0.5, compute_ratio_predicted=0.75)
    receipt = Receipt(measured, 0.9, StageSeconds(0.1, 0.2, 0.3, 0.4, 1.0), 2.5)
    state = replace(SUCCEEDED, receipts=(receipt, receipt))
    metrics.observe_end(JobSnapshot(replace(make_job("a"), is_degraded=True), state))
    values = samples(metrics)
    assert values["elastic_quality_degraded_total drawn"] == 1.0
    assert values["elastic_compute_ratio_sum drawn"] == 1.0
    assert values["elastic_predicted_compute_ratio_error_sum drawn"] == 0.5


@pytest.mark.parametrize(
    ("budget", "label"),
    [
        (PresetBudget(Preset.FAST), "fast"),
        (QualityBudget(0.5), "quality"),
        (ComputeBudget(0.5), "compute_ratio"),
        (LatencyBudget(1.0), "latency"),
    ],
)
def test_latency_is_labelled_by_a_closed_set_of_budgets(
    metrics: Metrics, make_job: MakeJob, budget: object, label: str
) -> None:
    metrics.observe_end(JobSnapshot(make_job("a", budget=budget), SUCCEEDED))
    assert samples(metrics)[f"elastic_e2e_request_latency_seconds_count drawn {label}"] == 1.0


@pytest.mark.parametrize(
    ("rule", "counts", "decisions"),
    [
        ("forecast", (8, 0, 0, 4), "varied"),
        ("forecast", (8, 0, 0, 0), "run"),  # no step was forecast
        ("dense", (8, 0, 0, 0), "run"),  # what a model without a curve makes of every budget
        ("forecast+router", (5, 2, 1, 4), "varied"),
        ("forecast+router", (8, 0, 0, 4), "run"),
        ("router", (0, 8, 0, 0), "skip"),
        ("router", (0, 0, 8, 0), "reuse"),
    ],
)
def test_results_of_saving_budgets_are_counted_by_their_only_decision(
    rule: str,
    counts: tuple[int, int, int, int],
    decisions: str,
    metrics: Metrics,
    make_job: MakeJob,
    summary: GenerationSummary,
) -> None:
    num_run, num_skipped, num_reused, num_forecast = counts
    made = replace(
        summary,
        rule=rule,
        num_run=num_run,
        num_skipped=num_skipped,
        num_reused=num_reused,
        num_forecast=num_forecast,
    )
    state = replace(SUCCEEDED, receipts=(Receipt(made, 0.9, StageSeconds(0.1, 0.2, 0.3, 0.4, 1.0), 2.5),))
    saving: list[Budget] = [PresetBudget(Preset.HIGH), QualityBudget(0.9), ComputeBudget(0.5)]
    # These may well be exact.
    others: list[Budget] = [PresetBudget(Preset.EXACT), QualityBudget(1.0), ComputeBudget(1.0), LatencyBudget(9.0)]
    for budget in (*saving, *others):
        metrics.observe_end(JobSnapshot(make_job("a", budget=budget), state))
    counted = {name: value for name, value in samples(metrics).items() if "elastic_saving_results_total" in name}
    assert counted == {f"elastic_saving_results_total {decisions} drawn": 3.0}


def test_queue_and_workers_are_described_by_model(metrics: Metrics) -> None:
    load = Load({"drawn": ModelLoad(3, 2, queued_s=30.0, running_s=0.5), "lost": ModelLoad(1, 0, queued_s=4.0)})
    workers = [
        worker("drawn", pace=2.0, state=WorkerState.BUSY),
        worker("drawn", "ball", pace=1.0),
        worker("drawn", pace=9.0, state=WorkerState.DRAINING),
    ]
    metrics.observe_queue(load, workers, target_backlog_s=10.0)
    values = samples(metrics)
    assert values["elastic_requests_waiting drawn"] == 3.0
    assert values["elastic_backlog_seconds drawn"] == (30.0 + 2.0) * 1.5  # each running job counts as a second
    assert values["elastic_wanted_workers drawn"] == 5.0
    assert values["elastic_worker_pace_ratio drawn"] == 1.5
    states = ("idle", "busy", "draining")
    assert [values[f"elastic_workers drawn {state}"] for state in states] == [1.0, 1.0, 1.0]
    # A model without jobs, and one without workers.
    assert (values["elastic_backlog_seconds ball"], values["elastic_wanted_workers ball"]) == (0.0, 0.0)
    assert (values["elastic_backlog_seconds lost"], values["elastic_wanted_workers lost"]) == (4.0, 1.0)
    assert [values[f"elastic_workers lost {state}"] for state in states] == [0.0, 0.0, 0.0]
    assert math.isnan(values["elastic_worker_pace_ratio lost"])


def test_a_model_that_is_gone_has_zeros(metrics: Metrics) -> None:
    metrics.observe_queue(Load({"drawn": ModelLoad(1, queued_s=9.0)}), [worker("drawn")], target_backlog_s=10.0)
    metrics.observe_queue(Load(), [], target_backlog_s=10.0)
    values = samples(metrics)
    for name in ("requests_waiting drawn", "backlog_seconds drawn", "wanted_workers drawn", "workers drawn idle"):
        assert values[f"elastic_{name}"] == 0.0


def test_busy_workers_are_wanted_even_if_little_is_left(metrics: Metrics) -> None:
    busy = [worker("drawn", state=WorkerState.BUSY)] * 3
    metrics.observe_queue(Load({"drawn": ModelLoad(num_running=3)}), busy, target_backlog_s=10.0)
    assert samples(metrics)["elastic_wanted_workers drawn"] == 3.0


def test_gauges_and_single_counters_have_the_last_and_the_whole(metrics: Metrics) -> None:
    for models in (["drawn", "drawn"], ["drawn", "ball"], []):
        metrics.observe_groups(["drawn", "ball"], models)
        metrics.observe_memory({"allocated": len(models)})
        metrics.observe_recovery(len(models))
    metrics.observe_store_error("claim")
    metrics.observe_rejection("", "invalid_json")
    values = samples(metrics)
    assert (values["elastic_batch_groups drawn"], values["elastic_batch_groups ball"]) == (0.0, 0.0)
    assert values["elastic_gpu_memory_bytes allocated"] == 0.0
    assert values["elastic_jobs_recovered_total"] == 4.0
    assert values["elastic_store_errors_total claim"] == 1.0
    assert values["elastic_requests_rejected_total invalid_json "] == 1.0
