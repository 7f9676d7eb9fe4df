"""Deadlines: whether one can be met, and the quality of each step that meets it."""

from models.budget import fastest_enough, point_of_quality
from models.card import ModelCard
from models.curve import CurvePoint
from models.request import GenerationRequest, LatencyBudget
from service.errors import DeadlineUnreachable
from service.scheduling.cost import dense_step_seconds, encode_seconds, finish_seconds, mesh_decode_seconds

_RESERVE = 0.05
"""The share of the time left that is kept free, so that a slightly slow step does not break the promise."""
_RESERVE_OF_PROMISE = 0.1
"""The share of the whole time that is kept free at admission, since others have the device during encoding."""
_DELIVERY_S = 0.05
"""Seconds on the network, and until a call is a job. They are not measured."""
_SHARE_OF_SPARE = 0.3
"""A new request is planned at a better point than its lowest for so much of the time that others leave it. The rest is
for those that come later."""
_MARGIN = 0.02
"""The share of the whole time that is left after the last step for what takes longer than predicted. What `_RESERVE`
leaves shrinks with the time left."""


def planned_point(
    request: GenerationRequest,
    card: ModelCard,
    *,
    num_results: int,
    backlog_s: float,
    finish_s: float,
    pace: float = 1.0,
    delivery_s: float = 0.0,
) -> CurvePoint:
    """The best point of the curve for a new request beside others with deadlines. Without them, it may do better.

    `backlog_s` is the work that goes before it. `finish_s` is the time that decoding and encoding an image took lately
    at the model's default size, and `delivery_s` is that from the file to the client. `pace` is the measured over the
    predicted time of steps. What sharing steps saves is not counted: this request may have to step alone. Raises
    DeadlineUnreachable if even the lowest quality allowed takes longer than the budget.
    """
    assert isinstance(request.budget, LatencyBudget)
    curve, min_quality = card.curve_for(request), request.budget.min_quality
    floor = point_of_quality(min_quality, curve)
    least_steps = floor.dense_steps_left(request.num_steps, 0)
    step_s = num_results * dense_step_seconds(request, card)
    # Prompts are encoded once for all results.
    encode_s = num_results * encode_seconds(request, card) - (num_results - 1) * card.encode_seconds
    own_s = encode_s + least_steps * step_s + mesh_decode_seconds(request, card)
    own_s = max(1.0, pace) * own_s + finish_seconds(request, card, finish_s) + delivery_s + _DELIVERY_S
    needed_s = (backlog_s + own_s) / (1 - _RESERVE_OF_PROMISE)
    if needed_s > request.budget.latency_s:
        raise DeadlineUnreachable(
            f"latency_ms {request.budget.latency_s * 1000:g} can't be met: at the lowest quality allowed, "
            f"{floor.quality:.2f}, this needs {needed_s * 1000:.0f} ms. {backlog_s * 1000:.0f} of them are the work of "
            f"earlier requests, and {needed_s * _RESERVE_OF_PROMISE * 1000:.0f} are kept in reserve. Allow more time, "
            "less quality or fewer num_inference_steps"
        )
    spare_s = (1 - _RESERVE_OF_PROMISE) * (request.budget.latency_s - needed_s)
    dense_steps = least_steps + _SHARE_OF_SPARE * spare_s / step_s
    return fastest_enough(curve, min_quality, dense_steps, steps_left=request.num_steps)


def seconds_for_steps(request: GenerationRequest, card: ModelCard, *, left_s: float, finish_s: float) -> float:
    """Seconds until the last step must end, `left_s` before the deadline; `finish_s` is as in `planned_point`.

    The file of another request may have to be made first.
    """
    assert isinstance(request.budget, LatencyBudget)
    return left_s - 2 * finish_seconds(request, card, finish_s) - _DELIVERY_S - _MARGIN * request.budget.latency_s


def slack_s(
    request: GenerationRequest, card: ModelCard, *, time_left_s: float, steps_left: int, num_computed: int, pace: float
) -> float:
    """Predicted seconds that others may have until the remaining steps no longer end in time, at the lowest quality.

    `pace` is the measured over the predicted time of steps; the other arguments are those of `point_for`.
    """
    assert isinstance(request.budget, LatencyBudget)
    floor = point_of_quality(request.budget.min_quality, card.curve_for(request))
    dense_steps = floor.dense_steps_left(steps_left, num_computed)
    return time_left_s * (1 - _RESERVE) / pace - dense_steps * dense_step_seconds(request, card)


def point_for(
    request: GenerationRequest,
    card: ModelCard,
    *,
    time_left_s: float,
    steps_left: int,
    num_computed: int,
    pace: float,
    best: float = 1.0,
) -> CurvePoint:
    """The best point of the curve at which the remaining steps end in time, never below the floor.

    Its quality is at most `best`.

    `time_left_s` is the time until the last step must end. `num_computed` steps were computed before the last
    `steps_left` ones. `pace` is the measured time of a computed step over the predicted one; sharing the device with
    others raises it.
    """
    assert isinstance(request.budget, LatencyBudget)
    dense_steps = time_left_s * (1 - _RESERVE) / (dense_step_seconds(request, card) * pace)
    return fastest_enough(
        [point for point in card.curve_for(request) if point.quality <= best],
        request.budget.min_quality,
        dense_steps,
        steps_left=steps_left,
        num_computed=num_computed,
    )
