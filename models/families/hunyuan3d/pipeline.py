"""Hunyuan3D makes meshes from images: loading, image tokens, batches of rows, decoding."""

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from models.card import DecodeSpeed, Guidance, MeshCard, ModelCard, basics_of
from models.curve import EXACT, Preset
from models.diffusion.sampling import classifier_free_guidance
from models.elastic.compute import BlockCost
from models.elastic.streams import Streams
from models.errors import WeightsError
from models.families.family import Beginning, BranchStart, Family
from models.families.hunyuan3d import plain_adapter, stream_adapter
from models.families.hunyuan3d.checkpoint import Hunyuan3DCheckpoint, load_checkpoint
from models.families.hunyuan3d.conditioner import image_tensor
from models.families.hunyuan3d.plain_dit import HunYuanDiTPlain
from models.families.hunyuan3d.preparation import prepared_request
from models.families.hunyuan3d.shape_vae import DecodedField
from models.families.wrapping import Adapter
from models.load_options import LoadOptions
from models.memory import MeshMemory, Values
from models.mesh.cleanup import CleanMesh, clean
from models.mesh.size import MIN_POINTS_PER_CALL
from models.mesh.speed import measure_decode_speed
from models.mesh.surface import BOUNDS, FieldSamples, Mesh, extract_surface
from models.mesh.volume import decode_in_turns, finished, sample_in_turns
from models.request import GenerationRequest, MeshRequest, PresetBudget
from models.state import BranchInputs, DenoiseState
from models.weights import CheckpointTraits, Manifest, RouterWeights

_NUM_QUALITY_POINTS = 8192
_MOST_POINTS_PER_CALL = 2**17
"""A denoise step may wait for one call. In Hunyuan3D-2.1 this is 3 TFLOP, and fills any GPU."""
_PLAIN_VALUES, _STREAM_VALUES = Values(27.0, 0.0), Values(19.0, 19.0)
"""What a step holds at its peak. In 2.1 ten blocks' states wait for those that read them."""
_PREVIEW_OCTREE_RESOLUTION = 32
_OCTREE_STEP = 8
"""Grids of up to 512 cells are halved at most three times, since the coarsest has at least 64 cells: 2 ** 3 = 8."""


class Hunyuan3DFamily(Family):
    """Versions 2.1 and 2.0. Guidance is true, with zeros for no image, except in checkpoints that distilled it."""

    quality_metric: ClassVar[str] = "volume_iou"

    def __init__(self, model_id: str, checkpoint: Hunyuan3DCheckpoint, router_weights: RouterWeights | None) -> None:
        self.checkpoint = checkpoint
        self._is_plain = isinstance(checkpoint.denoiser, HunYuanDiTPlain)
        self.adapter: Adapter = plain_adapter if self._is_plain else stream_adapter
        super().__init__(model_id, checkpoint.denoiser, router_weights)

    @classmethod
    def load(
        cls,
        directory: Path,
        device: str,
        dtype: torch.dtype,
        router_weights: RouterWeights | None,
        traits: CheckpointTraits,
        options: LoadOptions,
    ) -> Self:
        if traits != CheckpointTraits():
            raise WeightsError(
                f"{directory} is a Hunyuan3D model; these have no special traits, but the manifest names {traits}"
            )
        if router_weights:
            router_weights.stack.to(device, dtype)
        checkpoint = load_checkpoint(directory, device, dtype, options=options)
        return cls(directory.name, checkpoint, router_weights)

    @property
    def encodes_on_device(self) -> bool:
        return next(self.checkpoint.conditioner.parameters()).device == self.device

    @property
    def guidance(self) -> Guidance:
        return Guidance.DISTILLED if self.checkpoint.has_guidance_embedding else Guidance.TRUE

    @property
    def default_num_inference_steps(self) -> int:
        """As in the published pipelines, from which the default guidance scale comes too."""
        return 5 if self.checkpoint.is_consistency_model else 50

    @property
    def default_guidance_scale(self) -> float:
        return 5.0

    def card(self, basics: ModelCard, manifest: Manifest) -> MeshCard:
        return MeshCard(
            **basics_of(basics),
            default_octree_resolution=manifest.octree_resolution or 384,
            min_octree_resolution=2 * _OCTREE_STEP,
            max_octree_resolution=512,
            octree_resolution_step=_OCTREE_STEP,
            decode_speed=self._decode_speed(),
        )

    @torch.inference_mode()
    def _decode_speed(self) -> DecodeSpeed:
        vae, device = self.checkpoint.vae, self._parameter.device
        field = self._field(torch.zeros((1, vae.num_latents, vae.embed_dim), device=device))
        return measure_decode_speed(field, points_per_call=self._points_per_call, device=device)

    @property
    def modules(self) -> list[nn.Module]:
        return [self.checkpoint.denoiser, self.checkpoint.vae, self.checkpoint.conditioner]

    def memory(self) -> MeshMemory:
        vae, encoder, parameter = self.checkpoint.vae, self.checkpoint.conditioner, self._parameter
        vae_bytes, context = next(vae.parameters()).itemsize, encoder.num_tokens * encoder.channels * parameter.itemsize
        is_encoder_here = next(encoder.parameters()).device == self.device
        return MeshMemory(
            weights=self.weight_bytes(),
            num_blocks=len(self.blocks),
            token_bytes=self.adapter.channels(self.transformer) * parameter.itemsize,
            latent_bytes=vae.embed_dim * torch.float32.itemsize,
            step_values=(_PLAIN_VALUES if self._is_plain else _STREAM_VALUES,),
            num_latents=vae.num_latents,
            num_text_tokens=1 if self._is_plain else encoder.num_tokens,  # in 2.1, that of the time
            encode_bytes=14 * context if is_encoder_here else 0,
            context_bytes=context,
            field_bytes=2 * vae.num_latents * vae.geo_width * vae_bytes,
            field_peak_bytes=round(12.2 * vae.num_latents * vae.post_kl.out_features * vae_bytes),
            points_per_call=MIN_POINTS_PER_CALL if self.device.type == "cpu" else _MOST_POINTS_PER_CALL,
            point_bytes=round(11.2 * vae.geo_width * vae_bytes) + 600,  # and the Fourier features of its place
        )

    def example_request(self, card: ModelCard) -> MeshRequest:
        """The image shows a disc."""
        assert isinstance(card, MeshCard)
        side = np.linspace(-1, 1, 64)
        is_disc = np.hypot(side, side[:, None]) < 0.8
        file = BytesIO()
        Image.fromarray(np.where(is_disc[..., None], (128, 128, 128, 255), 0).astype(np.uint8)).save(file, "PNG")
        return MeshRequest(
            model=card.id,
            num_inference_steps=card.default_num_inference_steps,
            guidance_scale=card.default_guidance_scale,
            seed=0,
            budget=PresetBudget(Preset.EXACT),
            point=EXACT,
            is_guided=card.is_guided(card.default_guidance_scale),
            input_image=file.getvalue(),
            octree_resolution=card.default_octree_resolution,
        )

    def preparation(self, request: GenerationRequest) -> Callable[[], MeshRequest]:
        assert isinstance(request, MeshRequest)
        return partial(prepared_request, request, self.checkpoint.image_settings, self.background_remover)

    def encode(self, request: GenerationRequest) -> Sequence[BranchStart]:
        """Raises InvalidRequest if the image shows no object, or if its background can't be removed as asked."""
        assert isinstance(request, MeshRequest)
        if not request.is_prepared:
            request = prepared_request(request, self.checkpoint.image_settings, self.background_remover)
        with Image.open(BytesIO(request.input_image)) as file:
            image = image_tensor(np.asarray(file))
        encoder = next(self.checkpoint.conditioner.parameters())
        context = self.checkpoint.conditioner(image.to(encoder.device)).to(self._parameter)
        return self._branches(request, context)

    def begin(self, request: GenerationRequest, branches: Sequence[BranchStart]) -> Beginning:
        vae = self.checkpoint.vae
        # Latents stay in float32 between steps, whatever the denoiser's type.
        noise = torch.randn((1, vae.num_latents, vae.embed_dim), generator=torch.Generator().manual_seed(request.seed))
        sigmas = self.checkpoint.schedule(request.num_inference_steps)
        # A step of length 0 changes nothing, so the model need not run. The even schedule's last step is one.
        lengths = sigmas.diff()
        sigmas = torch.cat((sigmas[:-1][lengths > 0], sigmas[-1:]))
        return Beginning(vae.num_latents, noise.to(self._parameter.device), sigmas, sigmas[:-1])

    def _branches(self, request: MeshRequest, context: Tensor) -> list[BranchStart]:
        num_tokens = context.shape[1]
        if self.guidance is Guidance.DISTILLED:
            guidance = torch.full((1,), request.guidance_scale, device=context.device)
            return [BranchStart("cond", BranchInputs(context, guidance=guidance), self.block_costs(num_tokens))]
        branches = [BranchStart("cond", BranchInputs(context), self.block_costs(num_tokens))]
        if request.is_guided:
            # In 2.1 attention to zeros is a constant, so the context can be empty. But with fewer rows the attention of
            # the other branch might round otherwise.
            has_context = request.wants_exact or not self._is_plain
            costs = self.block_costs(num_tokens, has_context)
            no_image = context.new_zeros(1, num_tokens if has_context else 0, context.shape[2])
            branches.append(BranchStart("uncond", BranchInputs(no_image), costs))
        return branches

    def block_costs(self, num_image_tokens: int, has_context: bool = True) -> Mapping[str, BlockCost]:
        """Floating-point operations of one row in every block."""
        adapter = plain_adapter if self._is_plain else stream_adapter
        num_latents = self.checkpoint.vae.num_latents
        return adapter.block_costs(self.transformer, num_latents, num_image_tokens, has_context)

    def prologue(self, states: Sequence[DenoiseState]) -> Streams:
        latents, times = self._latents_and_times(states)
        inputs = [branch for state in states for branch in state.inputs]
        latents = latents.to(self._parameter.dtype)
        having = [i for i, branch in enumerate(inputs) if branch.context.shape[1]]
        context = torch.cat([inputs[i].context for i in having])
        if self._is_plain:
            rows = None if len(having) == len(inputs) else having
            return plain_adapter.prologue(self.transformer, latents, times, context, rows)
        guidance = [branch.guidance for branch in inputs if branch.guidance is not None]
        return stream_adapter.prologue(
            self.transformer, latents, times, context, torch.cat(guidance) if guidance else None
        )

    def guide(self, request: GenerationRequest, velocities: Tensor) -> Tensor:
        return classifier_free_guidance(velocities[:1], velocities[1:], request.guidance_scale)

    @torch.inference_mode()
    def decode(self, state: DenoiseState) -> CleanMesh:
        """Raises EmptySurface if the field is nowhere positive, or nowhere negative."""
        request = state.request
        assert isinstance(request, MeshRequest)
        return clean(self._surface(state.latents, request.octree_resolution), request.target_faces)

    @torch.inference_mode()
    def decode_in_turns(self, state: DenoiseState) -> Generator[None, None, FieldSamples]:
        assert isinstance(state.request, MeshRequest)
        field, resolution = self._field(state.latents), state.request.octree_resolution
        yield
        points_per_call, device = self._points_per_call, self._parameter.device
        grid_logits = yield from decode_in_turns(field, resolution, points_per_call=points_per_call, device=device)
        return (yield from sample_in_turns(grid_logits))

    @torch.inference_mode()
    def preview(self, request: GenerationRequest, prediction: Tensor) -> CleanMesh:
        """A mesh on a coarse grid, with all its faces. Raises EmptySurface as `decode` does."""
        return clean(self._surface(prediction, _PREVIEW_OCTREE_RESOLUTION))

    @torch.inference_mode()
    def quality_sample(self, state: DenoiseState) -> NDArray[np.bool_]:
        """For each of `_NUM_QUALITY_POINTS` fixed points, whether it is inside."""
        points = self._quality_points.split(self._points_per_call)
        field = self._field(state.latents)
        inside: NDArray[np.bool_] = torch.cat([field(part) > 0 for part in points]).cpu().numpy()
        return inside

    def similarity(self, a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
        """Volume IoU, in [0, 1]. Two shapes without volume count as equal."""
        union = int((a | b).sum())
        return int((a & b).sum()) / union if union else 1.0

    def _surface(self, latents: Tensor, octree_resolution: int) -> Mesh:
        grid_logits = finished(
            decode_in_turns(
                self._field(latents),
                octree_resolution,
                points_per_call=self._points_per_call,
                device=self._parameter.device,
            )
        )
        return extract_surface(grid_logits.cpu().numpy())

    def _field(self, latents: Tensor) -> DecodedField:
        vae = self.checkpoint.vae
        return vae.field(latents / vae.scale_factor)

    @cached_property
    def _quality_points(self) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        points = (2 * torch.rand(_NUM_QUALITY_POINTS, 3, generator=rng) - 1) * BOUNDS
        return points.to(self._parameter.device)

    @property
    def _parameter(self) -> Tensor:
        """Any parameter of the denoiser, for its device and type."""
        return next(self.transformer.parameters())

    @property
    def _points_per_call(self) -> int:
        device, room = self.device, self.room
        free = room if device.type == "cpu" else min(room, torch.cuda.mem_get_info(device)[0])
        return self.memory().num_points(free)
