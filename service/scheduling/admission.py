"""Whether an order is accepted, and what is promised. Pure: the clock and the backlog are passed in."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from models.budget import point_of_quality
from models.card import ModelCard
from models.memory import RequestMemory
from models.request import LatencyBudget, QualityBudget
from service.errors import Overloaded
from service.order import Order, input_image_bytes
from service.scheduling.cost import mesh_decode_seconds, order_seconds
from service.scheduling.deadline import planned_point
from service.scheduling.load import lowered_quality
from service.scheduling.memory import check_fits

_MOST_PROMISED = 2.0
"""The most refused work that counts, over the longest backlog. Callers may never come again."""
_SHARE_OF_FREE = 4.0
"""The most work that a key of weight 1 may have, over the free part of the backlog. Alone it can fill four fifths."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """Work before an order: seconds for each worker, and the most that is accepted.

    `seconds` is corrected by `pace`, the measured seconds for each predicted one; `step_pace` is that of steps alone.
    `urgent_seconds` is how much of them an order with a deadline waits for, at most. `finish_s` is how long decoding
    and encoding a result of the order's model takes lately, at the default size, and `delivery_s` from the file to the
    client. `image_bytes` is the size of the input images before the order, at most `max_image_bytes`. `promised_s` is
    refused work whose callers were told to come again and have not yet. `own_s` are the seconds of the backlog that the
    order's API key has, and `weight` is that of the key, None on a server without keys. `num_keys` keys have work, the
    order's included.
    """

    seconds: float
    max_seconds: float
    finish_s: float
    urgent_seconds: float = math.inf
    pace: float = 1.0
    step_pace: float = 1.0
    delivery_s: float = 0.0
    image_bytes: float = 0.0
    max_image_bytes: float = math.inf
    promised_s: float = 0.0
    own_s: float = 0.0
    weight: float | None = None
    num_keys: int = 1


@dataclass(slots=True)
class Intake:
    """What this process has admitted, and how much of it is in the store: predicted seconds, or bytes.

    Calls arrive while others are recorded. What was admitted by now, but not recorded when a call began to read from
    the store, may be missing from what it has read.
    """

    admitted: float = 0.0
    recorded: float = 0.0

    @contextmanager
    def recording(self, amount: float) -> Iterator[None]:
        """The context in which an admitted amount is recorded."""
        self.admitted += amount
        try:
            yield
        finally:
            self.recorded += amount


class Promises:
    """Refused work that may come again, and when. Each caller is told a time at which there is room for all of it."""

    def __init__(self) -> None:
        self._promises: list[tuple[float, float]] = []  # a heap of times and predicted seconds
        self._sum = 0.0  # of all seconds: an overloaded server has many thousands

    def add(self, at: float, seconds: float) -> None:
        """A caller with so many predicted seconds of work was told to come again at this time."""
        heappush(self._promises, (at, seconds))
        self._sum += seconds

    def seconds(self, now: float) -> float:
        """The work that is expected to come again after `now`."""
        while self._promises and self._promises[0][0] <= now:
            self._sum -= heappop(self._promises)[1]
        if not self._promises:
            self._sum = 0.0  # without the errors of rounding
        return self._sum


@dataclass(frozen=True, slots=True)
class Admission:
    """An accepted order. `is_degraded` says that load lowered its quality, within its `min_quality`.

    `predicted_seconds` is not corrected by measured speed, since that may change until the order's turn.
    `decode_seconds` is the part of it that decoding a mesh takes. `latency_s` is the promised time from arrival to
    file, None if the order has no deadline. `memory` is what each of its requests takes of the device.
    """

    order: Order
    predicted_seconds: float
    decode_seconds: float
    is_degraded: bool
    latency_s: float | None
    memory: RequestMemory


def admit(order: Order, card: ModelCard, backlog: Backlog) -> Admission:
    """Accept `order`, with a deadline or a lowered quality where its budget allows one.

    Raises InvalidRequest for what the device has too little memory for, DeadlineUnreachable if even the lowest quality
    allowed takes too long, Overloaded if the backlog would become too long.
    """
    request = order.requests[0]
    latency_s = None
    wanted = order
    if isinstance(request.budget, LatencyBudget):
        latency_s = request.budget.latency_s - backlog.delivery_s
        point = planned_point(
            request,
            card,
            num_results=len(order.requests),
            # All work together may be less than `urgent_seconds`, which allows for two long steps.
            backlog_s=min(backlog.seconds / min(1.0, backlog.pace), backlog.urgent_seconds),
            finish_s=backlog.finish_s,
            pace=backlog.step_pace,
            delivery_s=backlog.delivery_s,
        )
        order = wanted = replace(order, requests=tuple(replace(one, point=point) for one in order.requests))
    else:
        order = _lowered(order, card, backlog)
    check_fits(order.requests[0], card)
    _check_images(order, backlog)
    seconds = order_seconds(order.requests, card)
    _check_room(seconds * backlog.pace, backlog)
    _check_share(seconds * backlog.pace, backlog)
    decode_s = sum(mesh_decode_seconds(request, card) for request in order.requests)
    return Admission(order, seconds, decode_s, order != wanted, latency_s, card.memory_of(order.requests[0]))


def _lowered(order: Order, card: ModelCard, backlog: Backlog) -> Order:
    """The order at the quality that load leaves of it."""
    if order.min_quality is None:
        return order
    wanted = order.point.quality
    quality = lowered_quality(wanted, order.min_quality, backlog_s=backlog.seconds, max_backlog_s=backlog.max_seconds)
    point = point_of_quality(quality, card.curve_for(order.requests[0]))
    if point.quality >= wanted:
        return order
    budget = QualityBudget(quality)
    return replace(order, requests=tuple(replace(request, budget=budget, point=point) for request in order.requests))


def _check_images(order: Order, backlog: Backlog) -> None:
    """Raise Overloaded if the input images of waiting orders would take too much memory."""
    image_bytes = input_image_bytes(order.requests)
    if image_bytes and backlog.image_bytes and backlog.image_bytes + image_bytes > backlog.max_image_bytes:
        retry_after_s = max(1, math.ceil(backlog.seconds / 2))
        raise Overloaded(
            f"the images of waiting requests have {backlog.image_bytes:.0f} bytes and this one would add "
            f"{image_bytes}, more than the {backlog.max_image_bytes:.0f} that are kept; try again in {retry_after_s} s",
            retry_after_s,
        )


def _check_room(cost_s: float, backlog: Backlog) -> None:
    """Raise Overloaded if `cost_s` more would make the backlog too long.

    An idle server takes any order, however long, since waiting would not make it shorter. Callers are told to wait
    until half of the room would be free after all accepted work, and all work that was refused before. So they return
    spread out, and find room once the load falls.
    """
    excess_s = backlog.seconds + cost_s - backlog.max_seconds
    if backlog.seconds <= 0 or excess_s <= 0:
        return
    promised_s = min(backlog.promised_s, _MOST_PROMISED * backlog.max_seconds)
    retry_after_s = max(1, math.ceil(min(excess_s + backlog.max_seconds / 2, backlog.seconds) + promised_s))
    raise Overloaded(
        f"the server has {backlog.seconds:.1f} s of work and this request would add {cost_s:.1f} s, more than the "
        f"{backlog.max_seconds:g} s it accepts; try again in {retry_after_s} s",
        retry_after_s,
    )


def _check_share(cost_s: float, backlog: Backlog) -> None:
    """Raise Overloaded if `cost_s` more would be too much of the backlog for one API key.

    Each key may have as much as is left free, times its weight and a factor (dynamic thresholds, Choudhury and Hahne
    1998, https://doi.org/10.1109/90.664262). So there is always room for a key that has nothing yet, and keys that ask
    for more than there is have shares in proportion to their weights. A key that has nothing may have any order.
    """
    if backlog.weight is None or backlog.own_s <= 0:
        return
    most_s = _SHARE_OF_FREE * backlog.weight * max(0.0, backlog.max_seconds - backlog.seconds)
    if backlog.own_s + cost_s <= most_s:
        return
    retry_after_s = max(1, math.ceil(backlog.own_s + cost_s - most_s + backlog.seconds / 2))
    raise Overloaded(
        f"this API key has {backlog.own_s:.1f} s of work here and this request would add {cost_s:.1f} s, more than the "
        f"{most_s:.1f} s that one key may have while the server has {backlog.seconds:.1f} s; try again in "
        f"{retry_after_s} s",
        retry_after_s,
    )
