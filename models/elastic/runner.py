"""The block runner: plans and executes one block for the rows of a step. Each row has its own rule and policy."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from models.elastic.compute import BlockCost
from models.elastic.plan import SKIP, RowPlan, RowView
from models.elastic.router import Scorer
from models.elastic.row import Residual, Row
from models.elastic.streams import Streams, row_index
from models.report import BlockReport, Decision, StepDecision

CALL_COSTS_TOKENS = 100
"""The fixed cost of one call of a block, in units of the time of one token.

On two CPU cores it is about 0.5 ms of the 0.9 ms that 64 tokens of 192 channels take. For a GPU it is estimated from
sizes: some twenty kernels to launch, against about 3 microseconds for a token of 3072 channels.
"""

_MASK_COSTS_SHARE = 0.05
"""The extra cost of a masked call, as a share of the time of its tokens.

Estimated for a GPU, where a mask rules out flash attention; attention is a fifth of the work at 4096 tokens.
"""


@dataclass(frozen=True, slots=True)
class ElasticBlock:
    """One block of a model. `variants` maps an MLP width to the module that runs it; 1.0 is the original.

    `call` runs a variant and returns the text stream, then the image stream. `enter` and `leave` are what the model
    does before and after the block for every row, whatever its plan: they handle long skips, where there are any.
    """

    name: str
    variants: Mapping[float, nn.Module]
    call: Callable[[nn.Module, Streams], tuple[Tensor, Tensor]]
    router: Scorer | None
    enter: Callable[[Streams], Streams] | None = None
    leave: Callable[[Streams], Streams] | None = None


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
    untouched and cost nothing. Rows that re-use add their stored residual. Rows that run are gathered, run by the
    variant of their width and scattered back.
    """
    if block.enter:
        streams = block.enter(streams)
    plans, router_seconds = _plan(block, index, streams, modulation, rows)
    planned = time.perf_counter()
    ran = _run(block, streams, rows, plans)
    after = _reuse(block.name, ran, rows, plans)
    for row, plan in zip(rows, plans, strict=True):
        row.journal.trace.append(StepDecision(row.step, row.branch, block.name, plan.decision, plan.mlp_width))
    left = block.leave(after) if block.leave else after
    return BlockResult(left, _report(block.name, time.perf_counter() - planned, plans), router_seconds)


def _report(name: str, seconds: float, plans: Sequence[RowPlan]) -> BlockReport:
    counts = Counter(plan.decision for plan in plans)
    return BlockReport(
        block=name,
        seconds=seconds,
        num_run=counts[Decision.RUN],
        num_skipped=counts[Decision.SKIP],
        num_reused=counts[Decision.REUSE],
        mlp_widths=tuple(plan.mlp_width for plan in plans if plan.decision is Decision.RUN),
    )


def _plan(
    block: ElasticBlock, index: int, streams: Streams, modulation: Tensor | None, rows: Sequence[Row]
) -> tuple[list[RowPlan], float]:
    """Ask every row's rule. Returns the plans and the seconds that the router took."""
    started = time.perf_counter()
    scores: list[list[float]] | None = None
    if modulation is not None and block.router is not None:
        inputs, masks = streams.scored
        # The one wait for the device in a block: plans are made on the host, from five numbers a row.
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
        )
        plans.append(_settle(row, row.rule.plan(view, row.policy), row.costs[block.name]))
    return plans, router_seconds


def _run(block: ElasticBlock, streams: Streams, rows: Sequence[Row], plans: Sequence[RowPlan]) -> Streams:
    """The streams after the calls of the block that the plans ask for."""
    hidden_states, encoder_hidden_states = streams.hidden_states, streams.encoder_hidden_states
    for width, chosen in _groups(plans, streams):
        module = block.variants[width]
        if len(chosen) == len(rows):
            text, image = block.call(module, streams)
            _keep_residuals(block.name, rows, plans, chosen, streams, image, text)
            hidden_states, encoder_hidden_states = image, text
        else:
            where = row_index(chosen, hidden_states.device)
            part = streams.of_rows(chosen, where)
            text, image = block.call(module, part)
            _keep_residuals(block.name, rows, plans, chosen, part, image, text)
            hidden_states = hidden_states.index_copy(0, where, image)
            encoder_hidden_states = encoder_hidden_states.index_copy(0, where, _padded(text, encoder_hidden_states))
    return replace(streams, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states)


def _groups(plans: Sequence[RowPlan], streams: Streams) -> Iterator[tuple[float, list[int]]]:
    """The numbers of the rows that run together, with their width: one call for each group.

    Within a width the longest texts come first. Rows with shorter texts join them where their padding, and the mask
    that the call then needs, cost less than a call of their own.
    """
    num_image_tokens, lengths = streams.hidden_states.shape[1], streams.text_lengths
    running = [i for i, plan in enumerate(plans) if plan.decision is Decision.RUN]
    for width in sorted({plans[i].mlp_width for i in running}):
        of_length: dict[int, list[int]] = {}
        for i in running:
            if plans[i].mlp_width == width:
                of_length.setdefault(lengths[i] if lengths else 0, []).append(i)
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


def _reuse(name: str, streams: Streams, rows: Sequence[Row], plans: Sequence[RowPlan]) -> Streams:
    """Add the stored residuals of the rows whose plan says so."""
    reusing = [i for i, plan in enumerate(plans) if plan.decision is Decision.REUSE]
    if not reusing:
        return streams
    residuals = [rows[i].residuals[name] for i in reusing]
    for i, residual in zip(reusing, residuals, strict=True):
        rows[i].journal.residuals[name] = replace(residual, num_reuses=residual.num_reuses + 1)
    hidden_states, encoder_hidden_states = _add_residuals(
        residuals, reusing, streams.hidden_states, streams.encoder_hidden_states
    )
    return replace(streams, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states)


def _sigmoid(logit: float) -> float:
    """Computed by tanh, since exp overflows below -709."""
    return 0.5 * (1 + math.tanh(0.5 * logit))


def _settle(row: Row, plan: RowPlan, cost: BlockCost) -> RowPlan:
    """Account for a plan. A plan that the request's allowance cannot pay for becomes a skip."""
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
    """Store what the block added, for the rows whose plan keeps it, and drop residuals that are now outdated."""
    for position, i in enumerate(chosen):
        rows[i].journal.residuals[name] = None
        if plans[i].keeps_residual:
            real = slice(before.text_lengths[position] if before.text_lengths else None)
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
    """Text tokens `(rows, tokens, channels)`, padded with zeros to the number of tokens of `like`."""
    missing = like.shape[1] - text.shape[1]
    return F.pad(text, (0, 0, 0, missing)) if missing else text
