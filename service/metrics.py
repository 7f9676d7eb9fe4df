"""Every Prometheus series of the service, declared together. Labels come from closed sets only."""

import math
from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from models.card import ModelCard
from models.curve import EXACT, FORECAST, Preset
from models.report import Decision, GenerationSummary, StepReport
from models.request import Budget, ComputeBudget, LatencyBudget, PresetBudget, QualityBudget
from service.jobs.job import JobSnapshot, JobStatus
from service.scheduling.fleet import Load, WorkerRecord, WorkerState
from service.scheduling.waiting import backlog_s, pace_of, wanted_workers

Metric = TypeVar("Metric", Counter, Gauge, Histogram)


@dataclass(frozen=True, slots=True)
class Series(Generic[Metric]):
    """A declared series, with the names of its labels; `buckets` are the upper bounds of a histogram."""

    kind: type[Metric]
    name: str
    text: str
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] | None = None

    def create(self, registry: CollectorRegistry) -> Metric:
        options: dict[str, Any] = {} if self.buckets is None else {"buckets": self.buckets}
        return self.kind(self.name, self.text, self.labels, registry=registry, **options)


_BLOCK_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TENTHS = tuple(tenth / 10 for tenth in range(1, 11))
_RATIO_ERRORS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_DEADLINE_OUTCOMES = _MET, _MISSED = ("met", "missed")
_LOOKUPS = _HIT, _MISS = ("hit", "miss")
_STEP_DECISIONS = _COMPUTED, _FORECAST = ("computed", "forecast")
_LESS_THAN_EXACT = 0.95
_VARIED = "varied"
_RESULT_DECISIONS = (_VARIED, Decision.RUN, Decision.SKIP, Decision.REUSE)

# A "request" is one API call, whatever its number of artifacts.
BLOCK_DECISIONS = Series(
    Counter,
    "elastic_block_decisions_total",
    "Rows of a batch that a block ran, skipped, reused or left to forecasts.",
    ("model", "block", "decision"),
)
STEPS = Series(
    Counter, "elastic_steps_total", "Denoise steps of artifacts: computed or forecast.", ("model", "decision")
)
BLOCK_LATENCY = Series(
    Histogram,
    "elastic_block_latency_seconds",
    "Time of one block in one step of a batch.",
    ("model", "block"),
    _BLOCK_SECONDS,
)
MLP_WIDTH = Series(
    Histogram,
    "elastic_block_mlp_width_ratio",
    "MLP width of the rows that a block ran.",
    ("model", "block"),
    _TENTHS,
)
ROUTER_LATENCY = Series(
    Histogram,
    "elastic_router_latency_seconds",
    "Time of all routers in one step of a batch.",
    buckets=_BLOCK_SECONDS,
)
STEP_LATENCY = Series(
    Histogram, "elastic_step_latency_seconds", "Time of one computed step of a batch.", buckets=_STEP_SECONDS
)
COMPILED = Series(
    Counter,
    "elastic_compiled_graphs_total",
    "Graphs that steps have compiled, by kind of block; those compiled before the server was ready do not count.",
    ("model", "kind"),
)
STAGE_LATENCY = Series(
    Histogram,
    "elastic_stage_latency_seconds",
    "Time of an artifact's stages: encode (prompt), denoise, decode (latents), output (the file).",
    ("model", "stage"),
    _REQUEST_SECONDS,
)
BATCH_SIZE = Series(
    Histogram, "elastic_generation_batch_size", "Artifacts that shared a computed step.", buckets=_BATCH_SIZES
)
COMPUTE_RATIO = Series(
    Histogram, "elastic_compute_ratio", "Share of the dense block compute that an artifact took.", buckets=_TENTHS
)
COMPUTE_RATIO_ERROR = Series(
    Histogram,
    "elastic_predicted_compute_ratio_error",
    "Distance of an artifact's compute ratio from the calibrated one.",
    buckets=_RATIO_ERRORS,
)
SAVING_RESULTS = Series(
    Counter,
    "elastic_saving_results_total",
    "Artifacts whose budget asks for clearly less than exact: varied, or the one decision that all blocks had in all "
    "steps; if routers decide, in all computed steps.",
    ("model", "decisions"),
)
PROMPTS = Series(
    Counter,
    "elastic_prompts_total",
    "Prompts that were looked up in the cache of embedded prompts: hit, or miss, which are encoded.",
    ("model", "outcome"),
)
RUNNING = Series(Gauge, "elastic_requests_running", "Requests that this worker has claimed.")
WAITING = Series(Gauge, "elastic_requests_waiting", "Requests in the queue, which servers may share.")
BACKLOG = Series(
    Gauge,
    "elastic_backlog_seconds",
    "Predicted seconds of work in all queued and running jobs, for one worker; a running job counts as 1 s at least.",
)
WORKERS = Series(Gauge, "elastic_workers", "Living workers that have the model, by state.", ("model", "state"))
WANTED_WORKERS = Series(
    Gauge,
    "elastic_wanted_workers",
    "Workers that finish the backlog within target_backlog_s; never fewer than those that are busy.",
)
PACE = Series(
    Gauge,
    "elastic_worker_pace_ratio",
    "Measured seconds for each predicted one: the mean over the model's workers, NaN without any.",
)
QUEUE_TIME = Series(
    Histogram,
    "elastic_request_queue_time_seconds",
    "From a request's arrival until it was claimed.",
    buckets=_REQUEST_SECONDS,
)
E2E_LATENCY = Series(
    Histogram,
    "elastic_e2e_request_latency_seconds",
    "From a request's arrival to its result; preset is quality, compute_ratio or latency for such budgets.",
    ("model", "preset"),
    _REQUEST_SECONDS,
)
REQUESTS = Series(Counter, "elastic_requests_total", "Requests that ended, by status.", ("model", "status"))
BATCH_GROUPS = Series(
    Gauge, "elastic_batch_groups", "Groups in which running requests step: of one shape and similar sparsity."
)
RECOVERED = Series(Counter, "elastic_jobs_recovered_total", "Jobs queued again after their worker died.", ())
STORE_ERRORS = Series(Counter, "elastic_store_errors_total", "Operations of the job store that failed.", ("operation",))
GPU_MEMORY = Series(Gauge, "elastic_gpu_memory_bytes", "Memory of the GPU, by kind.", ("kind",))
DEADLINES = Series(
    Counter,
    "elastic_deadline_total",
    "Requests with a deadline that succeeded, by outcome: met or missed.",
    ("model", "outcome"),
)
DEGRADED = Series(
    Counter, "elastic_quality_degraded_total", "Requests whose quality was lowered under load, as their budget allows."
)
REJECTED = Series(
    Counter,
    "elastic_requests_rejected_total",
    "Requests refused before any work; model is empty if unknown.",
    ("model", "code"),
)

ALL_SERIES: tuple[Series[Any], ...] = (
    *(BLOCK_DECISIONS, STEPS, BLOCK_LATENCY, MLP_WIDTH, ROUTER_LATENCY, STEP_LATENCY, STAGE_LATENCY, BATCH_SIZE),
    *(COMPUTE_RATIO, COMPUTE_RATIO_ERROR, RUNNING, WAITING, QUEUE_TIME, E2E_LATENCY, REQUESTS, BATCH_GROUPS),
    *(RECOVERED, STORE_ERRORS, GPU_MEMORY, DEADLINES, DEGRADED, REJECTED, PROMPTS, COMPILED),
    *(SAVING_RESULTS, BACKLOG, WORKERS, WANTED_WORKERS, PACE),
)


class Metrics:
    """All series in a registry of their own, and the only place that writes them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._metrics = {series.name: series.create(self._registry) for series in ALL_SERIES}
        self._models: set[str] = set()

    def declare(self, cards: Iterable[ModelCard]) -> None:
        """Create the models' counters at 0: a rate in Prometheus does not count the first value of a series."""
        for card in cards:
            self._models.add(card.id)
            for block in card.blocks:
                for decision in Decision:
                    self._of(BLOCK_DECISIONS, card.id, block, decision)
            for step_decision in _STEP_DECISIONS:
                self._of(STEPS, card.id, step_decision)
            for status in JobStatus:
                if status.is_terminal:
                    self._of(REQUESTS, card.id, status)
            for decisions in _RESULT_DECISIONS:
                self._of(SAVING_RESULTS, card.id, decisions)
            for outcome in _LOOKUPS:
                self._of(PROMPTS, card.id, outcome)
            for outcome in _DEADLINE_OUTCOMES:
                self._of(DEADLINES, card.id, outcome)
            self._of(DEGRADED, card.id)

    def observe_step(self, model: str, report: StepReport) -> None:
        self._of(STEP_LATENCY, model).observe(report.seconds)
        self._of(ROUTER_LATENCY, model).observe(report.router_seconds)
        self._of(BATCH_SIZE, model).observe(report.batch_size)
        self._of(STEPS, model, _COMPUTED).inc(report.batch_size)
        self._of(STEPS, model, _FORECAST).inc(report.num_forecast)
        for kind in report.compiled:
            self._of(COMPILED, model, kind).inc()
        for block in report.blocks:
            self._of(BLOCK_DECISIONS, model, block.block, Decision.RUN).inc(block.num_run)
            self._of(BLOCK_DECISIONS, model, block.block, Decision.SKIP).inc(block.num_skipped)
            self._of(BLOCK_DECISIONS, model, block.block, Decision.REUSE).inc(block.num_reused)
            self._of(BLOCK_DECISIONS, model, block.block, Decision.FORECAST).inc(report.num_forecast_rows)
            self._of(BLOCK_LATENCY, model, block.block).observe(block.seconds)
            for mlp_width in block.mlp_widths:
                self._of(MLP_WIDTH, model, block.block).observe(mlp_width)

    def observe_stage(self, model: str, stage: str, seconds: float) -> None:
        self._of(STAGE_LATENCY, model, stage).observe(seconds)

    def observe_prompts(self, model: str, were_cached: Iterable[bool]) -> None:
        for was_cached in were_cached:
            self._of(PROMPTS, model, _HIT if was_cached else _MISS).inc()

    def observe_end(self, snapshot: JobSnapshot) -> None:
        job, state = snapshot.job, snapshot.state
        self._of(REQUESTS, job.model, state.status).inc()
        if state.started_at is not None:
            self._of(QUEUE_TIME, job.model).observe(state.started_at - job.created_at)
        if state.status is JobStatus.SUCCEEDED and state.ended_at is not None:
            preset = _preset_label(job.requests[0].budget)
            self._of(E2E_LATENCY, job.model, preset).observe(state.ended_at - job.created_at)
            if job.deadline_at is not None:
                self._of(DEADLINES, job.model, _MET if state.ended_at <= job.deadline_at else _MISSED).inc()
            if job.is_degraded:
                self._of(DEGRADED, job.model).inc()
        for receipt in state.receipts:
            measured, predicted = receipt.summary.compute_ratio, receipt.summary.compute_ratio_predicted
            self._of(COMPUTE_RATIO, job.model).observe(measured)
            self._of(COMPUTE_RATIO_ERROR, job.model).observe(abs(measured - predicted))
            if _asks_to_save(job.requests[0].budget):
                self._of(SAVING_RESULTS, job.model, _decisions_of(receipt.summary)).inc()

    def observe_groups(self, models: Iterable[str], groups: Iterable[str]) -> None:
        """`models` are all loaded models, `groups` the model of each group."""
        counts = Tally(groups)
        for model in models:
            self._of(BATCH_GROUPS, model).set(counts[model])

    def observe_memory(self, bytes_by_kind: Mapping[str, int]) -> None:
        for kind, size_bytes in bytes_by_kind.items():
            self._of(GPU_MEMORY, kind).set(size_bytes)

    def observe_recovery(self, count: int) -> None:
        self._of(RECOVERED).inc(count)

    def observe_store_error(self, operation: str) -> None:
        self._of(STORE_ERRORS, operation).inc()

    def observe_rejection(self, model: str, code: str) -> None:
        self._of(REJECTED, model, code).inc()

    def observe_queue(self, load: Load, workers: Sequence[WorkerRecord], *, target_backlog_s: float) -> None:
        """The shared queue and its workers, which all servers describe alike. Models that are gone get zeros."""
        self._models.update(load.models, *(worker.cards for worker in workers))
        for model in self._models:
            states = Tally(worker.state for worker in workers if model in worker.cards)
            for state in WorkerState:
                self._of(WORKERS, model, state).set(states[state])
            pace, wanted = pace_of(model, workers), wanted_workers(model, load, workers, target_backlog_s)
            self._of(WAITING, model).set(load.of(model).num_queued)
            self._of(BACKLOG, model).set(backlog_s(model, load, workers))
            self._of(WANTED_WORKERS, model).set(wanted)
            self._of(PACE, model).set(math.nan if pace is None else pace)

    def exposition(self, running: Mapping[str, int]) -> bytes:
        """The page for Prometheus. `running` counts this worker's requests by model."""
        for model in self._models:
            self._of(RUNNING, model).set(running.get(model, 0))
        return generate_latest(self._registry)

    def _of(self, series: Series[Metric], *labels: str) -> Metric:
        """The child of `series` with these values of its labels."""
        metric = cast(Metric, self._metrics[series.name])
        return metric.labels(*labels) if labels else metric


def _preset_label(budget: Budget) -> str:
    match budget:
        case PresetBudget(preset):
            return preset
        case QualityBudget():
            return "quality"
        case ComputeBudget():
            return "compute_ratio"
        case LatencyBudget():
            return "latency"


def _asks_to_save(budget: Budget) -> bool:
    """Whether a budget asks for clearly less than exact. A deadline does not: there may be time enough."""
    match budget:
        case PresetBudget(preset):
            return preset is not Preset.EXACT
        case QualityBudget(quality):
            return quality <= _LESS_THAN_EXACT
        case ComputeBudget(compute_ratio):
            return compute_ratio <= _LESS_THAN_EXACT
        case LatencyBudget():
            return False


def _decisions_of(summary: GenerationSummary) -> str:
    """The one decision that a result's blocks had, or that they were varied."""
    counts = {
        Decision.RUN: summary.num_run,
        Decision.SKIP: summary.num_skipped,
        Decision.REUSE: summary.num_reused,
    }
    if summary.rule in (EXACT.rule, FORECAST):  # the budget decides about steps alone
        counts[Decision.FORECAST] = summary.num_forecast
    made = [decision for decision, count in counts.items() if count]
    return made[0] if len(made) == 1 else _VARIED
