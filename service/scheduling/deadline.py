"""Deadlines: whether one can be met, and the quality of each step that meets it."""

from models.budget import fastest_enough, point_of_quality
from models.card import ModelCard
from models.curve import CurvePoint
from models.request import GenerationRequest, LatencyBudget
from service.errors import DeadlineUnreachable
from service.scheduling.cost import dense_step_seconds, encode_seconds, mesh_decode_seconds

# The share of the time left that is kept free, so that a slightly slow step does not break the promise.
_RESERVE = 0.05


def check_reachable(
    request: GenerationRequest, card: ModelCard, *, num_results: int, backlog_s: float, finish_s: float
) -> None:
    """Raise DeadlineUnreachable if even the lowest quality allowed takes longer than the budget.

    `backlog_s` is the work before this request, `finish_s` the time to encode and decode an image.
    """
    assert isinstance(request.budget, LatencyBudget)
    floor = point_of_quality(request.budget.min_quality, card.curve_for(request))
    dense_s = num_results * request.num_steps * dense_step_seconds(request, card)
    # Prompts are encoded once for all results.
    encode_s = num_results * encode_seconds(request, card) - (num_results - 1) * card.encode_seconds
    decode_s = finish_s + mesh_decode_seconds(request, card)
    predicted_s = backlog_s + encode_s + dense_s * floor.relative_seconds + decode_s
    if predicted_s > request.budget.latency_s:
        raise DeadlineUnreachable(
            f"latency_ms {request.budget.latency_s * 1000:g} can't be met: at the lowest quality allowed, "
            f"{floor.quality:.2f}, this is predicted to take {predicted_s * 1000:.0f} ms, of which "
            f"{backlog_s * 1000:.0f} are the work of earlier requests; allow more time, less quality or fewer "
            "num_inference_steps"
        )


def point_for(
    request: GenerationRequest, card: ModelCard, *, time_left_s: float, steps_left: int, num_computed: int, pace: float
) -> CurvePoint:
    """The best point of the curve at which the remaining steps end in time, never below the floor.

    `time_left_s` is the time until the last step must end. `num_computed` steps were computed before the last
    `steps_left` ones. `pace` is the measured time of a computed step over the predicted one; sharing the device with
    others raises it.
    """
    assert isinstance(request.budget, LatencyBudget)
    dense_steps = time_left_s * (1 - _RESERVE) / (dense_step_seconds(request, card) * pace)
    return fastest_enough(
        card.curve_for(request),
        request.budget.min_quality,
        dense_steps,
        steps_left=steps_left,
        num_computed=num_computed,
    )
