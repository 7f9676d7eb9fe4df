"""One picture in this process, without a server or a queue."""

import sys
import time
from pathlib import Path

import typer

from models.engine import load_engine
from service.api.parsing import parse_output, parse_requests, quality_of
from service.api.responses import ReceiptBody
from service.api.schemas import ImageBody
from service.api.views import receipt_body
from service.jobs.job import Receipt, StageSeconds
from service.output import encode_output
from service.settings import Settings


def generate_picture(
    directory: Path, body: ImageBody, settings: Settings, *, random_seed: int
) -> tuple[bytes, ReceiptBody]:
    """The file and the receipt of `body`'s picture, with a progress bar on stderr meanwhile."""
    engine = load_engine(
        [directory],
        device=settings.device,
        router_weights=settings.router_weights,
        offload_text_encoders=settings.offload_text_encoders,
    )
    (card,) = engine.cards.values()
    default_budget = settings.default_budget.to_budget()
    (request,) = parse_requests(body, card, default_budget=default_budget, random_seed=random_seed)
    output = parse_output(body)
    arrived = time.perf_counter()
    state = engine.start(request)
    started = time.perf_counter()
    with typer.progressbar(length=request.num_inference_steps, label="denoising", file=sys.stderr) as progress:
        while not state.is_done:
            engine.step([state])
            progress.update(1)
    denoised = time.perf_counter()
    pixels = engine.finish(state)
    decoded = time.perf_counter()
    data = encode_output(pixels, request, output)
    seconds = StageSeconds(
        queue=0.0,
        encode=started - arrived,
        denoise=denoised - started,
        decode=decoded - denoised,
        total=time.perf_counter() - arrived,
    )
    return data, receipt_body(Receipt(state.summary(), quality_of(request.budget, card), seconds, batch_size_mean=1.0))
