import random
from dataclasses import replace

from models.report import Decision, GenerationSummary, StepDecision
from service.jobs.job import Receipt, StageSeconds
from service.jobs.traces import pack, unpack


def decisions_of(num_steps: int, num_blocks: int) -> tuple[StepDecision, ...]:
    """Decisions in which nothing repeats but names, as in the worst case."""
    draw = random.Random(0)
    return tuple(
        StepDecision(step, branch, f"block.{block:02}", draw.choice([*Decision]), draw.choice([0.25, 0.5, 0.75, 1.0]))
        for step in range(num_steps)
        for branch in ("cond", "uncond")
        for block in range(num_blocks)
    )


def test_trace_survives_packing_and_takes_few_bytes() -> None:
    decisions = decisions_of(100, 60)
    text = pack(decisions)
    assert unpack(text) == decisions
    assert len(text) < 2 * len(decisions)


def test_packed_receipt_has_the_same_decisions(summary: GenerationSummary) -> None:
    plain = Receipt(summary, 0.9, StageSeconds(0, 0, 0, 0, 0), 1.0)
    assert plain.with_packed_trace() is plain
    assert plain.with_packed_trace().decisions is None
    traced = replace(plain, summary=replace(summary, decisions=decisions_of(2, 3)))
    assert traced.with_packed_trace().summary.decisions is None
    assert traced.with_packed_trace().decisions == traced.decisions == decisions_of(2, 3)
