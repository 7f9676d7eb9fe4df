"""All state of one request while it is denoised. When it is dropped, nothing of the request is left."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from torch import Tensor

from models.budget import point_of_compute
from models.curve import CurvePoint
from models.elastic.plan import Policy
from models.elastic.row import Allowance, Row
from models.report import Decision, GenerationSummary
from models.request import GenerationRequest
from models.rules import RULES


@dataclass(frozen=True, slots=True)
class BranchInputs:
    """The inputs of one guidance branch, equal at every step.

    `context` `(1, tokens, channels)` is the embedded prompt, already in the transformer's width, or the embedded image.
    Some families add `pooled` and `guidance` to the time embedding.
    """

    context: Tensor
    pooled: Tensor | None = None
    guidance: Tensor | None = None

    @property
    def num_text_tokens(self) -> int:
        return self.context.shape[1]


@dataclass(slots=True)
class DenoiseState:
    """One request between its noise and its result.

    `latents` is `(1, tokens, channels)`; `sigmas` `(steps + 1,)` and `timesteps` `(steps,)` are float32 on the CPU.
    `rows` and `inputs` have one entry per guidance branch, the conditional branch first. `dense_flops` is the block
    compute of one dense step of all branches. `compute_cap`, if there is one, is the share of the dense compute that
    the whole generation may use. `thresholds` and `points` have one entry per step taken. `run_rates` has one entry per
    block: a running mean of the rows that ran there, in which the last step weighs a third. `prediction` is the
    clean-sample estimate from the last velocity.
    """

    request: GenerationRequest
    batch_key: Hashable
    latents: Tensor
    sigmas: Tensor
    timesteps: Tensor
    rows: list[Row]
    inputs: list[BranchInputs]
    curve: Sequence[CurvePoint]
    point: CurvePoint
    dense_flops: float
    compute_cap: float | None
    thresholds: list[float] = field(default_factory=list)
    points: list[CurvePoint] = field(default_factory=list)
    run_rates: list[float] = field(default_factory=list)
    step_index: int = 0
    prediction: Tensor | None = None

    @property
    def num_steps(self) -> int:
        """Steps to take. Steps of no length in a model's schedule are left out."""
        return len(self.timesteps)

    @property
    def is_done(self) -> bool:
        return self.step_index == self.num_steps

    @property
    def spent_flops(self) -> float:
        return sum(row.spent_flops for row in self.rows)

    @property
    def compute_ratio(self) -> float:
        """Block compute so far over the dense block compute of the steps taken."""
        return self.spent_flops / (max(self.step_index, 1) * self.dense_flops)

    @property
    def expected_runs(self) -> list[float]:
        """The expected number of rows that each block runs in the next step.

        The first step is expected to follow the curve's mean; later steps follow this request's own decisions.
        """
        if self.point.is_exact:
            share = 1.0
        elif self.run_rates:
            return self.run_rates
        else:
            share = self.point.compute_ratio if self.compute_cap is None else self.compute_cap
        return [len(self.rows) * share] * len(self.rows[0].costs)

    def move_to(self, point: CurvePoint) -> None:
        """Take the next steps at another point of the curve."""
        self.point = point
        for row in self.rows:
            row.rule = RULES[point.rule]

    def prepare_step(self) -> None:
        """Set this step's policy and allowance.

        A request may be lighter or heavier than the calibration's mean, so under a compute budget the point is chosen
        again at every step from the compute that is left. A step's allowance leaves enough for the cheapest calibrated
        point in all later steps; otherwise the cap could be met by dropping the last steps.
        """
        policy: Policy = self.point.policy
        allowance = Allowance()
        if self.compute_cap is not None and not self.point.is_exact:
            steps_left = self.num_steps - self.step_index
            left = self.compute_cap * self.num_steps * self.dense_flops - self.spent_flops
            even_share = left / steps_left
            elastic = [point for point in self.curve if point.rule == self.point.rule]
            policy = point_of_compute(even_share / self.dense_flops, elastic).policy
            cheapest = self.curve[-1].compute_ratio * self.dense_flops
            unavoidable = sum(cost.always for row in self.rows for cost in row.costs.values())
            # Rounding must not turn the last block that the cap pays for into a skip.
            allowance.flops = max(even_share, left - (steps_left - 1) * cheapest) * (1 + 1e-9) - unavoidable
        for row in self.rows:
            row.begin_step(self.step_index, policy, allowance)

    def complete_step(self, latents: Tensor, prediction: Tensor) -> None:
        """Apply the changes of a step. A step that failed before this call has changed nothing and can be repeated."""
        self.thresholds.append(self.rows[0].policy.skip_threshold)
        self.points.append(self.point)
        of_blocks = zip(*(row.journal.trace for row in self.rows), strict=True)
        runs = [sum(entry.decision is Decision.RUN for entry in entries) for entries in of_blocks]
        expected = self.expected_runs
        self.run_rates = [rate + (ran - rate) / 3 for rate, ran in zip(expected, runs, strict=True)]
        for row in self.rows:
            row.end_step()
        self.latents = latents
        self.prediction = prediction
        self.step_index += 1

    def summary(self) -> GenerationSummary:
        """The account of the steps taken so far."""
        trace = [entry for row in self.rows for entry in row.trace]
        counts = Counter(entry.decision for entry in trace)
        widths = [entry.mlp_width for entry in trace if entry.decision is Decision.RUN]
        return GenerationSummary(
            rule=self.point.rule,
            skip_threshold_first=self.thresholds[0] if self.thresholds else self.point.policy.skip_threshold,
            skip_threshold_last=self.thresholds[-1] if self.thresholds else self.point.policy.skip_threshold,
            quality_applied=fmean(point.quality for point in self.points or [self.point]),
            compute_ratio=self.compute_ratio,
            compute_ratio_predicted=fmean(point.compute_ratio for point in self.points or [self.point]),
            num_run=counts[Decision.RUN],
            num_skipped=counts[Decision.SKIP],
            num_reused=counts[Decision.REUSE],
            mean_mlp_width=sum(widths) / len(widths) if widths else 1.0,
            num_inference_steps=self.request.num_inference_steps,
            decisions=tuple(sorted(trace, key=lambda e: (e.step, e.branch))) if self.request.wants_trace else None,
        )
