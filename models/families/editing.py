"""Image-to-image and inpainting: generation that starts in the middle of its schedule, at a picture with noise on it.

Everything is done by the functions of diffusers' inpaint pipelines, in their order, so that exact results are theirs.
Those pipelines lead kept latents along with the changed ones but leave the kept pixels as the VAE decodes them. Here
they are the picture's own.
"""

from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops
from torch import Tensor
from torch.nn import functional as F

from models.errors import InvalidRequest
from models.request import ImageEdit, ImageRequest
from models.state import KeptRegion


class NoisedPicture(NamedTuple):
    """The start of an edit. All but `kept` are as in `DenoiseState`; `kept` is None without a mask."""

    latents: Tensor
    sigmas: Tensor
    timesteps: Tensor
    kept: KeptRegion | None


def noised_picture(pipeline: Any, request: ImageRequest, dtype: torch.dtype, device: torch.device) -> NoisedPicture:
    """The latents and the schedule that `request`, an edit with a strength, starts from.

    `pipeline` is a diffusers inpaint pipeline whose scheduler has the whole schedule of the request. Its VAE is on
    `device` and of type `dtype`. Raises InvalidRequest if nothing is left of the mask at the size of the request.
    """
    edit, size = _edit(request), {"height": request.height, "width": request.width}
    timesteps, num_steps = pipeline.get_timesteps(request.num_inference_steps, edit.strength, "cpu")
    num_channels = pipeline.transformer.config.in_channels // 4
    latents, noise, image_latents, *_ = pipeline.prepare_latents(
        pipeline.image_processor.preprocess(_picture(edit), **size),
        timesteps[:1],
        batch_size=1,
        num_channels_latents=num_channels,
        **size,
        dtype=dtype,
        device=device,
        # The VAE's encoder draws from it too, before the noise.
        generator=torch.Generator().manual_seed(request.seed),
    )
    kept = None
    if edit.mask is not None:
        kept = KeptRegion(_changed_latents(pipeline, request, num_channels).to(device), image_latents, noise)
    return NoisedPicture(latents, pipeline.scheduler.sigmas[-num_steps - 1 :], timesteps, kept)


def _changed_latents(pipeline: Any, request: ImageRequest, num_channels: int) -> Tensor:
    """`KeptRegion.changes` for the mask of `request`. As in the pipeline, one pixel speaks for each latent."""
    rows, columns = (side // pipeline.vae_scale_factor for side in (request.height, request.width))
    # As in `prepare_mask_latents`, which also encodes the masked picture, and then does not use it.
    mask = F.interpolate(_mask(pipeline, request), size=(rows, columns))
    if not mask.any():
        raise InvalidRequest(
            f"mask lets nothing change at {request.width}x{request.height}, the size of the result; make its parts at "
            f"least {pipeline.vae_scale_factor} pixels wide and high there",
            "mask",
        )
    packed: Tensor = pipeline._pack_latents(mask.repeat(1, num_channels, 1, 1), 1, num_channels, rows, columns)
    return packed.bool()


def with_kept_pixels(pipeline: Any, request: ImageRequest, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`pixels` `(height, width, 3)` of a result, with those of the picture wherever a mask keeps them.

    A picture of another size is resized as for the model.
    """
    edit = _edit(request)
    if edit.mask is None:
        return pixels
    changes = _mask(pipeline, request)[0, 0, :, :, None].numpy() > 0
    picture = pipeline.image_processor.resize(_picture(edit), request.height, request.width)
    return np.where(changes, pixels, np.asarray(picture))


def _edit(request: ImageRequest) -> ImageEdit:
    assert request.edit is not None
    return request.edit


def opened_picture(file: bytes) -> Image.Image:
    """A picture in RGB. What is transparent in it becomes white: the colours that a file keeps there are not seen."""
    picture = Image.open(BytesIO(file))
    if picture.mode == "RGB":
        return picture
    coloured = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")


def _picture(edit: ImageEdit) -> Image.Image:
    [file] = edit.images
    return opened_picture(file)


def _mask(pipeline: Any, request: ImageRequest) -> Tensor:
    """1 where pixels may change, else 0: `(1, 1, height, width)`."""
    mask = _edit(request).mask
    assert mask is not None
    alpha = Image.open(BytesIO(mask)).convert("RGBA").getchannel("A")
    changes: Tensor = pipeline.mask_processor.preprocess(
        ImageChops.invert(alpha), height=request.height, width=request.width
    )
    return changes
