"""Generate one image or mesh in this process, without a server or a queue."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from models.card import ImageCard, MeshCard, ModelCard
from models.errors import InvalidRequest
from models.mesh.cleanup import CleanMesh
from models.request import LatencyBudget
from service.api.edits import checked_pictures, pictures_given
from service.api.input_image import checked_image
from service.api.parsing import parse_edit_body, parse_image_body, parse_mesh_body
from service.api.responses import ReceiptBody
from service.api.schemas import EditBody, ImageBody, MeshBody
from service.api.views import receipt_body
from service.jobs.job import Receipt, StageSeconds
from service.loading import load_models
from service.order import Order
from service.running.output import encode_output
from service.scheduling.cost import mesh_decode_seconds
from service.scheduling.deadline import point_for
from service.scheduling.memory import check_fits
from service.settings import Settings

if TYPE_CHECKING:
    from models.state import DenoiseState


def generate_image(
    directory: Path, body: ImageBody, settings: Settings, *, random_seed: int
) -> tuple[bytes, ReceiptBody]:
    """Generate the image of `body` and return its file and receipt. Shows a progress bar on stderr."""

    def parse(card: ModelCard) -> Order:
        return parse_image_body(
            body, _image_card(card), default_budget=settings.default_budget, random_seed=random_seed
        )

    return _generate(directory, settings, parse)


def edit_image(
    directory: Path, body: EditBody, files: Mapping[str, bytes], mask: bytes | None, settings: Settings, *, seed: int
) -> tuple[bytes, ReceiptBody]:
    """`generate_image`, from the pictures of `files`, by their names in messages. `seed` is used if `body` has none."""
    pictures = checked_pictures(files, mask, max_pixels=settings.max_image_pixels)

    def parse(card: ModelCard) -> Order:
        pictures_given(body, _image_card(card))
        return parse_edit_body(
            body, _image_card(card), pictures, default_budget=settings.default_budget, random_seed=seed
        )

    return _generate(directory, settings, parse)


def _image_card(card: ModelCard) -> ImageCard:
    if not isinstance(card, ImageCard):
        raise InvalidRequest(f"{card.id} makes no images; try elastic-dit {card.modality}", "model")
    return card


def generate_mesh(
    directory: Path, body: MeshBody, image: bytes, settings: Settings, *, random_seed: int
) -> tuple[bytes, ReceiptBody]:
    """Generate the mesh of `body` from the file `image` and return its file and receipt."""
    checked = checked_image(image, max_pixels=settings.max_image_pixels)

    def parse(card: ModelCard) -> Order:
        if not isinstance(card, MeshCard):
            raise InvalidRequest(f"{card.id} makes no meshes; try elastic-dit generate", "model")
        return parse_mesh_body(body, card, checked, default_budget=settings.default_budget, random_seed=random_seed)

    return _generate(directory, settings, parse)


def _generate(directory: Path, settings: Settings, parse: Callable[[ModelCard], Order]) -> tuple[bytes, ReceiptBody]:
    engine = load_models(settings, [directory])
    (card,) = engine.cards.values()
    order = parse(card)
    (request,) = order.requests
    check_fits(request, card)
    arrived = time.perf_counter()
    state = engine.start(request)
    started = time.perf_counter()
    with typer.progressbar(length=state.num_computed_steps, label="denoising", file=sys.stderr) as progress:
        while not state.is_done:
            if isinstance(request.budget, LatencyBudget):
                left_s = request.budget.latency_s - (time.perf_counter() - arrived) - mesh_decode_seconds(request, card)
                _keep_deadline(state, card, left_s)
            engine.step([state])
            progress.length = state.num_computed_steps
            progress.update(1)
    denoised = time.perf_counter()
    result = engine.finish(state)
    decoded = time.perf_counter()
    data = encode_output(result, request, order.output)
    total_s = time.perf_counter() - arrived
    seconds = StageSeconds(
        queue=0.0,
        encode=started - arrived,
        denoise=denoised - started,
        decode=decoded - denoised,
        total=total_s,
    )
    mesh = result.report if isinstance(result, CleanMesh) else None
    deadline_met = total_s <= request.budget.latency_s if isinstance(request.budget, LatencyBudget) else None
    receipt = Receipt(
        state.summary(), order.quality_requested, seconds, batch_size_mean=1.0, mesh=mesh, deadline_met=deadline_met
    )
    return data, receipt_body(receipt)


def _keep_deadline(state: "DenoiseState", card: ModelCard, left_s: float) -> None:
    """Move along the curve as the server does. An image's decoding has no prediction: nothing was decoded before."""
    steps_left = state.num_steps - state.step_index
    point = point_for(
        state.request, card, time_left_s=left_s, steps_left=steps_left, num_computed=len(state.computed), pace=1.0
    )
    state.move_to(point)
