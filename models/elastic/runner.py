"""The block runner: plans and executes one block for the rows of a step. Each row has its own rule and policy."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F

from models.elastic.host import to_host
from models.elastic.plan import SKIP, RowPlan, RowView
from models.elastic.router import Scorer
from models.elastic.row import Residual, Row
from models.elastic.streams import Streams
from models.report import BlockReport, Decision

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
    started = time.perf_counter()
    scores = _score(block, streams, modulation)
    scored = time.perf_counter()
    plans = [_plan(block.name, index, row, scores[i] if scores else None) for i, row in enumerate(rows)]
    planned = time.perf_counter()
    ran = _run(block, streams, rows, plans)
    after = _reuse(block.name, ran, rows, plans, may_write=ran is not streams)
    left = block.leave(after) if block.leave else after
    return BlockResult(left, _report(block.name, time.perf_counter() - planned, plans), scored - started)


def _report(name: str, seconds: float, plans: Sequence[RowPlan]) -> BlockReport:
    decisions = [plan.decision for plan in plans]
    return BlockReport(
        block=name,
        seconds=seconds,
        num_run=decisions.count(Decision.RUN),
        num_skipped=decisions.count(Decision.SKIP),
        num_reused=decisions.count(Decision.REUSE),
        mlp_widths=tuple(plan.mlp_width for plan in plans if plan.decision is Decision.RUN),
    )


def _score(block: ElasticBlock, streams: Streams, modulation: Tensor | None) -> list[list[float]] | None:
    """Five logits a row. The one wait for the device in a block: plans are made on the host."""
    if modulation is None or block.router is None:
        return None
    inputs, masks = streams.scored
    return to_host(block.router(inputs, modulation, masks).logits)


def _plan(name: str, index: int, row: Row, scores: Sequence[float] | None) -> RowPlan:
    """Ask the row's rule, and account for its plan. A plan that the request's allowance cannot pay becomes a skip."""
    residual, journal, cost = row.residuals.get(name), row.journal, row.costs[name]
    view = RowView(
        step=row.step,
        num_steps=row.num_steps,
        block_index=index,
        depth_prob=_sigmoid(scores[0]) if scores else None,
        width_logits=tuple(scores[1:]) if scores else None,
        num_reuses=residual.num_reuses if residual else None,
        next_step=row.next_step,
    )
    plan = row.rule.plan(view, row.policy)
    journal.flops += cost.always
    if plan.decision is Decision.RUN:
        flops = cost.at_width(plan.mlp_width)
        if flops > row.allowance.flops:
            plan = SKIP
        else:
            row.allowance.flops -= flops
            journal.flops += flops
    journal.plans.append(plan)
    return plan


def _run(block: ElasticBlock, streams: Streams, rows: Sequence[Row], plans: Sequence[RowPlan]) -> Streams:
    """The streams after the calls of the block that the plans ask for: a copy, unless no row runs."""
    running = [i for i, plan in enumerate(plans) if plan.decision is Decision.RUN]
    if not running:
        return streams
    for i in running:
        rows[i].let_go(block.name)
    groups = [*_groups(running, plans, streams)]
    hidden_states, encoder_hidden_states = streams.hidden_states, streams.encoder_hidden_states
    if len(groups[0][1]) == len(rows):
        text, image = block.call(block.variants[groups[0][0]], streams)
        _keep_residuals(block.name, rows, plans, running, streams, image, text)
        return replace(streams, hidden_states=image, encoder_hidden_states=text)
    indices = streams.indices([chosen for _, chosen in groups])
    for (width, chosen), where in zip(groups, indices, strict=True):
        part = streams.of_rows(chosen, where)
        text, image = block.call(block.variants[width], part)
        _keep_residuals(block.name, rows, plans, chosen, part, image, text)
        if hidden_states is streams.hidden_states:  # not before the call, which takes the most memory
            hidden_states, encoder_hidden_states = hidden_states.clone(), encoder_hidden_states.clone()
        _write(hidden_states, where, image)
        _write(encoder_hidden_states, where, _padded(text, encoder_hidden_states))
    return replace(streams, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states)


def _write(stream: Tensor, where: Tensor | slice, rows: Tensor) -> None:
    if isinstance(where, slice):
        stream[where] = rows
    else:
        stream.index_copy_(0, where, rows)


def _groups(
    running: Sequence[int], plans: Sequence[RowPlan], streams: Streams
) -> Iterator[tuple[float, Sequence[int]]]:
    """The numbers of the rows that run together, in ascending order, with their width: one call for each group."""
    of_width: dict[float, list[int]] = {}
    for i in running:
        of_width.setdefault(plans[i].mlp_width, []).append(i)
    for width in sorted(of_width):
        if streams.text_lengths is None:
            yield width, of_width[width]
        else:
            for group in _sharing(of_width[width], streams.text_lengths, streams.hidden_states.shape[1]):
                yield width, group


def _sharing(rows: Sequence[int], lengths: Sequence[int], num_image_tokens: int) -> Iterator[Sequence[int]]:
    """Groups of rows that share a call.

    The longest texts come first. Rows with shorter texts join them where their padding, and the mask that the call then
    needs, cost less than a call of their own.
    """
    of_length: dict[int, list[int]] = {}
    for i in rows:
        of_length.setdefault(lengths[i], []).append(i)
    longest, *shorter = sorted(of_length, reverse=True)
    group, is_masked = of_length[longest], False
    for length in shorter:
        joining = of_length[length]
        newly_masked = (len(joining) if is_masked else len(group) + len(joining)) * (num_image_tokens + longest)
        padding = (longest - length) * len(joining)
        if padding + _MASK_COSTS_SHARE * newly_masked < CALL_COSTS_TOKENS:
            group, is_masked = group + joining, True
        else:
            yield sorted(group)
            longest, group, is_masked = length, joining, False
    yield sorted(group)


def _reuse(name: str, streams: Streams, rows: Sequence[Row], plans: Sequence[RowPlan], *, may_write: bool) -> Streams:
    """Add the stored residuals of the rows whose plan says so, to the streams themselves where that is allowed."""
    reusing = [i for i, plan in enumerate(plans) if plan.decision is Decision.REUSE]
    if not reusing:
        return streams
    hidden_states, encoder_hidden_states = streams.hidden_states, streams.encoder_hidden_states
    if not may_write:
        hidden_states, encoder_hidden_states = hidden_states.clone(), encoder_hidden_states.clone()
    for i in reusing:
        residual = rows[i].residuals[name]
        rows[i].journal.residuals[name] = replace(residual, num_reuses=residual.num_reuses + 1)
        hidden_states[i].add_(residual.hidden_states)
        encoder_hidden_states[i, : len(residual.encoder_hidden_states)].add_(residual.encoder_hidden_states)
    return replace(streams, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states)


def _sigmoid(logit: float) -> float:
    """Computed by tanh, since exp overflows below -709."""
    return 0.5 * (1 + math.tanh(0.5 * logit))


def _keep_residuals(
    name: str,
    rows: Sequence[Row],
    plans: Sequence[RowPlan],
    chosen: Sequence[int],
    before: Streams,
    image: Tensor,
    text: Tensor,
) -> None:
    """Store what the block added, for the rows whose plan keeps it."""
    for position, i in enumerate(chosen):
        if plans[i].keeps_residual and rows[i].has_next_step:
            real = slice(before.text_lengths[position] if before.text_lengths else None)
            rows[i].journal.residuals[name] = Residual(
                image[position] - before.hidden_states[position],
                text[position, real] - before.encoder_hidden_states[position, real],
            )


def _padded(text: Tensor, like: Tensor) -> Tensor:
    """Text tokens `(rows, tokens, channels)`, padded with zeros to the number of tokens of `like`."""
    missing = like.shape[1] - text.shape[1]
    return F.pad(text, (0, 0, 0, missing)) if missing else text
