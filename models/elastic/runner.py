"""The block runner: executes any plan for the rows of a step, whatever each row's rule and policy are."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from models.card import Policy
from models.elastic.compute import BlockCost
from models.elastic.plan import SKIP, RowPlan, RowView, Rule
from models.elastic.router import Router
from models.report import BlockReport, Decision, StepDecision


@dataclass(frozen=True, slots=True)
class Streams:
    """What flows from block to block.

    `hidden_states` is `(batch, image tokens, channels)`, `encoder_hidden_states` `(batch, text tokens, channels)`,
    `temb` `(batch, channels)`; `image_rotary_emb` holds cosines and sines shared by all rows.
    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    temb: Tensor
    image_rotary_emb: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class ElasticBlock:
    """One block of a model: `variants` maps an MLP width to the module that runs it, 1.0 being the original."""

    name: str
    variants: Mapping[float, nn.Module]
    call: Callable[[nn.Module, Streams], tuple[Tensor, Tensor]]
    router: Router | None


@dataclass(frozen=True, slots=True)
class Residual:
    """What a block once added to a row's two streams, `(tokens, channels)` each, and how often that was used again."""

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    num_reuses: int = 0


@dataclass(slots=True)
class Allowance:
    """Floating-point operations that a request may still spend in this step; infinite unless its budget is a cap."""

    flops: float = float("inf")


@dataclass(slots=True)
class StepJournal:
    """What one step changes about a row, apart until the step has succeeded, so that a failed step can be repeated.

    `residuals` has None where a stored one is outdated. Under the residual_cache rule `first_residual` is what the
    first block added to the image stream, and `residual_change` its distance from the row's reference.
    """

    flops: float = 0.0
    trace: list[StepDecision] = field(default_factory=list)
    residuals: dict[str, Residual | None] = field(default_factory=dict)
    first_residual: Tensor | None = None
    residual_change: float | None = None
    computes_rest: bool = False


@dataclass(slots=True)
class Row:
    """One row of a batch: one guidance branch of one request, with all the state that its elasticity has.

    `residuals` maps block names to stored residuals; `reference` is the first block's residual in the last step that
    computed the other blocks. `allowance` is shared by the branches of a request. `begin_step` and `end_step` frame
    a step.
    """

    rule: Rule
    policy: Policy
    branch: str
    num_steps: int
    costs: Mapping[str, BlockCost]
    step: int = 0
    allowance: Allowance = field(default_factory=Allowance)
    residuals: dict[str, Residual] = field(default_factory=dict)
    reference: Tensor | None = None
    spent_flops: float = 0.0
    trace: list[StepDecision] = field(default_factory=list)
    journal: StepJournal = field(default_factory=StepJournal)

    def begin_step(self, step: int, policy: Policy, allowance: Allowance) -> None:
        self.step, self.policy, self.allowance = step, policy, allowance
        self.journal = StepJournal()

    def end_step(self) -> None:
        self.spent_flops += self.journal.flops
        self.trace += self.journal.trace
        kept = self.residuals | self.journal.residuals
        self.residuals = {name: residual for name, residual in kept.items() if residual is not None}
        if self.journal.computes_rest:
            self.reference = self.journal.first_residual
        self.journal = StepJournal()


@dataclass(frozen=True, slots=True)
class BlockResult:
    streams: Streams
    report: BlockReport
    router_seconds: float


def run_block(
    block: ElasticBlock, index: int, streams: Streams, modulation: Tensor | None, rows: Sequence[Row]
) -> BlockResult:
    """Plan and run block number `index` for every row of a batch.

    `modulation` is the block's router modulation of this step, None if no row needs scores. Rows that skip are left
    untouched and cost nothing; rows that re-use add their stored residual; rows that run are gathered by width, run by
    the original block and scattered back.
    """
    plans, router_seconds = _plan(block, index, streams, modulation, rows)
    planned = time.perf_counter()
    hidden_states, encoder_hidden_states = streams.hidden_states, streams.encoder_hidden_states
    for width in sorted({plan.mlp_width for plan in plans if plan.decision is Decision.RUN}):
        chosen = [i for i, p in enumerate(plans) if p.decision is Decision.RUN and p.mlp_width == width]
        module = block.variants[width]
        if len(chosen) == len(rows):
            text, image = block.call(module, streams)
            _keep_residuals(block.name, rows, plans, chosen, streams, image, text)
            hidden_states, encoder_hidden_states = image, text
        else:
            where = torch.tensor(chosen, device=hidden_states.device)
            part = Streams(
                streams.hidden_states[where],
                streams.encoder_hidden_states[where],
                streams.temb[where],
                streams.image_rotary_emb,
            )
            text, image = block.call(module, part)
            _keep_residuals(block.name, rows, plans, chosen, part, image, text)
            hidden_states = hidden_states.index_copy(0, where, image)
            encoder_hidden_states = encoder_hidden_states.index_copy(0, where, text)
    reusing = [i for i, plan in enumerate(plans) if plan.decision is Decision.REUSE]
    if reusing:
        residuals = [rows[i].residuals[block.name] for i in reusing]
        hidden_states, encoder_hidden_states = _add_residuals(residuals, reusing, hidden_states, encoder_hidden_states)
        for i, residual in zip(reusing, residuals, strict=True):
            rows[i].journal.residuals[block.name] = replace(residual, num_reuses=residual.num_reuses + 1)
    for row, plan in zip(rows, plans, strict=True):
        row.journal.trace.append(StepDecision(row.step, row.branch, block.name, plan.decision, plan.mlp_width))
    if index == 0 and any(row.rule.needs_residual_change for row in rows):
        _measure_change(rows, hidden_states - streams.hidden_states)
    return BlockResult(
        Streams(hidden_states, encoder_hidden_states, streams.temb, streams.image_rotary_emb),
        BlockReport(
            block=block.name,
            seconds=time.perf_counter() - planned,
            num_run=sum(plan.decision is Decision.RUN for plan in plans),
            num_skipped=sum(plan.decision is Decision.SKIP for plan in plans),
            num_reused=len(reusing),
            mlp_widths=tuple(plan.mlp_width for plan in plans if plan.decision is Decision.RUN),
        ),
        router_seconds,
    )


def _plan(
    block: ElasticBlock, index: int, streams: Streams, modulation: Tensor | None, rows: Sequence[Row]
) -> tuple[list[RowPlan], float]:
    """Ask every row's rule. Returns the plans and the seconds that the router took."""
    started = time.perf_counter()
    scores: list[list[float]] | None = None
    if modulation is not None and block.router is not None:
        answer = block.router((streams.encoder_hidden_states, streams.hidden_states), modulation, (None, None))
        # The one wait for the device in a block: five numbers a row, without which nothing can be left out.
        scores = torch.cat((answer.depth_logits[:, None], answer.width_logits), dim=1).float().tolist()
    router_seconds = time.perf_counter() - started
    plans = []
    for i, row in enumerate(rows):
        residual = row.residuals.get(block.name)
        view = RowView(
            step=row.step,
            num_steps=row.num_steps,
            block_index=index,
            depth_prob=_sigmoid(scores[i][0]) if scores else None,
            width_logits=tuple(scores[i][1:]) if scores else None,
            num_reuses=residual.num_reuses if residual else None,
            residual_change=row.journal.residual_change,
        )
        plans.append(_settle(row, row.rule.plan(view, row.policy), row.costs[block.name]))
        if index == 1 and row.rule.needs_residual_change:
            row.journal.computes_rest = plans[-1].decision is Decision.RUN
    return plans, router_seconds


def _sigmoid(logit: float) -> float:
    """By way of tanh, since exp overflows under -709."""
    return 0.5 * (1 + math.tanh(0.5 * logit))


def _settle(row: Row, plan: RowPlan, cost: BlockCost) -> RowPlan:
    """Account for a plan; one that the request's allowance cannot pay for becomes a skip."""
    if plan.decision is not Decision.RUN:
        return plan
    flops = cost.at_width(plan.mlp_width)
    if flops > row.allowance.flops:
        return SKIP
    row.allowance.flops -= flops
    row.journal.flops += flops
    return plan


def _keep_residuals(
    name: str,
    rows: Sequence[Row],
    plans: Sequence[RowPlan],
    chosen: Sequence[int],
    before: Streams,
    image: Tensor,
    text: Tensor,
) -> None:
    """Store what the block added for the rows whose plan says that it may be used again, and drop outdated ones."""
    for position, i in enumerate(chosen):
        rows[i].journal.residuals[name] = None
        if plans[i].keeps_residual:
            rows[i].journal.residuals[name] = Residual(
                image[position] - before.hidden_states[position],
                text[position] - before.encoder_hidden_states[position],
            )


def _add_residuals(
    residuals: Sequence[Residual], where: Sequence[int], hidden_states: Tensor, encoder_hidden_states: Tensor
) -> tuple[Tensor, Tensor]:
    if len(where) == 1 == len(hidden_states):
        return hidden_states + residuals[0].hidden_states, encoder_hidden_states + residuals[0].encoder_hidden_states
    index = torch.tensor(where, device=hidden_states.device)
    return (
        hidden_states.index_add(0, index, torch.stack([r.hidden_states for r in residuals])),
        encoder_hidden_states.index_add(0, index, torch.stack([r.encoder_hidden_states for r in residuals])),
    )


def _measure_change(rows: Sequence[Row], added: Tensor) -> None:
    """How far each row's first residual moved since its last computed step. One wait for the device."""
    measured = [i for i, row in enumerate(rows) if row.rule.needs_residual_change]
    known = [i for i in measured if rows[i].reference is not None]
    if known:
        references = torch.stack([r for i in known if (r := rows[i].reference) is not None])
        change = (added[known] - references).abs().mean((1, 2)) / references.abs().mean((1, 2))
        for i, value in zip(known, change.float().tolist(), strict=True):
            rows[i].journal.residual_change = value
    for i in measured:
        # A copy, since a view would keep the whole batch in memory as long as the row.
        rows[i].journal.first_residual = added[i].clone()
