"""Every Prometheus series of the service, declared together. Labels come from closed sets only."""

from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from models.card import ModelCard
from models.report import Decision, StepReport
from models.request import Budget, ComputeBudget, LatencyBudget, PresetBudget, QualityBudget
from service.jobs.job import JobSnapshot, JobStatus

_BLOCK_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TENTHS = tuple(tenth / 10 for tenth in range(1, 11))
_RATIO_ERRORS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_OUTCOMES = ("met", "missed")
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """The series in a registry of their own. A "request" is one API call, whatever its number of pictures."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._block_decisions = self._counter(
            "elastic_block_decisions_total",
            "Rows of a batch that a block ran, skipped or re-used.",
            "block",
            "decision",
        )
        self._block_latency = self._histogram(
            "elastic_block_latency_seconds", "Time of one block in one step of a batch.", _BLOCK_SECONDS, "block"
        )
        self._mlp_width = self._histogram(
            "elastic_block_mlp_width_ratio", "MLP width of the rows that a block ran.", _TENTHS, "block"
        )
        self._router_latency = self._histogram(
            "elastic_router_latency_seconds", "Time of all routers in one step of a batch.", _BLOCK_SECONDS
        )
        self._step_latency = self._histogram(
            "elastic_step_latency_seconds", "Time of one denoise step of a batch.", _STEP_SECONDS
        )
        self._stage_latency = self._histogram(
            "elastic_stage_latency_seconds",
            "Time of a picture's stages: encode (prompt), denoise, decode (latents), output (the file).",
            _REQUEST_SECONDS,
            "stage",
        )
        self._batch_size = self._histogram(
            "elastic_generation_batch_size", "Pictures that shared a denoise step.", _BATCH_SIZES
        )
        self._compute_ratio = self._histogram(
            "elastic_compute_ratio", "Share of the dense block compute that a picture took.", _TENTHS
        )
        self._compute_ratio_error = self._histogram(
            "elastic_predicted_compute_ratio_error",
            "Distance of a picture's compute ratio from the calibration's.",
            _RATIO_ERRORS,
        )
        self._running = self._gauge("elastic_requests_running", "Requests that this worker has claimed.")
        self._waiting = self._gauge("elastic_requests_waiting", "Requests in the queue, which servers may share.")
        self._queue_time = self._histogram(
            "elastic_request_queue_time_seconds", "From a request's arrival until it was claimed.", _REQUEST_SECONDS
        )
        self._e2e_latency = self._histogram(
            "elastic_e2e_request_latency_seconds",
            "From a request's arrival to its result; preset is quality, compute_ratio or latency for such budgets.",
            _REQUEST_SECONDS,
            "preset",
        )
        self._requests = self._counter("elastic_requests_total", "Requests that ended, by status.", "status")
        self._batch_groups = self._gauge(
            "elastic_batch_groups",
            "Groups that running pictures step in: of one shape, and alike in sparsity.",
        )
        self._recovered = Counter(
            "elastic_jobs_recovered_total", "Jobs queued again after their worker died.", registry=self._registry
        )
        self._store_errors = Counter(
            "elastic_store_errors_total",
            "Operations of the job store that failed.",
            ("operation",),
            registry=self._registry,
        )
        self._gpu_memory = Gauge(
            "elastic_gpu_memory_bytes", "Memory of the GPU, by kind.", ("kind",), registry=self._registry
        )
        self._deadlines = self._counter(
            "elastic_deadline_total", "Requests with a deadline that succeeded, by outcome: met or missed.", "outcome"
        )
        self._degraded = self._counter(
            "elastic_quality_degraded_total", "Requests whose quality load lowered, within what they allowed."
        )
        self._rejected = self._counter(
            "elastic_requests_rejected_total", "Requests refused before any work; model is empty if unknown.", "code"
        )

    def declare(self, cards: Iterable[ModelCard]) -> None:
        """Begin the models' counters at 0: Prometheus' rates miss what a series begins with."""
        for card in cards:
            for block in card.blocks:
                for decision in Decision:
                    self._block_decisions.labels(card.id, block, decision)
            for status in JobStatus:
                if status.is_terminal:
                    self._requests.labels(card.id, status)
            for outcome in _OUTCOMES:
                self._deadlines.labels(card.id, outcome)
            self._degraded.labels(card.id)

    def observe_step(self, model: str, report: StepReport) -> None:
        self._step_latency.labels(model).observe(report.seconds)
        self._router_latency.labels(model).observe(report.router_seconds)
        self._batch_size.labels(model).observe(report.batch_size)
        for block in report.blocks:
            self._block_decisions.labels(model, block.block, Decision.RUN).inc(block.num_run)
            self._block_decisions.labels(model, block.block, Decision.SKIP).inc(block.num_skipped)
            self._block_decisions.labels(model, block.block, Decision.REUSE).inc(block.num_reused)
            self._block_latency.labels(model, block.block).observe(block.seconds)
            for mlp_width in block.mlp_widths:
                self._mlp_width.labels(model, block.block).observe(mlp_width)

    def observe_stage(self, model: str, stage: str, seconds: float) -> None:
        self._stage_latency.labels(model, stage).observe(seconds)

    def observe_end(self, snapshot: JobSnapshot) -> None:
        job, state = snapshot.job, snapshot.state
        self._requests.labels(job.model, state.status).inc()
        if state.started_at is not None:
            self._queue_time.labels(job.model).observe(state.started_at - job.created_at)
        if state.status is JobStatus.SUCCEEDED and state.ended_at is not None:
            preset = _preset_label(job.requests[0].budget)
            self._e2e_latency.labels(job.model, preset).observe(state.ended_at - job.created_at)
            if job.deadline_at is not None:
                met, missed = _OUTCOMES
                self._deadlines.labels(job.model, met if state.ended_at <= job.deadline_at else missed).inc()
            if job.is_degraded:
                self._degraded.labels(job.model).inc()
        for receipt in state.receipts:
            measured, predicted = receipt.summary.compute_ratio, receipt.summary.compute_ratio_predicted
            self._compute_ratio.labels(job.model).observe(measured)
            self._compute_ratio_error.labels(job.model).observe(abs(measured - predicted))

    def observe_groups(self, models: Iterable[str], groups: Iterable[str]) -> None:
        """`groups` has the model of each."""
        counts = Tally(groups)
        for model in models:
            self._batch_groups.labels(model).set(counts[model])

    def observe_memory(self, bytes_by_kind: Mapping[str, int]) -> None:
        for kind, size_bytes in bytes_by_kind.items():
            self._gpu_memory.labels(kind).set(size_bytes)

    def observe_recovery(self, count: int) -> None:
        self._recovered.inc(count)

    def observe_store_error(self, operation: str) -> None:
        self._store_errors.labels(operation).inc()

    def observe_rejection(self, model: str, code: str) -> None:
        self._rejected.labels(model, code).inc()

    def exposition(self, models: Iterable[str], running: Mapping[str, int], waiting: Mapping[str, int] | None) -> bytes:
        """The page for Prometheus, with the numbers of requests by model as of now; None if they can't be had."""
        for model in models:
            self._running.labels(model).set(running.get(model, 0))
            if waiting is not None:
                self._waiting.labels(model).set(waiting.get(model, 0))
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("model", *labels), registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("model",), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, ("model", *labels), buckets=buckets, registry=self._registry)


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
