"""From receipts and model cards to response bodies."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from statistics import fmean

from models.card import Edits, ImageCard, MeshCard, ModelCard
from models.curve import CurvePoint
from models.report import StepDecision
from service.api.responses import (
    BlocksBody,
    ComputedStepsBody,
    CurvePointBody,
    DecisionBody,
    DefaultsBody,
    InputTokensBody,
    LimitsBody,
    MeshReportBody,
    ModelBody,
    OctreeResolutionsBody,
    ReceiptBody,
    SecondsBody,
    SizesBody,
    StepsBody,
    UsageBody,
)
from service.api.schemas import DEFAULT_MASKED_STRENGTH, DEFAULT_STRENGTH
from service.jobs.job import Receipt


def job_receipt_body(receipts: Sequence[Receipt]) -> ReceiptBody:
    """The receipt of a whole job, whose artifacts all have one budget, rule and number of steps."""
    if len(receipts) == 1:
        return receipt_body(receipts[0])
    return _merged(receipts)


def receipt_body(receipt: Receipt) -> ReceiptBody:
    """The receipt of one artifact, with its decisions if it was traced."""
    body = _merged([receipt])
    if receipt.mesh is not None:
        body.mesh = MeshReportBody(**asdict(receipt.mesh))
    if (decisions := receipt.decisions) is not None:
        body.decisions = _decisions_by_step(decisions)
    return body


def _merged(receipts: Sequence[Receipt]) -> ReceiptBody:
    summaries = [receipt.summary for receipt in receipts]
    seconds = [receipt.seconds for receipt in receipts]
    return ReceiptBody(
        rule=summaries[0].rule,
        skip_threshold=(
            fmean(summary.skip_threshold_first for summary in summaries),
            fmean(summary.skip_threshold_last for summary in summaries),
        ),
        quality_requested=receipts[0].quality_requested,
        quality_applied=fmean(summary.quality_applied for summary in summaries),
        exact=_exact([summary.exact_tolerance for summary in summaries]),
        compute_ratio=fmean(summary.compute_ratio for summary in summaries),
        compute_ratio_predicted=fmean(summary.compute_ratio_predicted for summary in summaries),
        steps=StepsBody(
            computed=sum(summary.num_steps_computed for summary in summaries),
            forecast=sum(summary.num_steps_forecast for summary in summaries),
        ),
        calibrated=all(summary.is_calibrated for summary in summaries),
        blocks=BlocksBody(
            run=sum(summary.num_run for summary in summaries),
            skipped=sum(summary.num_skipped for summary in summaries),
            reused=sum(summary.num_reused for summary in summaries),
            forecast=sum(summary.num_forecast for summary in summaries),
        ),
        mean_mlp_width=fmean(summary.mean_mlp_width for summary in summaries),
        num_inference_steps=summaries[0].num_inference_steps,
        seconds=SecondsBody(
            queue=_longest(stage.queue for stage in seconds),
            encode=_longest(stage.encode for stage in seconds),
            denoise=_longest(stage.denoise for stage in seconds),
            decode=_longest(stage.decode for stage in seconds),
            total=_longest(stage.total for stage in seconds),
        ),
        batch_size_mean=fmean(receipt.batch_size_mean for receipt in receipts),
        degraded=receipts[0].is_degraded,
        deadline_met=None if receipts[0].deadline_met is None else all(receipt.deadline_met for receipt in receipts),
    )


def _exact(tolerances: Sequence[float | None]) -> bool | str:
    known = [tolerance for tolerance in tolerances if tolerance is not None]
    if len(known) < len(tolerances):
        return False
    return f"within {max(known):g}" if any(known) else True


def usage_body(receipts: Iterable[Receipt]) -> UsageBody:
    """The tokens of all these images."""
    counts = [receipt.summary.tokens for receipt in receipts]
    text, pictures = sum(tokens.prompts for tokens in counts), sum(tokens.pictures for tokens in counts)
    latents = sum(tokens.latents for tokens in counts)
    return UsageBody(
        input_tokens=text + pictures,
        input_tokens_details=InputTokensBody(image_tokens=pictures, text_tokens=text),
        output_tokens=latents,
        total_tokens=text + pictures + latents,
    )


def model_body(card: ModelCard) -> ModelBody:
    body = ModelBody(
        id=card.id,
        object="model",
        created=card.created,
        owned_by="elastic-dit",
        family=card.family,
        modality=card.modality,
        license=card.license,
        guidance=card.guidance,
        defaults=DefaultsBody(
            num_inference_steps=card.default_num_inference_steps,
            guidance_scale=card.default_guidance_scale,
        ),
        limits=LimitsBody(num_inference_steps=card.max_num_inference_steps, batch_size=card.max_batch_size),
        rules=list(card.rules),
        quality_metric=card.quality_metric,
        curve=[_curve_point_body(point, card) for point in card.curve],
    )
    match card:
        case ImageCard():
            body.sizes = SizesBody(**asdict(card.sizes))
            body.edits = card.edits
            body.max_input_images = card.max_input_images
            body.needs_input_image = card.needs_input_image
            body.defaults.size = f"{card.default_width}x{card.default_height}"
            if card.edits is Edits.NOISED:
                body.defaults.strength, body.defaults.masked_strength = DEFAULT_STRENGTH, DEFAULT_MASKED_STRENGTH
            body.backgrounds = ["opaque", "transparent"] if card.can_be_transparent else ["opaque"]
            body.limits.prompt_characters = card.max_prompt_characters
        case MeshCard():
            body.octree_resolutions = OctreeResolutionsBody(
                multiple_of=card.octree_resolution_step,
                minimum=card.min_octree_resolution,
                maximum=card.max_octree_resolution,
            )
            body.defaults.octree_resolution = card.default_octree_resolution
    return body


def _curve_point_body(point: CurvePoint, card: ModelCard) -> CurvePointBody:
    decode_s = card.decode_seconds(card.default_octree_resolution) if isinstance(card, MeshCard) else 0.0
    return CurvePointBody(
        preset=point.preset,
        quality=point.quality,
        mean_quality=point.mean_quality,
        steps=ComputedStepsBody(**asdict(point.steps)) if point.steps else None,
        compute_ratio=point.compute_ratio,
        expected_seconds=card.dense_step_seconds * card.default_num_inference_steps * point.relative_seconds + decode_s,
        rule=point.rule,
        policy=asdict(point.policy),
    )


def _decisions_by_step(decisions: Sequence[StepDecision]) -> list[list[DecisionBody]]:
    """`decisions` are in the order of their steps."""
    return [
        [
            DecisionBody(block=entry.block, branch=entry.branch, decision=entry.decision, mlp_width=entry.mlp_width)
            for entry in step
        ]
        for _, step in groupby(decisions, key=lambda entry: entry.step)
    ]


def _longest(seconds: Iterable[float]) -> float:
    """Rounded to microseconds, and not negative even if the clock was set back."""
    return round(max(0.0, *seconds), 6)
