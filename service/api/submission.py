"""From an order to a job in the store: admit the order, make the job, record it."""

import asyncio
import hashlib
import math
import re
import uuid

from fastapi import Request

from models.card import ModelCard
from models.errors import InvalidRequest
from service.api.caller import Caller, caller_of
from service.api.generation_route import GenerationHeaders
from service.api.schemas import GenerationBody, ResponseFormat
from service.api.validation import shown
from service.errors import Overloaded
from service.jobs.job import Job, Priority
from service.jobs.store import Idempotency
from service.order import Order, input_image_bytes
from service.running.dispatcher import Dispatcher
from service.scheduling.admission import Admission, Backlog, admit
from service.scheduling.cost import order_seconds
from service.scheduling.queueing import due_at
from service.settings import Settings
from service.webhooks import check_webhook_url

# Printable ASCII, at most as long as every store can hold.
_IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")
_ROOM_OF_HIGH = 1.25
"""The longest backlog in which an order of high priority is accepted, over that of all others."""


async def submit(
    order: Order,
    card: ModelCard,
    body: GenerationBody,
    headers: GenerationHeaders,
    request: Request,
    dispatcher: Dispatcher,
    settings: Settings,
) -> Job:
    """Make a job of `order` and record it, or return the job that an earlier call with its idempotency key created.

    Raises InvalidRequest for ways of answering that exclude each other and for a malformed key, IdempotencyKeyReused,
    Overloaded and DeadlineUnreachable if the order is not admitted, StoreUnavailable.
    """
    _check_answering(body, headers, settings)
    _check_trace(order, card, settings.max_trace_decisions)
    caller = caller_of(request.scope)
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    idempotency = await asyncio.to_thread(_idempotency, body, headers, caller, path)  # it hashes pictures
    recorded = None if idempotency is None else await dispatcher.store.find(idempotency)
    if recorded is None:
        created_at = dispatcher.store.clock()
        backlog = await _backlog(order, card, dispatcher, caller, _max_backlog_s(body, settings), settings)
        try:
            job = _job_of(admit(order, card, backlog), backlog, body, caller, created_at)
        except Overloaded as error:
            cost_s = order_seconds(order.requests, card) * backlog.pace
            dispatcher.promises.add(created_at + error.retry_after_s, cost_s)
            raise
        with (
            dispatcher.work_intake.recording(job.predicted_seconds),
            dispatcher.intakes_of_keys[caller.owner].recording(job.predicted_seconds),
            dispatcher.image_intake.recording(input_image_bytes(job.requests)),
        ):
            recorded = await dispatcher.store.add(job, idempotency)
    caller.job_id = recorded.id
    return recorded


def _max_backlog_s(body: GenerationBody, settings: Settings) -> float:
    """High priority has room above what all others may fill."""
    return settings.max_backlog_s * (_ROOM_OF_HIGH if body.priority is Priority.HIGH else 1.0)


async def _backlog(
    order: Order, card: ModelCard, dispatcher: Dispatcher, caller: Caller, max_seconds: float, settings: Settings
) -> Backlog:
    """The work before `order`: what is in the store, and what this process was adding while that was read."""
    work, images, own = dispatcher.work_intake, dispatcher.image_intake, dispatcher.intakes_of_keys[caller.owner]
    recorded_s, recorded_bytes, own_recorded_s = work.recorded, images.recorded, own.recorded
    load = await dispatcher.store.load(caller.owner)
    seconds = dispatcher.fleet.seconds_before(card.id, load)
    if math.isinf(seconds):  # the last worker has gone since the card was found
        raise dispatcher.fleet.unavailable(card.id)
    all_s = sum(of_model.seconds for of_model in load.models.values())
    recorded_own_s = load.own_s / all_s * seconds if all_s else 0.0
    pace = dispatcher.fleet.pace(card.id)
    rate = pace / dispatcher.fleet.num_workers(card.id)
    return Backlog(
        seconds=seconds + (work.admitted - recorded_s) * rate,
        urgent_seconds=dispatcher.fleet.urgent_seconds_before(card.id, load) + (work.admitted - recorded_s) * rate,
        max_seconds=max_seconds,
        finish_s=dispatcher.fleet.finish_seconds(card.id),
        pace=pace,
        step_pace=dispatcher.fleet.step_pace(card.id),
        delivery_s=dispatcher.delivery_s,
        image_bytes=load.image_bytes + images.admitted - recorded_bytes,
        max_image_bytes=settings.max_input_image_bytes,
        promised_s=dispatcher.promises.seconds(dispatcher.store.clock()),
        own_s=0.0 if caller.key is None else recorded_own_s + (own.admitted - own_recorded_s) * rate,
        weight=None if caller.key is None else caller.key.weight,
        num_keys=load.num_owners + (not load.own_s),
    )


def _check_answering(body: GenerationBody, headers: GenerationHeaders, settings: Settings) -> None:
    """Raise InvalidRequest for ways of answering that exclude each other."""
    num_previews = body.partial_images or 0
    if body.stream and headers.is_async:
        raise InvalidRequest("stream and Prefer: respond-async exclude one another; choose one", "stream")
    if body.stream and body.response_format is ResponseFormat.BINARY:
        raise InvalidRequest("a stream can't hold response_format binary; try b64_json or url", "response_format")
    if num_previews and not (body.stream or headers.is_async):
        raise InvalidRequest(
            f"partial_images {num_previews} needs stream, or Prefer: respond-async; try 0", "partial_images"
        )
    if body.webhook_url is not None:
        check_webhook_url(body.webhook_url, settings.webhook_hosts)


def _check_trace(order: Order, card: ModelCard, most: int) -> None:
    """Raise InvalidRequest if the trace would have more than `most` decisions."""
    request, num_results = order.requests[0], len(order.requests)
    size = num_results * request.num_steps * order.num_branches * len(card.blocks)
    if request.wants_trace and size > most:
        raise InvalidRequest(
            f"a trace of n {num_results} and num_inference_steps {request.num_inference_steps} has {size} decisions, "
            f"more than the {most} that this server keeps; ask for less of either, or for no trace",
            "trace",
        )


def _job_of(admission: Admission, backlog: Backlog, body: GenerationBody, caller: Caller, created_at: float) -> Job:
    order = admission.order
    deadline_at = None if admission.latency_s is None else created_at + admission.latency_s
    return Job(
        id=f"job_{uuid.uuid4().hex}",
        model=order.requests[0].model,
        requests=order.requests,
        output=order.output,
        priority=body.priority or Priority.NORMAL,
        quality_requested=order.quality_requested,
        predicted_seconds=admission.predicted_seconds,
        decode_seconds=admission.decode_seconds,
        request_id=caller.request_id,
        created_at=created_at,
        owner=caller.owner,
        deadline_at=deadline_at,
        is_degraded=admission.is_degraded,
        num_previews=body.partial_images or 0,
        webhook_url=body.webhook_url,
        memory=admission.memory,
        due_at=due_at(
            created_at,
            admission.predicted_seconds * backlog.pace,
            deadline_at=deadline_at,
            own_s=backlog.own_s,
            weight=backlog.weight or 1.0,
            num_keys=backlog.num_keys,
        ),
    )


def _idempotency(body: GenerationBody, headers: GenerationHeaders, caller: Caller, path: str) -> Idempotency | None:
    key = headers.idempotency_key
    if key is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest(
            f"Idempotency-Key {shown(key)} must have 1 to 255 printable ASCII characters", "Idempotency-Key"
        )
    asked = f"{path} {body.model_dump_json(exclude_unset=True)}"
    return Idempotency(caller.owner or "", key, hashlib.sha256(asked.encode()).hexdigest())
