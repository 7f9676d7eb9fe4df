from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from models.elastic.compute import BlockCost
from models.elastic.plan import REUSE, RUN_IN_FULL, SKIP, Policy, RowPlan, RowView
from models.elastic.router import Router
from models.elastic.row import Allowance, Residual, Row
from models.elastic.runner import ElasticBlock, run_block
from models.elastic.streams import Streams
from models.families.hunyuan3d.streams import PlainStreams
from models.families.qwen_image.streams import QwenImageStreams
from models.report import Decision

COST = BlockCost(fixed=10, mlp=20)
KEEP = RowPlan(Decision.RUN, keeps_residual=True)


@dataclass
class Scripted:
    """Returns the given plans, one a call, and records the views."""

    plans: Sequence[RowPlan]
    needs_scores: bool = False
    seen: list[RowView] = field(default_factory=list)

    def plan(self, row: RowView, policy: Policy) -> RowPlan:
        self.seen.append(row)
        return self.plans[len(self.seen) - 1]


class Mixing(nn.Module):
    """A block whose two streams depend on each other and on the time embedding."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.batch_sizes: list[int] = []

    def forward(self, streams: Streams) -> tuple[Tensor, Tensor]:
        self.batch_sizes.append(len(streams.hidden_states))
        image, text = streams.hidden_states, streams.encoder_hidden_states
        shift = streams.temb[:, None]
        return text + self.scale * image.mean(1, keepdim=True), image * self.scale + shift + text.sum(1, keepdim=True)


def call(module: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = module(streams)
    return result


@pytest.fixture
def variants() -> dict[float, Mixing]:
    return {width: Mixing(width) for width in (0.25, 0.5, 0.75, 1.0)}


@pytest.fixture
def block(variants: dict[float, Mixing]) -> ElasticBlock:
    return ElasticBlock("only", variants, call, None)


def streams_of(num_rows: int, seed: int = 0) -> Streams:
    rng = torch.Generator().manual_seed(seed)
    image, text = torch.randn(num_rows, 5, 4, generator=rng), torch.randn(num_rows, 3, 4, generator=rng)
    return Streams(image, text, torch.randn(num_rows, 4, generator=rng))


def row_of(*plans: RowPlan, flops: float = float("inf")) -> Row:
    row = Row(Scripted(plans), Policy(), "cond", 9, {"only": COST})
    row.begin_step(0, 1, Policy(), Allowance(flops))
    return row


def stored(seed: int) -> Residual:
    rng = torch.Generator().manual_seed(seed)
    return Residual(torch.randn(5, 4, generator=rng), torch.randn(3, 4, generator=rng), num_reuses=1)


def test_each_row_gets_what_its_plan_says(block: ElasticBlock, variants: dict[float, Mixing]) -> None:
    half = RowPlan(Decision.RUN, mlp_width=0.5)
    rows = [row_of(plan) for plan in (SKIP, RUN_IN_FULL, REUSE, half, RUN_IN_FULL, REUSE)]
    rows[2].residuals["only"], rows[5].residuals["only"] = stored(1), stored(2)
    before = streams_of(6)
    result = run_block(block, 0, before, None, rows)
    for i, row in enumerate(rows):
        one = slice(i, i + 1)
        alone = Streams(before.hidden_states[one], before.encoder_hidden_states[one], before.temb[one])
        text, image = alone.encoder_hidden_states, alone.hidden_states
        match i:
            case 1 | 4:
                text, image = Mixing(1.0)(alone)
            case 3:
                text, image = Mixing(0.5)(alone)
            case 2 | 5:
                residual = row.residuals["only"]
                text, image = text + residual.encoder_hidden_states, image + residual.hidden_states
        assert torch.equal(result.streams.hidden_states[one], image)
        assert torch.equal(result.streams.encoder_hidden_states[one], text)
    assert {width: mixing.batch_sizes for width, mixing in variants.items()} == {0.25: [], 0.5: [1], 0.75: [], 1.0: [2]}
    report = result.report
    assert (report.num_run, report.num_skipped, report.num_reused, report.mlp_widths) == (3, 1, 2, (1.0, 0.5, 1.0))


def test_streams_that_enter_a_block_are_left_as_they_are(block: ElasticBlock) -> None:
    before, same = streams_of(3), streams_of(3)
    rows = [row_of(SKIP), row_of(RUN_IN_FULL), row_of(REUSE)]
    rows[2].residuals["only"] = stored(1)
    run_block(block, 0, before, None, rows)
    assert torch.equal(before.hidden_states, same.hidden_states)
    assert torch.equal(before.encoder_hidden_states, same.encoder_hidden_states)


def test_block_that_all_skip_costs_nothing_and_copies_nothing(block: ElasticBlock) -> None:
    before = streams_of(2)
    rows = [row_of(SKIP), row_of(SKIP)]
    after = run_block(block, 0, before, None, rows).streams
    assert after.hidden_states is before.hidden_states
    assert after.encoder_hidden_states is before.encoder_hidden_states
    assert [row.journal.flops for row in rows] == [0, 0]


def test_kept_residual_is_the_change_that_the_block_made(block: ElasticBlock) -> None:
    rows = [row_of(SKIP), row_of(KEEP), row_of(RUN_IN_FULL)]
    before = streams_of(3)
    after = run_block(block, 0, before, None, rows).streams
    for row in rows:
        row.end_step()
    assert [list(row.residuals) for row in rows] == [[], ["only"], []]
    residual = rows[1].residuals["only"]
    assert torch.equal(residual.hidden_states, after.hidden_states[1] - before.hidden_states[1])
    assert torch.equal(residual.encoder_hidden_states, after.encoder_hidden_states[1] - before.encoder_hidden_states[1])
    assert residual.num_reuses == 0


@pytest.mark.parametrize(("plan", "keeps"), [(SKIP, True), (REUSE, True), (RUN_IN_FULL, False)])
def test_stored_residual_outlives_everything_but_a_run(block: ElasticBlock, plan: RowPlan, keeps: bool) -> None:
    row = row_of(plan)
    row.residuals["only"] = stored(1)
    run_block(block, 0, streams_of(1), None, [row])
    row.end_step()
    assert ("only" in row.residuals) is keeps


def test_each_reuse_is_counted(block: ElasticBlock) -> None:
    row = row_of(KEEP, REUSE, REUSE, SKIP, KEEP, SKIP)
    for step in range(6):
        row.begin_step(step, step + 1, Policy(), Allowance())
        run_block(block, 0, streams_of(1, step), None, [row])
        row.end_step()
    assert isinstance(row.rule, Scripted)
    assert [view.num_reuses for view in row.rule.seen] == [None, 0, 1, 2, 2, 0]


@pytest.mark.parametrize(
    ("flops", "width", "decision"),
    [(30.0, 1.0, "run"), (29.9, 1.0, "skip"), (20.0, 0.5, "run"), (19.9, 0.5, "skip"), (0.0, 0.25, "skip")],
)
def test_row_that_cannot_pay_skips(block: ElasticBlock, flops: float, width: float, decision: str) -> None:
    row = row_of(RowPlan(Decision.RUN, mlp_width=width), flops=flops)
    run_block(block, 0, streams_of(1), None, [row])
    row.end_step()
    assert [entry.decision for entry in row.trace] == [decision]
    assert row.spent_flops == (COST.at_width(width) if decision == "run" else 0)


def test_branches_pay_from_one_allowance(block: ElasticBlock) -> None:
    rows = [row_of(RUN_IN_FULL) for _ in range(3)]
    shared = Allowance(75.0)
    for row in rows:
        row.begin_step(0, 1, Policy(), shared)
    report = run_block(block, 0, streams_of(3), None, rows).report
    assert (report.num_run, report.num_skipped) == (2, 1)
    assert shared.flops == 15


def test_step_that_does_not_end_changes_nothing_about_the_row(block: ElasticBlock) -> None:
    row = row_of(REUSE, REUSE)
    row.residuals["only"] = residual = stored(1)
    run_block(block, 0, streams_of(1), None, [row])
    row.begin_step(0, 1, Policy(), Allowance())
    assert (row.spent_flops, row.trace, row.residuals) == (0, [], {"only": residual})


def test_block_that_runs_has_let_its_old_residual_go_before(block: ElasticBlock) -> None:
    """A step that does not end changes nothing else about the row."""
    row = row_of(KEEP)
    row.residuals["only"] = stored(1)
    stored_during_call = []

    def watch(module: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
        stored_during_call.append(dict(row.residuals))
        return call(module, streams)

    run_block(replace(block, call=watch), 0, streams_of(1), None, [row])
    assert stored_during_call == [{}]
    assert (row.spent_flops, row.trace, row.residuals) == (0, [], {})


@pytest.mark.parametrize("num_rows", [1, 4])
def test_residuals_own_their_memory(block: ElasticBlock, num_rows: int) -> None:
    """Views would keep the whole batch's streams."""
    rows = [row_of(KEEP) for _ in range(num_rows)]
    run_block(block, 0, streams_of(num_rows), None, rows)
    for row in rows:
        row.end_step()
        residual = row.residuals["only"]
        for tensor in (residual.hidden_states, residual.encoder_hidden_states):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_nothing_is_stored_after_the_last_computed_step(block: ElasticBlock) -> None:
    """The last computed step may be followed by forecast ones."""
    rows = [row_of(KEEP), row_of(SKIP), row_of(REUSE)]
    for row in rows[1:]:
        row.residuals["only"] = stored(1)
    for row in rows:
        row.begin_step(4, row.num_steps, Policy(), Allowance())
    run_block(block, 0, streams_of(3), None, rows)
    assert rows[0].journal.residuals == {}
    for row in rows:
        row.end_step()
        assert row.residuals == {}


def padded_streams(lengths: Sequence[int], padding: float, seed: int = 0) -> QwenImageStreams:
    """One row for each length, padded to the longest with values of up to `padding`."""
    rng = torch.Generator().manual_seed(seed)
    image, text, temb = (torch.randn(len(lengths), *size, generator=rng) for size in ((5, 4), (max(lengths), 4), (4,)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    is_padded = min(lengths) < max(lengths)
    return QwenImageStreams(
        image,
        torch.where(mask[..., None], text, padding * torch.tensor([1.0, -1.0, 0.5, 0.25])),
        temb,
        torch.ones(5),
        torch.arange(max(lengths)),
        mask if is_padded else None,
        lengths if is_padded else None,
    )


class Masked(nn.Module):
    """A block that respects the mask, as attention does: padding does not affect real tokens."""

    def forward(self, streams: Streams) -> tuple[Tensor, Tensor]:
        assert isinstance(streams, QwenImageStreams)
        text, mask = streams.encoder_hidden_states, streams.encoder_hidden_states_mask
        total = (text if mask is None else text * mask[..., None]).sum(1, keepdim=True)
        return text * 2 + total + streams.temb[:, None], streams.hidden_states + total


@pytest.fixture
def masked_block() -> ElasticBlock:
    return ElasticBlock("only", {1.0: Masked()}, call, None)


@pytest.mark.parametrize("num_running", [2, 3], ids=["some rows run", "all rows run"])
def test_mask_is_the_same_after_a_block(masked_block: ElasticBlock, num_running: int) -> None:
    before = padded_streams([2, 4, 3], padding=9.0)
    rows = [row_of(RUN_IN_FULL if i < num_running else SKIP) for i in range(3)]
    after = run_block(masked_block, 0, before, None, rows).streams
    assert isinstance(after, QwenImageStreams)
    assert after.encoder_hidden_states_mask is before.encoder_hidden_states_mask
    assert not torch.equal(after.hidden_states, before.hidden_states)


@pytest.mark.parametrize("num_keeping", [1, 3], ids=["some rows run", "all rows run"])
def test_kept_residual_holds_real_text_tokens_only(masked_block: ElasticBlock, num_keeping: int) -> None:
    lengths = [2, 4, 3]
    rows = [row_of(KEEP if i < num_keeping else SKIP) for i in range(3)]
    before = padded_streams(lengths, padding=9.0)
    after = run_block(masked_block, 0, before, None, rows).streams
    for i, (row, length) in enumerate(zip(rows[:num_keeping], lengths, strict=False)):
        row.end_step()
        residual = row.residuals["only"].encoder_hidden_states
        assert residual.shape == (length, 4)
        added = after.encoder_hidden_states[i, :length] - before.encoder_hidden_states[i, :length]
        assert torch.equal(residual, added)


@pytest.mark.parametrize("companions", [[], [7], [2], [7, 5]], ids=["none", "longer", "shorter", "two"])
def test_residual_is_added_to_real_tokens_only(masked_block: ElasticBlock, companions: list[int]) -> None:
    """It is stored among rows of 4 and 3 tokens; later companions change the padding."""
    row = row_of(KEEP, REUSE)
    rows = [row_of(SKIP), row, row_of(SKIP)]
    run_block(masked_block, 0, padded_streams([4, 3, 3], padding=9.0), None, rows)
    row.end_step()
    residual = row.residuals["only"]
    others = [row_of(REUSE) for _ in companions]
    for other, length in zip(others, companions, strict=True):
        other.residuals["only"] = Residual(torch.ones(5, 4), torch.ones(length, 4))
    row.begin_step(1, 2, Policy(), Allowance())
    before = padded_streams([*companions, 3], padding=-5.0, seed=1)
    after = run_block(masked_block, 0, before, None, [*others, row]).streams
    assert torch.equal(after.hidden_states[-1], before.hidden_states[-1] + residual.hidden_states)
    text = before.encoder_hidden_states[-1].clone()
    text[:3] += residual.encoder_hidden_states
    assert torch.equal(after.encoder_hidden_states[-1], text)


def test_values_in_the_padding_do_not_affect_decisions(masked_block: ElasticBlock) -> None:
    torch.manual_seed(0)
    router = Router(4, hidden=8)
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    block = replace(masked_block, router=router.requires_grad_(False))
    seen = []
    for padding in (0.0, 9.0, -1e4):
        rows = [row_of(RUN_IN_FULL) for _ in range(2)]
        streams = padded_streams([2, 6], padding)
        run_block(block, 0, streams, router.modulation(streams.temb), rows)
        seen.append([(row.rule.seen[0].depth_prob, row.rule.seen[0].width_logits) for row in rows])  # type: ignore[attr-defined]  # Scripted
    for other in seen[1:]:
        for (depth, widths), (expected_depth, expected_widths) in zip(other, seen[0], strict=True):
            assert depth == pytest.approx(expected_depth)
            assert widths == pytest.approx(expected_widths)


class Recording(Masked):
    """Records the shape of the text stream in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int]] = []

    def forward(self, streams: Streams) -> tuple[Tensor, Tensor]:
        self.shapes.append((streams.encoder_hidden_states.shape[0], streams.encoder_hidden_states.shape[1]))
        return super().forward(streams)


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ([40, 6], [(2, 40)]),
        ([40, 6, 40, 6, 40, 6], [(3, 40), (3, 6)]),
        ([200, 150, 120, 20], [(3, 200), (1, 20)]),
        ([7, 7, 7], [(3, 7)]),
    ],
    ids=["little padding", "as much as a call", "from the longest on", "none"],
)
def test_rows_share_a_call_while_padding_costs_less(lengths: list[int], calls: list[tuple[int, int]]) -> None:
    module = Recording()
    block = ElasticBlock("only", {1.0: module}, call, None)
    before = padded_streams(lengths, padding=9.0)
    together = run_block(block, 0, before, None, [row_of(RUN_IN_FULL) for _ in lengths]).streams
    assert module.shapes == calls
    for i, length in enumerate(lengths):
        alone = replace(
            before,
            hidden_states=before.hidden_states[i : i + 1],
            encoder_hidden_states=before.encoder_hidden_states[i : i + 1, :length],
            temb=before.temb[i : i + 1],
            encoder_hidden_states_mask=None,
            text_lengths=None,
        )
        text, image = Masked()(alone)
        torch.testing.assert_close(together.hidden_states[i], image[0])
        torch.testing.assert_close(together.encoder_hidden_states[i, :length], text[0])


def test_rows_of_large_images_share_no_masked_call() -> None:
    module = Recording()
    before = replace(padded_streams([9, 7, 9], padding=9.0), hidden_states=torch.zeros(3, 2000, 4))
    run_block(ElasticBlock("only", {1.0: module}, call, None), 0, before, None, [row_of(RUN_IN_FULL) for _ in range(3)])
    assert module.shapes == [(2, 9), (1, 7)]


class Looking(nn.Module):
    """Adds the mean of the context to rows that have one, 7 to the others, and records how many rows had one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []

    def forward(self, streams: Streams) -> tuple[Tensor, Tensor]:
        assert isinstance(streams, PlainStreams)
        context, rows = streams.context, streams.context_index
        self.calls.append((len(streams.temb), 0 if context is None else len(context)))
        added = torch.full((len(streams.temb),), 7.0)
        if context is not None:
            added[slice(None) if rows is None else rows] = context.mean((1, 2))
        return streams.encoder_hidden_states, streams.hidden_states + added[:, None, None]


def with_context(num_rows: int, context: Tensor, context_rows: Sequence[int]) -> PlainStreams:
    plain = streams_of(num_rows)
    return PlainStreams(
        plain.hidden_states,
        plain.encoder_hidden_states,
        plain.temb,
        context,
        context_rows,
        torch.tensor(context_rows),
    )


@pytest.mark.parametrize(
    ("running", "num_looking"), [([0, 1, 2, 3], 2), ([0, 1, 2], 1), ([1, 3], 1), ([0, 3], 2), ([1, 2], 0)]
)
def test_rows_without_context_run_beside_those_with_one(running: list[int], num_looking: int) -> None:
    looking = Looking()
    block = ElasticBlock("only", {1.0: looking}, lambda module, streams: module(streams), None)
    rows = [row_of(RUN_IN_FULL if i in running else SKIP) for i in range(4)]
    context = torch.tensor([1.0, 4.0])[:, None, None].expand(2, 3, 2)
    before = with_context(4, context, [0, 3])
    after = run_block(block, 0, before, None, rows).streams
    assert looking.calls == [(len(running), num_looking)]
    added = (after.hidden_states - before.hidden_states)[:, 0, 0]
    expected = [value if i in running else 0.0 for i, value in enumerate([1.0, 7.0, 7.0, 4.0])]
    torch.testing.assert_close(added, torch.tensor(expected))


@dataclass(frozen=True, slots=True)
class Handed(Streams):
    """Streams with something that one block leaves and a later one takes."""

    left: Tensor


def test_hooks_around_a_block_run_for_every_row_and_are_always_counted() -> None:
    """A row that skips a block still takes part in the model's long skips."""

    def enter(streams: Streams) -> Streams:
        assert isinstance(streams, Handed)
        return replace(streams, hidden_states=streams.hidden_states + streams.left)

    def leave(streams: Streams) -> Streams:
        assert isinstance(streams, Handed)
        return replace(streams, left=streams.hidden_states)

    block = ElasticBlock(
        "only",
        {1.0: nn.Identity()},
        lambda module, streams: (streams.encoder_hidden_states, streams.hidden_states * 10),
        None,
        enter,
        leave,
    )
    rows = [row_of(SKIP), row_of(RUN_IN_FULL)]
    for row in rows:
        row.costs = {"only": replace(COST, always=5.0)}
    plain = streams_of(2)
    before = Handed(plain.hidden_states, plain.encoder_hidden_states, plain.temb, torch.ones(2, 1, 1))
    after = run_block(block, 0, before, None, rows).streams
    assert isinstance(after, Handed)
    torch.testing.assert_close(after.hidden_states[0], before.hidden_states[0] + 1)
    torch.testing.assert_close(after.hidden_states[1], (before.hidden_states[1] + 1) * 10)
    assert torch.equal(after.left, after.hidden_states)
    assert [row.journal.flops for row in rows] == [5.0, 5.0 + COST.at_width(1.0)]
