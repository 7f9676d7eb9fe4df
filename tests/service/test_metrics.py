from collections.abc import Callable
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.card import ImageCard
from models.curve import Preset
from models.report import BlockReport, GenerationSummary, StepReport
from models.request import ComputeBudget, LatencyBudget, PresetBudget, QualityBudget
from service.jobs.job import Job, JobSnapshot, JobState, JobStatus, Receipt, StageSeconds
from service.metrics import Metrics

MakeJob = Callable[..., Job]
SUCCEEDED = JobState(JobStatus.SUCCEEDED, started_at=2.0, ended_at=5.0)


def samples(metrics: Metrics) -> dict[str, float]:
    """The value of each series, by its name and its label values in the order of the labels' names."""
    page = metrics.exposition(["drawn"], {}, {}).decode()
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


def test_queue_keeps_its_last_length_while_the_store_is_away(metrics: Metrics) -> None:
    metrics.exposition(["drawn"], {"drawn": 1}, {"drawn": 7})
    page = metrics.exposition(["drawn"], {"drawn": 2}, None).decode()
    assert 'elastic_requests_waiting{model="drawn"} 7.0' in page
    assert 'elastic_requests_running{model="drawn"} 2.0' in page


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
