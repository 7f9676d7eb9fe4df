"""Records of the work done: the engine returns them, metrics and receipts are made from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Decision(StrEnum):
    """The decision for one row in one block."""

    RUN = "run"
    SKIP = "skip"
    REUSE = "reuse"
    FORECAST = "forecast"  # the whole step is left out


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One block in one step of a batch: rows per decision, and the MLP width, in (0, 1], of each row that ran."""

    block: str
    seconds: float
    num_run: int
    num_skipped: int
    num_reused: int
    mlp_widths: tuple[float, ...]


def joined(reports: Sequence[BlockReport]) -> BlockReport:
    """The report of one block that was called once for each of `reports`."""
    return BlockReport(
        block=reports[0].block,
        seconds=sum(report.seconds for report in reports),
        num_run=sum(report.num_run for report in reports),
        num_skipped=sum(report.num_skipped for report in reports),
        num_reused=sum(report.num_reused for report in reports),
        mlp_widths=tuple(width for report in reports for width in report.mlp_widths),
    )


@dataclass(frozen=True, slots=True)
class StepReport:
    """One computed denoise step of a batch of requests, and the steps that each of them forecast after it.

    `router_seconds` is part of `seconds`. `num_forecast` is the number of steps that were forecast, of all requests,
    and `num_forecast_rows` that of their rows. `compiled` has the kind of block of every graph that was compiled.
    """

    seconds: float
    router_seconds: float
    batch_size: int
    blocks: tuple[BlockReport, ...]
    num_forecast: int
    num_forecast_rows: int
    compiled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepDecision:
    """One block of one step of one request, for the receipt's trace. `branch` is `cond` or `uncond`.

    In a step that was forecast, `mlp_width` is 0.
    """

    step: int
    branch: str
    block: str
    decision: Decision
    mlp_width: float


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The tokens of one request: of its prompts as the text encoder reads them, of its pictures, and of its latents."""

    prompts: int = 0
    pictures: int = 0
    latents: int = 0


@dataclass(frozen=True, slots=True)
class GenerationSummary:
    """The account of one request, during generation or at its end. The receipt uses these names.

    `compute_ratio` is block compute over the dense block compute of the steps taken. `num_run`, `num_skipped`,
    `num_reused` and `num_forecast` count blocks of rows. `mean_mlp_width` is the mean over blocks that ran, 1 if none
    did. `is_calibrated` says whether the curve was measured for requests like this one. `tokens` are all 0 in records
    of earlier versions. `exact_tolerance` is how far the latents may be from those of the publisher's pipeline, 0 for
    bit for bit; None, also in records of earlier versions, if they are not meant to be the same.
    """

    rule: str
    skip_threshold_first: float
    skip_threshold_last: float
    quality_applied: float
    compute_ratio: float
    compute_ratio_predicted: float
    num_run: int
    num_skipped: int
    num_reused: int
    num_forecast: int
    mean_mlp_width: float
    num_inference_steps: int
    num_steps_computed: int
    num_steps_forecast: int
    is_calibrated: bool
    decisions: tuple[StepDecision, ...] | None
    tokens: TokenCounts = TokenCounts()
    exact_tolerance: float | None = None


@dataclass(frozen=True, slots=True)
class MeshReport:
    """`is_watertight` means that each edge belongs to two faces of consistent orientation."""

    num_vertices: int
    num_faces: int
    num_components: int
    num_removed_floaters: int
    is_watertight: bool
