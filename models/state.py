"""All state of one request while it is denoised. When it is dropped, nothing of the request is left."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from models.budget import point_of_compute
from models.curve import CurvePoint
from models.diffusion.sampling import add_noise, euler_step, linear_step
from models.elastic.plan import Policy
from models.elastic.row import Allowance, Row
from models.report import Decision, GenerationSummary, StepDecision, TokenCounts
from models.request import GenerationRequest
from models.rules import RULES
from models.rules.forecast import MAX_VELOCITIES, Forecaster, Weights


@dataclass(frozen=True, slots=True)
class References:
    """Pictures that the transformer reads beside the noise, without noise.

    `latents` `(1, tokens, channels)` has one picture after the other, packed as the noise is. `sizes` are the pictures'
    heights and widths in tokens.
    """

    latents: Tensor
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class BranchInputs:
    """The inputs of one guidance branch, equal at every step.

    `context` `(1, tokens, channels)` is the embedded prompt, already in the transformer's width, or the embedded image.
    Some families add `pooled` and `guidance` to the time embedding. All branches of a request share its `references`.
    `num_prompt_tokens` is how many tokens the encoder counts in the prompt, without padding and without a template.
    """

    context: Tensor
    pooled: Tensor | None = None
    guidance: Tensor | None = None
    references: References | None = None
    num_prompt_tokens: int = 0

    @property
    def num_text_tokens(self) -> int:
        return self.context.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the embedded prompt."""
        return self.context.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def on(self, device: torch.device | str) -> "BranchInputs":
        """The same with the embedded prompt on `device`."""
        return replace(
            self, context=self.context.to(device), pooled=None if self.pooled is None else self.pooled.to(device)
        )


class Velocity(NamedTuple):
    """A velocity `(1, tokens, channels)` with guidance applied.

    With true guidance, `conditional` is the velocity of the branch with the prompt or image.
    """

    guided: Tensor
    conditional: Tensor | None = None

    def copy(self) -> "Velocity":
        """A copy, to keep: the tensors may be views, which would keep a whole batch in memory."""
        return Velocity(self.guided.clone(), None if self.conditional is None else self.conditional.clone())


@dataclass(frozen=True, slots=True)
class KeptRegion:
    """The part of a picture that an edit keeps. Its latents follow the picture, whatever the model predicts.

    All are `(1, tokens, channels)`: `changes` is true where latents may change, `image_latents` are the picture's
    without noise, `noise` is what the generation started from.
    """

    changes: Tensor
    image_latents: Tensor
    noise: Tensor

    def restore(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """`latents` at a noise level, with the picture's where it is kept.

        Steps move each latent by itself. So after a gap of forecast steps, this is what restoring after each of them
        leads to.
        """
        return torch.where(self.changes, latents, add_noise(self.image_latents, self.noise, sigma))


@dataclass(slots=True)
class DenoiseState:
    """One request between its noise and its result.

    `latents` is `(1, tokens, channels)`; `sigmas` `(steps + 1,)` and `timesteps` `(steps,)` are float32 on the CPU.
    `rows` and `inputs` have one entry per guidance branch, the conditional branch first. `dense_flops` is the block
    compute of one dense step of all branches. `compute_cap`, if there is one, is the share of the dense compute that
    the whole generation may use. `step_index` is the next step to compute. `computed` has the steps that were, and
    `thresholds` and `points` have an entry for each of them; `velocities` are those of the last ones, the newest first.
    `run_rates` has one entry per block: a running mean of the rows that ran there, in which the last step weighs a
    third. `prediction` is the clean-sample estimate from the last velocities. `kept` is what an edit with a mask keeps.
    `num_picture_tokens` counts the tokens of the pictures that the request edits. States of one `shape` fit into one
    batch. `exact_tolerance` is how far the latents may be from those of the publisher's pipeline if every step is
    exact, 0 for not at all; None if calls are shared all the same, so that nothing is promised.
    """

    request: GenerationRequest
    shape: Hashable
    latents: Tensor
    sigmas: Tensor
    timesteps: Tensor
    rows: list[Row]
    inputs: list[BranchInputs]
    curve: Sequence[CurvePoint]
    point: CurvePoint
    dense_flops: float
    compute_cap: float | None
    forecaster: Forecaster | None = None
    kept: KeptRegion | None = None
    computed: list[int] = field(default_factory=list)
    velocities: list[Velocity] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    points: list[CurvePoint] = field(default_factory=list)
    run_rates: list[float] = field(default_factory=list)
    step_index: int = 0
    prediction: Tensor | None = None
    num_picture_tokens: int = 0
    exact_tolerance: float | None = None

    @property
    def batch_key(self) -> Hashable:
        """States of one key share calls. An exact one shares its calls with no other."""
        return (self.shape, id(self)) if self.is_exact else self.shape

    @property
    def is_exact(self) -> bool:
        """Whether all steps so far were those of the publisher's pipeline, and the next one is to be."""
        return self.exact_tolerance is not None and all(point.is_exact for point in (*self.points, self.point))

    @property
    def num_steps(self) -> int:
        """Steps of the schedule. Steps of no length are left out."""
        return len(self.timesteps)

    @property
    def num_computed_steps(self) -> int:
        """How many steps are computed in all, as things stand."""
        return len(self.computed) + self._num_to_compute

    @property
    def _num_to_compute(self) -> int:
        """How many more steps will be computed, with the next one."""
        wanted = self.point.num_computed_steps(self.num_steps, self.compute_cap)
        return min(max(wanted - len(self.computed), 1), self.num_steps - self.step_index)

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
        """The expected number of rows that each block runs in the next computed step.

        The first step is expected to follow the curve's mean; later steps follow this request's own decisions.
        """
        if self.point.is_block_dense:
            share = 1.0
        elif self.run_rates:
            return self.run_rates
        elif self.compute_cap is not None and self.point.steps is None:
            share = self.compute_cap
        else:
            share = self.point.compute_ratio / self.point.computed_share
        return [len(self.rows) * share] * len(self.rows[0].costs)

    def fork(self) -> "DenoiseState":
        """A copy that goes its own way from here. Tensors are shared, since nothing changes them in place."""
        return replace(
            self,
            rows=[row.fork() for row in self.rows],
            computed=[*self.computed],
            velocities=[*self.velocities],
            thresholds=[*self.thresholds],
            points=[*self.points],
            run_rates=[*self.run_rates],
        )

    def branches(self) -> list["DenoiseState"]:
        """The state with one guidance branch at a time, to run its next step in parts. They share rows with it."""
        return [replace(self, rows=[row], inputs=[part]) for row, part in zip(self.rows, self.inputs, strict=True)]

    def move_to(self, point: CurvePoint) -> None:
        """Take the next steps at another point of the curve."""
        self.point = point
        for row in self.rows:
            row.rule = RULES[point.policy.rule]

    def prepare_step(self) -> None:
        """Set this step's policy and allowance.

        A request may be lighter or heavier than the calibration's mean, so under a compute budget the point is chosen
        again at every step from the compute that is left. A step's allowance leaves enough for the cheapest calibrated
        point in all later steps; otherwise the cap could be met by dropping the last steps.
        """
        policy: Policy = self.point.policy
        allowance = Allowance()
        if self.compute_cap is not None and not self.point.steps and not self.point.is_block_dense:
            steps_left = self.num_steps - self.step_index
            left = self.compute_cap * self.num_steps * self.dense_flops - self.spent_flops
            even_share = left / steps_left
            elastic = [point for point in self.curve if point.rule == self.point.rule]
            policy = point_of_compute(even_share / self.dense_flops, elastic).policy
            cheapest = self.curve[-1].compute_ratio * self.dense_flops
            unavoidable = sum(cost.always for row in self.rows for cost in row.costs.values())
            # Rounding must not turn the last block that the cap pays for into a skip.
            allowance.flops = max(even_share, left - (steps_left - 1) * cheapest) * (1 + 1e-9) - unavoidable
        next_step = self._next_step()
        for row in self.rows:
            row.begin_step(self.step_index, next_step, policy, allowance)

    def _next_step(self) -> int:
        """The step to compute after this one, the number of steps if there is none."""
        if self.point.steps is None:
            return self.step_index + 1
        assert self.forecaster is not None
        num_left = self._num_to_compute - 1
        computed = [*self.computed, self.step_index]
        return self.forecaster.next_step(computed, num_left) if num_left else self.num_steps

    def complete_step(self, velocity: Velocity) -> int:
        """Apply the changes of a computed step, and go on through the steps that are forecast; returns how many.

        A step that failed before this call has changed nothing and can be repeated.
        """
        next_step = self._apply(velocity)
        self.thresholds.append(self.rows[0].policy.skip_threshold)
        self.points.append(self.point)
        of_blocks = zip(*(row.journal.plans for row in self.rows), strict=True)
        runs = [sum(plan.decision is Decision.RUN for plan in plans) for plans in of_blocks]
        expected = self.expected_runs
        self.run_rates = [rate + (ran - rate) / 3 for rate, ran in zip(expected, runs, strict=True)]
        for row in self.rows:
            row.end_step()
        num_forecast = next_step - self.step_index - 1
        self.step_index = next_step
        return num_forecast

    def _apply(self, velocity: Velocity) -> int:
        """Take the latents on to the next computed step, and return it."""
        step, latents = self.step_index, self.latents
        velocities = [velocity.copy(), *self.velocities[: MAX_VELOCITIES - 1]] if self.forecaster else []
        following = self._next_step()
        if self.point.steps is None:
            moved = euler_step(latents, velocity.guided, self.sigmas[step], self.sigmas[following])
            # The last noise level has no noise: it is 0, or 1 where levels rise, as in Hunyuan3D.
            prediction = euler_step(latents, velocity.guided, self.sigmas[step], self.sigmas[-1])
        else:
            assert self.forecaster is not None
            computed = [*self.computed, step]
            moved, prediction = (
                _forecast(latents, velocities, self.forecaster.weights(computed, end))
                for end in (following, self.num_steps)
            )
        if self.kept:
            moved = self.kept.restore(moved, self.sigmas[following])
            prediction = self.kept.restore(prediction, self.sigmas[-1])
        self.latents, self.prediction, self.velocities = moved, prediction, velocities
        self.computed.append(step)
        return following

    def summary(self) -> GenerationSummary:
        """The account of the steps taken so far."""
        plans = [plan for row in self.rows for step in row.history for plan in step.plans]
        counts = Counter(plan.decision for plan in plans)
        widths = [plan.mlp_width for plan in plans if plan.decision is Decision.RUN]
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
            num_forecast=self.num_forecast_steps * sum(len(row.costs) for row in self.rows),
            mean_mlp_width=sum(widths) / len(widths) if widths else 1.0,
            num_inference_steps=self.request.num_inference_steps,
            num_steps_computed=len(self.computed),
            num_steps_forecast=self.num_forecast_steps,
            exact_tolerance=self.exact_tolerance if self.is_exact else None,
            is_calibrated=all(point.is_calibrated for point in self.points or [self.point]),
            decisions=self._decisions() if self.request.wants_trace else None,
            tokens=TokenCounts(
                prompts=sum(branch.num_prompt_tokens for branch in self.inputs),
                pictures=self.num_picture_tokens,
                latents=self.latents.shape[1],
            ),
        )

    @property
    def num_forecast_steps(self) -> int:
        """How many steps were forecast so far."""
        return self.step_index - len(self.computed)

    def _decisions(self) -> tuple[StepDecision, ...]:
        """The decisions in computed steps, and those that forecast steps stand for, in order."""
        computed = [entry for row in self.rows for entry in row.trace]
        forecast = [
            StepDecision(step, row.branch, block, Decision.FORECAST, 0.0)
            for step in sorted({*range(self.step_index)} - {*self.computed})
            for row in self.rows
            for block in row.costs
        ]
        return tuple(sorted((*computed, *forecast), key=lambda entry: (entry.step, entry.branch)))


def _forecast(latents: Tensor, velocities: Sequence[Velocity], weights: Weights) -> Tensor:
    """The latents after a gap; `velocities` are those of the last computed steps, the newest first."""
    guided = [velocity.guided for velocity in velocities]
    conditional = [v.conditional for v in velocities[: len(weights.conditionals)] if v.conditional is not None]
    return linear_step(latents, weights.latents, (*weights.velocities, *weights.conditionals), (*guided, *conditional))
