"""How much memory of the device a model and its requests take, in bytes. No torch: the API side reads it too.

The formulas follow from a model's configuration. Their factors were counted with fake tensors at published sizes.
Workspaces of kernels and fragmentation are not in them, so a reserve is kept. On a GPU the peaks of steps and decodings
are measured when a model is loaded, and the formulas are scaled by them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from models.mesh import size
from models.request import GenerationRequest, ImageRequest, MeshRequest

if TYPE_CHECKING:
    from models.card import PictureSizes

RESERVE_SHARE = 0.05
MIN_RESERVE = 512 * 2**20
"""What is kept free of the device's memory: a share of it, at least so many bytes. For workspaces of kernels, for
memory that is too scattered to be used, and for what is cached for all requests, such as position factors."""

_MAX_VELOCITIES = 3
"""Velocities that a request keeps while it forecasts steps (`rules.forecast`)."""
MOST_WHOLE_PIXELS = 1024 * 1024
"""Larger pictures pass their autoencoder in tiles of at most so many pixels (`families.tiling`)."""
_TILED_PIXEL_BYTES = 20
"""Bytes for each pixel of decoded tiles, which overlap, and of the picture that is made of them."""
_FITTING_PIXELS = 32 * 64 * 64
"""Pixels that the first preview encodes (`families.preview`)."""


def reserve_bytes(limit: float) -> float:
    """What is kept free of `limit` bytes. Devices of less than 4 GiB, which only tests have, keep an eighth free."""
    return max(RESERVE_SHARE * limit, min(MIN_RESERVE, limit / 8))


def readable(num_bytes: float) -> str:
    """A number of bytes for people, in MiB if it is small."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


@dataclass(frozen=True, slots=True)
class RequestMemory:
    """Bytes of the device that one request takes.

    From its start to its last step it holds `running`, then `finished` until its file is made. The others come on top
    for a while: `start` while prompt and pictures are encoded, `step` in a denoise step, `decode` while the result is
    decoded, `preview` for a preview. The steps of a batch add up. Exact requests have calls of their own, one after the
    other: the largest takes `apart`, and `step` is what they leave. `call` is what a step takes besides, once. A mesh
    also holds `grid` while it is decoded.
    """

    start: int = 0
    running: int = 0
    step: int = 0
    apart: int = 0
    call: int = 0
    finished: int = 0
    decode: int = 0
    preview: int = 0
    grid: int = 0

    @property
    def alone(self) -> int:
        """The most that it takes if there is no other request."""
        return self.running + self.grid + max(self.start, self.call + self.step + self.apart, self.decode)


NO_MEMORY = RequestMemory()
"""Of requests of which nothing is known."""


@dataclass(frozen=True, slots=True)
class Values:
    """How many numbers of the blocks' width a step holds at its peak, for each token of the two streams."""

    hidden_states: float
    encoder_hidden_states: float


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a request in a step: tokens of each in the two streams, and bytes of all their fixed inputs."""

    tokens: int
    text_tokens: Sequence[int]
    input_bytes: int

    def each(self) -> list["_Rows"]:
        return [replace(self, text_tokens=[text]) for text in self.text_tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMemory(ABC):
    """What a model takes of its device, and what its requests take.

    `weights` are the model's bytes there, `all_weights` those of all models on the device. `limit` is how much of it
    may be used, infinite where nothing limits it. A token of the blocks' streams takes `token_bytes`, one of the
    latents `latent_bytes`, its position factors `position_bytes`. A step holds the largest of `step_values` at its
    peak, for all rows of a call. An exact request has a call for all guidance branches if it `joins_branches`, else one
    for each. Measured peaks of steps are `step_scale` times those of the formula, and `call_bytes` more for a whole
    batch; those of decodings are `decode_scale` times the formula's.
    """

    weights: int
    num_blocks: int
    token_bytes: int
    latent_bytes: int
    step_values: tuple[Values, ...]
    joins_branches: bool = True
    position_bytes: int = 0
    limit: float = math.inf
    all_weights: int = 0
    call_bytes: int = 0
    step_scale: float = 1.0
    decode_scale: float = 1.0

    @property
    def reserve(self) -> float:
        """Bytes that are kept free."""
        return 0.0 if math.isinf(self.limit) else reserve_bytes(self.limit)

    @property
    def room(self) -> float:
        """Bytes that the device has for requests, of all its models."""
        return self.limit - self.reserve - self.all_weights

    def of(self, request: GenerationRequest, *, reuses_blocks: bool, forecasts_steps: bool) -> RequestMemory:
        """What `request` takes. `reuses_blocks` says whether residuals of blocks may be kept for later steps."""
        rows = self._rows(request)
        num_tokens = sum(rows.tokens + text for text in rows.text_tokens)
        latents = self._num_latents(request) * self.latent_bytes
        num_kept = 2 + forecasts_steps * _MAX_VELOCITIES * len(rows.text_tokens)
        positions = (rows.tokens + max(rows.text_tokens)) * self.position_bytes
        bank = num_tokens * self.num_blocks * self.token_bytes if reuses_blocks else 0
        step = self._step_bytes(rows)
        apart = step if self.joins_branches else max(self._step_bytes(row) for row in rows.each())
        velocities = len(rows.text_tokens) * latents
        return replace(
            self._around_steps(request),
            running=rows.input_bytes + num_kept * latents + positions + bank,
            step=velocities if request.wants_exact else step,
            apart=apart if request.wants_exact else 0,
            call=self.call_bytes,
            finished=2 * latents,  # and what the last preview showed
        )

    def measured(self, request: GenerationRequest, *, alone: int, pair: int, decode: int) -> Self:
        """This with the measured peaks of a step of one such request and of two in one call, and of a decoding."""
        formula = self.of(request, reuses_blocks=False, forecasts_steps=False)
        row = max(pair - alone, 1)
        return replace(
            self,
            call_bytes=max(alone - row, 0),
            step_scale=self.step_scale * row / self._step_bytes(self._rows(request)),
            decode_scale=max(decode / formula.decode, 1.0) if decode else 1.0,
        )

    def _step_bytes(self, rows: _Rows) -> int:
        """Of a call for all these rows."""
        most = max(
            sum(values.hidden_states * rows.tokens + values.encoder_hidden_states * text for text in rows.text_tokens)
            for values in self.step_values
        )
        return round(self.step_scale * self.token_bytes * most)

    @abstractmethod
    def _rows(self, request: GenerationRequest) -> _Rows: ...

    @abstractmethod
    def _num_latents(self, request: GenerationRequest) -> int:
        """Tokens of the latents."""

    @abstractmethod
    def _around_steps(self, request: GenerationRequest) -> RequestMemory:
        """What start, decoding and previews take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMemory(ModelMemory):
    """Of a model of images.

    A prompt is read as at most `max_text_tokens`, always as so many if `pads_prompts`. Its template adds
    `template_tokens`, and a picture that the text encoder looks at `picture_text_tokens`. The text encoder takes
    `encode_token_bytes` for each, 0 where it is elsewhere. The VAE takes `encode_pixel_bytes` and `decode_pixel_bytes`
    for each pixel. Models that read pictures beside the noise have `picture_sizes`.
    """

    pixels_per_token: int
    max_text_tokens: int
    pads_prompts: bool
    template_tokens: int = 0
    picture_text_tokens: int = 0
    encode_token_bytes: int
    encode_pixel_bytes: int
    decode_pixel_bytes: int
    picture_sizes: "PictureSizes | None" = None

    def _rows(self, request: GenerationRequest) -> _Rows:
        assert isinstance(request, ImageRequest)
        prompts = (request.prompt, request.negative_prompt or "")[: request.num_branches]
        text_tokens = [self._text_tokens(prompt, request) for prompt in prompts]
        references = sum(width * height for width, height in self._references(request)) // self.pixels_per_token**2
        noise = self._num_latents(request)
        # An edit with a mask keeps the picture's latents, the noise, and which of them may change.
        kept = 3 * noise * (request.edit is not None and request.edit.mask is not None)
        input_bytes = sum(text_tokens) * self.token_bytes + (references + kept) * self.latent_bytes
        return _Rows(noise + references, text_tokens, input_bytes)

    def _text_tokens(self, prompt: str, request: ImageRequest) -> int:
        """The most tokens that the prompt can have: each has a byte of it at least."""
        if self.pads_prompts:
            return self.max_text_tokens
        most = min(len(prompt.encode()) + self.template_tokens, self.max_text_tokens)
        return most + len(self._references(request)) * self.picture_text_tokens

    def _references(self, request: ImageRequest) -> list[tuple[int, int]]:
        """Width and height in pixels of the pictures beside the noise."""
        if self.picture_sizes is None or request.edit is None:
            return []
        return [self.picture_sizes.of(*picture) for picture in request.edit.sizes]

    def _num_latents(self, request: GenerationRequest) -> int:
        assert isinstance(request, ImageRequest)
        return (request.height // self.pixels_per_token) * (request.width // self.pixels_per_token)

    def _around_steps(self, request: GenerationRequest) -> RequestMemory:
        assert isinstance(request, ImageRequest)
        pixels = request.height * request.width
        whole = min(pixels, MOST_WHOLE_PIXELS)
        noised = [whole] if request.edit is not None and self.picture_sizes is None else []
        pictures = [*noised, *(width * height for width, height in self._references(request))]
        prompts = (request.prompt, request.negative_prompt or "")[: request.num_branches]
        text = max(self._text_tokens(prompt, request) for prompt in prompts) * self.encode_token_bytes
        return RequestMemory(
            start=max(text, *(count * self.encode_pixel_bytes for count in pictures), 0),
            decode=round(self.decode_scale * whole * self.decode_pixel_bytes)
            + _TILED_PIXEL_BYTES * pixels * (pixels > whole),
            preview=_FITTING_PIXELS * self.encode_pixel_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshMemory(ModelMemory):
    """Of a model of meshes, whose latents have one size.

    What stands in the place of text has `num_text_tokens`. Encoding an image takes `encode_bytes`, and its tokens
    `context_bytes` for each row. Decoding reads the field at `points_per_call` points at once, which take `point_bytes`
    each, and holds `field_bytes` of the shape; to compute these takes `field_peak_bytes`.
    """

    num_latents: int
    num_text_tokens: int
    encode_bytes: int
    context_bytes: int
    field_bytes: int
    field_peak_bytes: int
    points_per_call: int
    point_bytes: int

    def _rows(self, request: GenerationRequest) -> _Rows:
        rows = request.num_branches
        return _Rows(self.num_latents, [self.num_text_tokens] * rows, self.context_bytes * rows)

    def _num_latents(self, request: GenerationRequest) -> int:
        return self.num_latents

    def _around_steps(self, request: GenerationRequest) -> RequestMemory:
        assert isinstance(request, MeshRequest)
        points = round(self.decode_scale * self.num_points(self.room) * self.point_bytes)
        return RequestMemory(
            start=self.encode_bytes,
            decode=max(points, self.field_peak_bytes),
            preview=self.field_peak_bytes + points,
            grid=size.grid_bytes(request.octree_resolution) + self.field_bytes,
        )

    def num_points(self, free: float) -> int:
        """At how many points the field is read at once: those of a quarter of the `free` bytes, not too few."""
        return int(min(self.points_per_call, max(size.MIN_POINTS_PER_CALL, free / 4 / self.point_bytes)))
