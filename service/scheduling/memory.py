"""What fits into the device's memory. Pure: what runs and what is decoded is passed in."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from models.budget import resolve
from models.card import Edits, ImageCard, MeshCard, ModelCard
from models.curve import EXACT
from models.errors import InvalidRequest
from models.memory import RequestMemory, readable
from models.request import Budget, GenerationRequest, ImageEdit, ImageRequest, MeshRequest, head_of_png

_SHARE_TO_TRY = 0.75
_MOST_AT_ONCE = 64
"""How far requests are counted that fit at once."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """What a publisher has to decode: bytes that its results hold, and the peak of what each model's thread does."""

    held: int = 0
    peaks: Mapping[str, int] | None = None

    @property
    def peak(self) -> int:
        """All threads may be at their peaks at once."""
        return sum((self.peaks or {}).values())

    def peak_with(self, model: str, peak: int) -> int:
        """The peak if this is decoded as well. A model's thread decodes one result at a time."""
        before = (self.peaks or {}).get(model, 0)
        return self.peak - before + max(before, peak)


@dataclass(frozen=True, slots=True)
class InMemory:
    """A started request. `shape` is that of `batching.step_shape`; a done one only waits for its decoding."""

    shape: str
    memory: RequestMemory
    is_done: bool = False


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What is in memory: requests from their start to their last step, and what is decoded.

    `room` are the bytes for requests. The grids of meshes that are decoded at once take at most `max_grid_bytes`, or
    there is only one.

    One request at least can always take its step or be decoded, if nothing else is decoded meanwhile. So whoever waits
    for room gets it when decoding ends, and nothing waits for ever. Steps and mesh decodings take turns in one thread.
    """

    room: float
    max_grid_bytes: int
    requests: Sequence[InMemory] = ()
    decoding: Decoding = Decoding()

    @property
    def held(self) -> int:
        """Bytes that stay: what requests hold between steps, their grids, and results that are not decoded."""
        kept = sum(entry.memory.finished if entry.is_done else entry.memory.running for entry in self.requests)
        grids = [entry.memory.grid for entry in self.requests]
        return kept + min(sum(grids), max(self.max_grid_bytes, *grids, 0)) + self.decoding.held

    def can_start(self, new: InMemory, max_batch_size: int) -> bool:
        """Whether one more request may start: its shape's next step fits with it in it, and so does all else.

        Alone, it may always start.
        """
        if not self.requests and not self.decoding.held and not self.decoding.peak:
            return True
        after = replace(self, requests=[*self.requests, new])
        shapes = defaultdict(list)
        for entry in after.requests:
            if not entry.is_done:
                shapes[entry.shape].append(entry.memory)
        steps = [step_bytes(batch, max_batch_size) for batch in shapes.values()]
        decodings = [entry.memory.decode for entry in after.requests]
        # Prompts may be encoded while a step runs.
        return after.held + max(*steps, *decodings, self.decoding.peak) + new.memory.start <= self.room

    def num_that_fit(self, batch: Sequence[RequestMemory]) -> int:
        """How many of these, the first ones, may share a step now; 0 if one has to wait for a decoding to end."""
        free = self.room - self.held - self.decoding.peak
        fitting = sum(step_bytes(batch[: count + 1]) <= free for count in range(len(batch)))
        return fitting if self.decoding.peak else max(fitting, 1)

    def can_turn(self, decode: int) -> bool:
        """Whether a mesh's decoding, which takes turns with steps, may have its turn now."""
        return not self.decoding.peak or self.held + self.decoding.peak + decode <= self.room

    def can_decode(self, model: str, peak: int) -> bool:
        """Whether one more result of the model may be decoded now."""
        return not self.decoding.peak or self._fits_beside(model, peak)

    def can_preview(self, model: str, peak: int) -> bool:
        """Whether a preview may be decoded now. Unlike a result, it may never have room."""
        return self._fits_beside(model, peak)

    def _fits_beside(self, model: str, peak: int) -> bool:
        return self.held + self.decoding.peak_with(model, peak) <= self.room


def step_bytes(requests: Sequence[RequestMemory], max_batch_size: int = _MOST_AT_ONCE) -> int:
    """The most that a step of so many of these requests takes at its peak, on top of what they hold."""
    steps = sorted(memory.step for memory in requests)[-max_batch_size:]
    return sum(steps) + max(memory.apart for memory in requests) + max(memory.call for memory in requests)


def check_fits(request: GenerationRequest, card: ModelCard) -> None:
    """Raise InvalidRequest for what can't run even alone on this device, with the size that could."""
    needed, room = card.memory_of(request).alone, card.memory.room
    if needed <= room:
        return
    smaller = next((other for other in _smaller(request, card) if card.memory_of(other).alone <= room), None)
    param, asked = _size_of(request)
    largest = "no smaller one fits" if smaller is None else f"the largest that fits is {_size_of(smaller)[1]}"
    raise InvalidRequest(
        f"{param} {asked} needs {readable(needed)} of memory beside the weights of {card.id}, and this server has "
        f"{readable(room)} for requests; {largest}",
        param,
    )


def _size_of(request: GenerationRequest) -> tuple[str, str]:
    """The field that says how large a result is, and its value."""
    if isinstance(request, ImageRequest):
        return "size", request.size
    assert isinstance(request, MeshRequest)
    return "octree_resolution", str(request.octree_resolution)


def _smaller(request: GenerationRequest, card: ModelCard) -> Iterator[GenerationRequest]:
    """Requests like this one for smaller results, the largest first: images have about the same ratio."""
    match request, card:
        case ImageRequest(), ImageCard():
            limits, ratio = card.sizes, request.height / request.width
            for width in range(request.width - limits.multiple_of, limits.minimum - 1, -limits.multiple_of):
                height = int(width * ratio) // limits.multiple_of * limits.multiple_of
                if height >= limits.minimum:
                    yield replace(request, width=width, height=height)
        case MeshRequest(), MeshCard():
            step = card.octree_resolution_step
            for resolution in range(request.octree_resolution - step, card.min_octree_resolution - 1, -step):
                yield replace(request, octree_resolution=resolution)


def try_smaller(request: GenerationRequest, card: ModelCard) -> str:
    """What to try after memory ran out for a request that had the device for itself, though it was predicted to fit."""
    most = _SHARE_TO_TRY * card.memory_of(request).alone
    for other in _smaller(request, card):
        if card.memory_of(other).alone <= most:
            return f"; try {' '.join(_size_of(other))} or less"
    return ""


def largest_image(request: ImageRequest, card: ImageCard) -> tuple[int, int] | None:
    """Width and height of the largest image, of the ratio of `request`, that the device has room for, if any."""
    scale = card.sizes.maximum / max(request.width, request.height)
    width, height = (
        int(side * scale) // card.sizes.multiple_of * card.sizes.multiple_of for side in (request.width, request.height)
    )
    largest = replace(request, width=width, height=height)
    for other in (largest, *_smaller(largest, card)):
        if isinstance(other, ImageRequest) and card.memory_of(other).alone <= card.memory.room:
            return other.width, other.height
    return None


def usual_request(card: ModelCard, budget: Budget) -> GenerationRequest:
    """A request at the model's defaults. Its prompt has 200 characters; models made for editing get one picture."""
    usual: dict[str, Any] = {
        "model": card.id,
        "num_inference_steps": card.default_num_inference_steps,
        "guidance_scale": card.default_guidance_scale,
        "seed": 0,
        "budget": budget,
        "point": EXACT,
        "is_guided": card.is_guided(card.default_guidance_scale),
    }
    request: GenerationRequest
    match card:
        case ImageCard():
            width, height = card.default_width, card.default_height
            edit = ImageEdit((head_of_png(width, height),)) if card.edits is Edits.REFERENCE else None
            request = ImageRequest(**usual, prompt=200 * "x", width=width, height=height, edit=edit)
        case MeshCard():
            request = MeshRequest(**usual, input_image=b"", octree_resolution=card.default_octree_resolution)
    try:
        return replace(request, point=resolve(budget, card.curve_for(request)))
    except InvalidRequest:  # a model without calibration has no such point
        return request


def num_at_once(request: GenerationRequest, card: ModelCard) -> int:
    """How many requests like this one the device has room for, up to a large number."""
    memory, room = card.memory_of(request), card.memory.room
    if memory.alone > room:
        return 0
    one = InMemory("", memory)
    counts = range(_MOST_AT_ONCE)
    return sum(DeviceMemory(room, 0, [one] * count).can_start(one, card.max_batch_size) for count in counts)
