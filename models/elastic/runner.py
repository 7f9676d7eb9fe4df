"""The block runner: executes any plan for the rows of a step, whatever each row's rule and policy are."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from models.elastic.compute import BlockCost
from models.elastic.plan import SKIP, Policy, RowPlan, RowView, Rule
from models.elastic.router import Scorer
from models.report import BlockReport, Decision, StepDecision

CALL_COSTS_TOKENS = 100
"""What a call of a block costs beside its tokens, in tokens' worth of time.

On two CPU cores about 0.5 ms of the 0.9 ms that 64 tokens of 192 channels take. For a GPU estimated from sizes: some
twenty kernels to launch, against about 3 microseconds a token of 3072 channels.
"""

_MASK_COSTS_SHARE = 0.05
"""What a mask adds to a call, as a share of its tokens' time.

Estimated for a GPU, where it rules out flash attention: attention is a fifth of the work at 4096 tokens.
"""


@dataclass(frozen=True, slots=True)
class Streams:
    """What flows from block to block.

    `hidden_states` is `(batch, image tokens, channels)`, `encoder_hidden_states` `(batch, text tokens, channels)`,
    `temb` `(batch, channels)`; `image_rotary_emb` holds the position factors shared by all rows, None where there are
    none. `encoder_hidden_states_mask` `(batch, text tokens)` is true for real text tokens, None where all are. Families
    that pad texts have the image's and the text's position factors apart, `image_rotary_emb` being the two.

    In families whose blocks look at something that they do not change, `context` `(rows with context, context tokens,
    context channels)` is that, and the tokens of `encoder_hidden_states` tell routers nothing. `context_rows` are the
    numbers of those rows, None where all have context. `long_skips` maps the number of a block to what it left for a
    later one, `(batch, tokens, channels)`.
    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    temb: Tensor
    image_rotary_emb: tuple[Tensor, Tensor] | None = None
    encoder_hidden_states_mask: Tensor | None = None
    context: Tensor | None = None
    context_rows: Tensor | None = None
    long_skips: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def scored(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """The streams that routers read, and their masks."""
        if self.context is not None:
            return (self.hidden_states,), (None,)
        return (self.encoder_hidden_states, self.hidden_states), (self.encoder_hidden_states_mask, None)

    def of_rows(self, where: Tensor, chosen: Sequence[int], rows: Sequence["Row"]) -> "Streams":
        """The streams of the `chosen` of all `rows` alone; what they left for later blocks is not needed.

        `where` are their numbers on the device. Padding that none of them needs is cut off, and with it the mask where
        all are of one length: it costs time, and attention's fastest kernels.
        """
        context, context_rows = self._context_of(chosen, rows)
        part = replace(
            self,
            hidden_states=self.hidden_states[where],
            encoder_hidden_states=self.encoder_hidden_states[where],
            temb=self.temb[where],
            context=context,
            context_rows=context_rows,
        )
        if self.encoder_hidden_states_mask is None:
            return part
        assert self.image_rotary_emb is not None
        known = [length for i in chosen if (length := rows[i].num_text_tokens) is not None]
        longest = max(known)
        image_factors, text_factors = self.image_rotary_emb
        return replace(
            part,
            encoder_hidden_states=part.encoder_hidden_states[:, :longest],
            image_rotary_emb=(image_factors, text_factors[:longest]),
            encoder_hidden_states_mask=None
            if min(known) == longest
            else self.encoder_hidden_states_mask[where, :longest],
        )

    def _context_of(self, chosen: Sequence[int], rows: Sequence["Row"]) -> tuple[Tensor | None, Tensor | None]:
        if self.context is None:
            return None, None
        having = [i for i, row in enumerate(rows) if row.has_context]
        places = {i: place for place, i in enumerate(having)}
        looking = [position for position, i in enumerate(chosen) if i in places]
        if not looking:
            return None, None
        device = self.context.device
        context = self.context[row_index([places[chosen[position]] for position in looking], device)]
        return context, None if len(looking) == len(chosen) else row_index(looking, device)


@dataclass(frozen=True, slots=True)
class ElasticBlock:
    """One block of a model: `variants` maps an MLP width to the module that runs it, 1.0 being the original.

    `enter` and `leave` are what the model does before and after the block for every row, whatever its plan; they see to
    long skips, where there are any.
    """

    name: str
    variants: Mapping[float, nn.Module]
    call: Callable[[nn.Module, Streams], tuple[Tensor, Tensor]]
    router: Scorer | None
    enter: Callable[[Streams], Streams] | None = None
    leave: Callable[[Streams], Streams] | None = None


@dataclass(frozen=True, slots=True)
class Residual:
    """What a block once added to a row's two streams, `(tokens, channels)` each, and how often that was used again.

    Of the text stream only real tokens: the padding may differ from step to step.
    """

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

    `residuals` has None where a stored one is outdated; `stores_residuals` says whether any was stored. Where a plan
    measures a block's change, `measured_residual` is what that block added to the image stream, and `residual_change`
    its distance from the row's reference.
    """

    flops: float = 0.0
    trace: list[StepDecision] = field(default_factory=list)
    residuals: dict[str, Residual | None] = field(default_factory=dict)
    stores_residuals: bool = False
    measured_residual: Tensor | None = None
    residual_change: float | None = None


@dataclass(slots=True)
class Row:
    """One row of a batch: one guidance branch of one request, with all the state that its elasticity has.

    `residuals` maps block names to stored residuals; `reference` is the measured block's residual in the last step that
    stored residuals. `allowance` is shared by the branches of a request. `num_text_tokens` counts the row's
    real ones (None where texts are never padded). A row without context has zeros for one, to which blocks need not
    attend. `begin_step` and `end_step` frame a step.
    """

    rule: Rule[Any]
    policy: Policy
    branch: str
    num_steps: int
    costs: Mapping[str, BlockCost]
    num_text_tokens: int | None = None
    has_context: bool = True
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
        if self.journal.stores_residuals:
            self.reference = self.journal.measured_residual
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
    untouched and cost nothing; rows that re-use add their stored residual; rows that run are gathered by width and by
    about the length of their text, run by the original block and scattered back.
    """
    if block.enter:
        streams = block.enter(streams)
    plans, router_seconds = _plan(block, index, streams, modulation, rows)
    planned = time.perf_counter()
    hidden_states, encoder_hidden_states = streams.hidden_states, streams.encoder_hidden_states
    for width, chosen in _groups(plans, rows, streams.hidden_states.shape[1]):
        module = block.variants[width]
        if len(chosen) == len(rows):
            text, image = block.call(module, streams)
            _keep_residuals(block.name, rows, plans, chosen, streams, image, text)
            hidden_states, encoder_hidden_states = image, text
        else:
            where = row_index(chosen, hidden_states.device)
            part = streams.of_rows(where, chosen, rows)
            text, image = block.call(module, part)
            _keep_residuals(block.name, rows, plans, chosen, part, image, text)
            hidden_states = hidden_states.index_copy(0, where, image)
            encoder_hidden_states = encoder_hidden_states.index_copy(0, where, _padded(text, encoder_hidden_states))
    reusing = [i for i, plan in enumerate(plans) if plan.decision is Decision.REUSE]
    if reusing:
        residuals = [rows[i].residuals[block.name] for i in reusing]
        hidden_states, encoder_hidden_states = _add_residuals(residuals, reusing, hidden_states, encoder_hidden_states)
        for i, residual in zip(reusing, residuals, strict=True):
            rows[i].journal.residuals[block.name] = replace(residual, num_reuses=residual.num_reuses + 1)
    for row, plan in zip(rows, plans, strict=True):
        row.journal.trace.append(StepDecision(row.step, row.branch, block.name, plan.decision, plan.mlp_width))
    measured = [i for i, plan in enumerate(plans) if plan.measures_change]
    if measured:
        added = hidden_states - streams.hidden_states
        if len(measured) < len(rows):
            added = added[row_index(measured, added.device)]
        _measure_change([rows[i] for i in measured], added)
    left = replace(streams, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states)
    return BlockResult(
        block.leave(left) if block.leave else left,
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
        inputs, masks = streams.scored
        # The one wait for the device in a block: five numbers a row, without which nothing can be left out.
        scores = block.router(inputs, modulation, masks).logits.tolist()
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
    return plans, router_seconds


def _groups(plans: Sequence[RowPlan], rows: Sequence[Row], num_image_tokens: int) -> Iterator[tuple[float, list[int]]]:
    """The rows that run together, with their width: one call each.

    Of one width, the longest texts come first; those of a shorter length join where their padding, and the mask that
    the call then needs, cost less than a call of their own.
    """
    running = [i for i, plan in enumerate(plans) if plan.decision is Decision.RUN]
    for width in sorted({plans[i].mlp_width for i in running}):
        of_length: dict[int, list[int]] = {}
        for i in running:
            if plans[i].mlp_width == width:
                of_length.setdefault(rows[i].num_text_tokens or 0, []).append(i)
        longest, *shorter = sorted(of_length, reverse=True)
        group, is_masked = of_length[longest], False
        for length in shorter:
            joining = of_length[length]
            newly_masked = (len(joining) if is_masked else len(group) + len(joining)) * (num_image_tokens + longest)
            padding = (longest - length) * len(joining)
            if padding + _MASK_COSTS_SHARE * newly_masked < CALL_COSTS_TOKENS:
                group, is_masked = group + joining, True
            else:
                yield width, sorted(group)
                longest, group, is_masked = length, joining, False
        yield width, sorted(group)


def _sigmoid(logit: float) -> float:
    """By way of tanh, since exp overflows under -709."""
    return 0.5 * (1 + math.tanh(0.5 * logit))


def _settle(row: Row, plan: RowPlan, cost: BlockCost) -> RowPlan:
    """Account for a plan; one that the request's allowance cannot pay for becomes a skip."""
    row.journal.flops += cost.always
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
            rows[i].journal.stores_residuals = True
            real = slice(rows[i].num_text_tokens)
            rows[i].journal.residuals[name] = Residual(
                image[position] - before.hidden_states[position],
                text[position, real] - before.encoder_hidden_states[position, real],
            )


def _add_residuals(
    residuals: Sequence[Residual], where: Sequence[int], hidden_states: Tensor, encoder_hidden_states: Tensor
) -> tuple[Tensor, Tensor]:
    text = _padded(pad_sequence([r.encoder_hidden_states for r in residuals], batch_first=True), encoder_hidden_states)
    if len(where) == 1 == len(hidden_states):
        return hidden_states + residuals[0].hidden_states, encoder_hidden_states + text
    index = row_index(where, hidden_states.device)
    return (
        hidden_states.index_add(0, index, torch.stack([r.hidden_states for r in residuals])),
        encoder_hidden_states.index_add(0, index, text),
    )


def _padded(text: Tensor, like: Tensor) -> Tensor:
    """Text tokens `(rows, tokens, channels)`, with zeros up to as many tokens as `like` has."""
    missing = like.shape[1] - text.shape[1]
    return F.pad(text, (0, 0, 0, missing)) if missing else text


def row_index(rows: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers on the device. From pinned memory, since an ordinary copy would wait for all that was queued."""
    return torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _measure_change(rows: Sequence[Row], added: Tensor) -> None:
    """How far what a block `added` to each row's image stream moved from the row's reference. One wait for the device.

    `added` is `(rows, tokens, channels)`.
    """
    known = [i for i, row in enumerate(rows) if row.reference is not None]
    if known:
        references = torch.stack([r for i in known if (r := rows[i].reference) is not None])
        change = (added[known] - references).abs().mean((1, 2)) / references.abs().mean((1, 2))
        for i, value in zip(known, change.float().tolist(), strict=True):
            rows[i].journal.residual_change = value
    for row, residual in zip(rows, added, strict=True):
        # A copy, since a view would keep the whole batch in memory as long as the row.
        row.journal.measured_residual = residual.clone()
