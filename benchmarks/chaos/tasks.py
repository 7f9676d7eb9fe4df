"""The jobs of a run, drawn from a seed, and the files that each one makes alone."""

import base64
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from benchmarks.chaos.webhooks import Behaviour
from models.card import ImageCard, MeshCard
from models.engine import Engine
from models.errors import EmptySurface
from service.api.edits import checked_pictures, pictures_given
from service.api.input_image import checked_image
from service.api.parsing import parse_edit_body, parse_image_body, parse_mesh_body
from service.api.schemas import EditBody, ImageBody, MeshBody
from service.budget import BudgetBody
from service.order import Order
from service.running.output import encode_output

IMAGE_MODEL, MESH_MODEL = Path("checkpoints/tiny-flux").resolve(), Path("checkpoints/tiny-hunyuan3d").resolve()
WEBHOOK_SHARE = 0.3
_PROMPTS = ("a large red circle in the centre", "a small blue square at the top left", "a green ring, a white cross")
_BUDGETS: Sequence[Mapping[str, Any]] = (
    {"preset": "exact"},
    {"preset": "balanced"},
    {"preset": "draft"},
    {"quality": 0.9},
)
_DEFAULT_BUDGET = BudgetBody(quality=0.9)


class Kind(StrEnum):
    """How a client asks for a job and learns of its end."""

    POLLED = "polled"
    SEVERAL = "three images"
    PREVIEWED = "events with previews"
    STREAMED = "stream"
    AWAITED = "call that waits"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    MESH = "mesh"
    EDIT = "edit"


# How often each kind comes in a round.
_ROUND: Mapping[Kind, int] = {
    Kind.POLLED: 3,
    Kind.SEVERAL: 1,
    Kind.PREVIEWED: 2,
    Kind.STREAMED: 2,
    Kind.AWAITED: 2,
    Kind.CANCELLED: 2,
    Kind.DEADLINE: 1,
    Kind.MESH: 1,
    Kind.EDIT: 2,
}


_PATHS: Mapping[Kind, str] = {Kind.MESH: "/v1/meshes", Kind.EDIT: "/v1/images/edits"}


@dataclass(frozen=True, slots=True)
class Task:
    """One job to ask for. `cancel_after_s` is used by the kind CANCELLED only."""

    number: int
    kind: Kind
    body: Mapping[str, Any]
    webhook: Behaviour | None
    cancel_after_s: float

    @property
    def path(self) -> str:
        return _PATHS.get(self.kind, "/v1/images")

    @property
    def num_files(self) -> int:
        return int(self.body.get("n", 1))

    @property
    def is_exact(self) -> bool:
        """Whether any version of the server makes the same files of it."""
        return bool(self.body["budget"] == {"preset": "exact"})


def random_tasks(count: int, seed: int, *, with_edits: bool = True) -> list[Task]:
    """`with_edits` can be False for servers of versions that make none."""
    rng = random.Random(seed)
    a_round = [kind for kind, times in _ROUND.items() for _ in range(times) if with_edits or kind is not Kind.EDIT]
    kinds: list[Kind] = []
    while len(kinds) < count:
        kinds += rng.sample(a_round, len(a_round))
    return [
        Task(
            number=number,
            kind=kind,
            body=_body(kind, rng),
            webhook=rng.choice([*Behaviour]) if rng.random() < WEBHOOK_SHARE else None,
            cancel_after_s=rng.uniform(0, 3),
        )
        for number, kind in enumerate(kinds[:count])
    ]


def _body(kind: Kind, rng: random.Random) -> dict[str, Any]:
    common = {"seed": rng.randrange(2**32), "priority": rng.choice(["low", "normal", "high"])}
    if kind is Kind.MESH:
        return {
            **common,
            "model": MESH_MODEL.name,
            "input_image": _solid(rng),
            "budget": {"preset": rng.choice(["exact", "balanced"])},
            "octree_resolution": 16,
            "output_format": "stl",
        }
    body = {
        **common,
        "model": IMAGE_MODEL.name,
        "prompt": rng.choice(_PROMPTS),
        "num_inference_steps": rng.randint(4, 12),
        "budget": {"latency_ms": 600_000, "min_quality": 0.5} if kind is Kind.DEADLINE else rng.choice(_BUDGETS),
    }
    match kind:
        case Kind.SEVERAL:
            body |= {"n": 3}
        case Kind.PREVIEWED:
            body |= {"partial_images": 2}
        case Kind.STREAMED:
            body |= {"partial_images": 1, "stream": True}
        case Kind.EDIT:
            mask = {"mask": _text_of(Image.new("L", (64, 64), "white"))} if rng.random() < 0.5 else {}
            body |= {"image": _solid(rng), **mask, "n": rng.randint(1, 2), "strength": rng.uniform(0.3, 1)}
        case Kind.CANCELLED:
            body |= {"num_inference_steps": 50, "budget": {"preset": "exact"}}
    return body


def _solid(rng: random.Random) -> str:
    """An image of a grey solid on white, as base64."""
    image = Image.new("RGB", (64, 64), "white")
    draw, border = ImageDraw.Draw(image), rng.randint(10, 18)
    shape = rng.choice([draw.ellipse, draw.rectangle])
    shape((border, border, 64 - border, 64 - border), fill="grey")
    return _text_of(image)


def _text_of(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def files_alone(engine: Engine, task: Task) -> tuple[bytes, ...] | None:
    """The files of a task's job, made alone in this process. None if its shape has no surface, which fails the job."""
    order, files = _order(engine, task), []
    for request in order.requests:
        state = engine.start(request)
        while not state.is_done:
            engine.step([state])
        try:
            files.append(encode_output(engine.finish(state), request, order.output))
        except EmptySurface:
            return None
    return tuple(files)


def _order(engine: Engine, task: Task) -> Order:
    card = engine.cards[task.body["model"]]
    if isinstance(card, MeshCard):
        mesh_body = MeshBody.model_validate(task.body)
        image = checked_image(base64.b64decode(mesh_body.input_image), max_pixels=10_000)
        return parse_mesh_body(mesh_body, card, image, default_budget=_DEFAULT_BUDGET, random_seed=0)
    assert isinstance(card, ImageCard)
    if task.kind is Kind.EDIT:
        edit_body = EditBody.model_validate(task.body)
        images = {field: base64.b64decode(text) for field, text in pictures_given(edit_body, card)}
        mask = None if edit_body.mask is None else base64.b64decode(edit_body.mask)
        pictures = checked_pictures(images, mask, max_pixels=10_000)
        return parse_edit_body(edit_body, card, pictures, default_budget=_DEFAULT_BUDGET, random_seed=0)
    return parse_image_body(ImageBody.model_validate(task.body), card, default_budget=_DEFAULT_BUDGET, random_seed=0)
