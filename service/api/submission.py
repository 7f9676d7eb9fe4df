"""From a valid request to a job in the store: build the job, admit it, record it."""

import hashlib
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from fastapi import Request

from models.budget import resolve
from models.card import ModelCard
from models.errors import InvalidRequest, UnknownModel
from models.request import ImageRequest, LatencyBudget, MeshRequest, QualityBudget
from service.api.caller import Caller, caller_of
from service.api.generation_route import GenerationHeaders
from service.api.parsing import quality_of
from service.api.schemas import GenerationBody, ResponseFormat
from service.jobs.job import Job, Output, Priority
from service.jobs.store import Idempotency
from service.running.dispatcher import Dispatcher
from service.scheduling.admission import admit
from service.scheduling.cost import predicted_seconds
from service.scheduling.deadline import check_reachable
from service.scheduling.load import lowered_quality
from service.settings import Settings
from service.webhooks import check_webhook_url

Card = TypeVar("Card", bound=ModelCard)

# Printable ASCII, at most as long as every store can hold.
_IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")


def card_of(model: str | None, loaded: Mapping[str, ModelCard], card_type: type[Card]) -> Card:
    """The card of `model`, or the first card of `card_type`. Raises UnknownModel, InvalidRequest for another type."""
    cards = {name: card for name, card in loaded.items() if isinstance(card, card_type)}
    kind = card_type.modality
    if model is None:
        if not cards:
            raise UnknownModel(f"no {kind} model is loaded; loaded: {', '.join(loaded)}")
        return next(iter(cards.values()))
    if model in cards:
        return cards[model]
    if model in loaded:
        able = f"try {', '.join(cards)}" if cards else f"no {kind} model is loaded"
        raise InvalidRequest(f"model '{model}' makes no {kind}, but a {loaded[model].modality}; {able}", "model")
    raise UnknownModel(f"there is no model '{model}'; loaded: {', '.join(loaded)}")


def job_of(
    requests: tuple[ImageRequest | MeshRequest, ...],
    output: Output,
    body: GenerationBody,
    card: ModelCard,
    headers: GenerationHeaders,
    caller: Caller,
    settings: Settings,
) -> Job:
    """The job that `body` asks for. Raises InvalidRequest for ways of answering that exclude each other."""
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
    return Job(
        id=f"job_{uuid.uuid4().hex}",
        model=card.id,
        requests=requests,
        output=output,
        priority=body.priority or Priority.NORMAL,
        quality_requested=quality_of(requests[0].budget, card),
        predicted_seconds=sum(predicted_seconds(request, card) for request in requests),
        request_id=caller.request_id,
        created_at=time.time(),
        owner=caller.owner,
        num_previews=num_previews,
        webhook_url=body.webhook_url,
    )


async def submit(
    job: Job,
    body: GenerationBody,
    headers: GenerationHeaders,
    request: Request,
    dispatcher: Dispatcher,
    settings: Settings,
) -> Job:
    """Record `job` in the store, or return the job that an earlier call with its idempotency key created.

    Raises InvalidRequest and IdempotencyKeyReused for the key, Overloaded and DeadlineUnreachable if the job is not
    admitted, StoreUnavailable.
    """
    caller = caller_of(request.scope)
    idempotency = _idempotency(body, headers, caller, request.url.path)
    recorded = None if idempotency is None else await dispatcher.store.find(idempotency)
    if recorded is None:
        backlog_s = await dispatcher.store.backlog_s()
        job = _with_promises(job, body, dispatcher, settings, backlog_s)
        admit(job.predicted_seconds, backlog_s=backlog_s, max_backlog_s=settings.max_backlog_s)
        recorded = await dispatcher.store.add(job, idempotency)
    caller.job_id = recorded.id
    return recorded


def _with_promises(job: Job, body: GenerationBody, dispatcher: Dispatcher, settings: Settings, backlog_s: float) -> Job:
    """The job with its deadline, or with the quality that the load leaves it. Raises DeadlineUnreachable."""
    card, request = dispatcher.cards[job.model], job.requests[0]
    if isinstance(request.budget, LatencyBudget):
        finish_s = dispatcher.worker.finish_seconds(job.model)
        check_reachable(request, card, num_results=len(job.requests), backlog_s=backlog_s, finish_s=finish_s)
        return replace(job, deadline_at=job.created_at + request.budget.latency_s)
    default_budget = settings.default_budget
    asked = body.budget or (default_budget if request.budget == default_budget.to_budget() else None)
    if asked is None or asked.min_quality is None:
        return job
    wanted = resolve(request.budget, card.curve).quality
    quality = lowered_quality(wanted, asked.min_quality, backlog_s=backlog_s, max_backlog_s=settings.max_backlog_s)
    lowered = QualityBudget(quality)
    if resolve(lowered, card.curve).quality >= wanted:
        return job
    requests = tuple(replace(request, budget=lowered) for request in job.requests)
    seconds = sum(predicted_seconds(request, card) for request in requests)
    return replace(job, requests=requests, predicted_seconds=seconds, is_degraded=True)


def _idempotency(body: GenerationBody, headers: GenerationHeaders, caller: Caller, path: str) -> Idempotency | None:
    key = headers.idempotency_key
    if key is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest("Idempotency-Key must have 1 to 255 printable ASCII characters", "Idempotency-Key")
    asked = f"{path} {body.model_dump_json(exclude_unset=True)}"
    return Idempotency(caller.owner or "", key, hashlib.sha256(asked.encode()).hexdigest())
