"""The small image autoencoders: stock classes of diffusers that reduce each side by 8, with 8 latent channels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, ModelMixin
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageResidualBlock
from torch import Tensor, nn
from torch.nn import functional as F

from training.loop import run_loop
from training.optimizers import ScheduledOptimizers, warm_then_linear
from training.precision import autocast
from training.scenes.rendering import render
from training.scenes.scenes import sample_scene, training_scenes
from training.scenes.similarity import psnr

NUM_STEPS = 4400
LATENT_CHANNELS = 8
_WHOLE_IMAGE_SHARE = 0.16
"""Share of the run, at its end, that trains on whole images instead of crops."""
_NUM_SCENES = 8192


@dataclass(frozen=True, slots=True)
class ImageVae:
    """An autoencoder for single images.

    `encode` maps `(batch, 3, height, width)` in [-1, 1] to latents `(batch, 8, height / 8, width / 8)`, `decode` the
    other way. `standardise` gives the latents that the pipeline works with zero mean and unit variance.
    """

    module: ModelMixin
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    standardise: Callable[[Tensor], None]


def flux_vae() -> ImageVae:
    """An untrained `AutoencoderKL` as in FLUX. It starts with a linear path for colour (see `_carry_colour`)."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=True,
        use_post_quant_conv=True,
        force_upcast=False,
    )
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            for name, module in half.named_modules():
                if name.endswith("conv2"):
                    _zero(module)
                elif isinstance(module, nn.Conv2d) and name.endswith(("conv_in", "conv_shortcut", "conv")):
                    _carry_colour(module, name)
        _open_ends(vae)
    return wrap_flux_vae(vae)


def wrap_flux_vae(vae: AutoencoderKL) -> ImageVae:
    def standardise(latents: Tensor) -> None:
        """FluxPipeline has one scaling factor for all channels, so the 1x1 convolutions absorb one per channel."""
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        channels = len(mean)
        vae.quant_conv.weight[:channels] /= std[:, None, None, None]
        vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
        # The variance half is not trained. Fixed at e^-10, it makes a sample equal to the mode.
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = -10
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= std[None, :, None, None]

    return ImageVae(
        vae,
        encode=lambda images: vae.encode(images).latent_dist.mode(),
        decode=lambda latents: vae.decode(latents).sample,
        standardise=standardise,
    )


def qwen_image_vae() -> ImageVae:
    """An untrained `AutoencoderKLQwenImage` as in Qwen-Image, initialised like `flux_vae`.

    Images have one frame. So there is no temporal resampling, and the kernels are zero for earlier frames.
    """
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 3, 4],
        num_res_blocks=1,
        temperal_downsample=[False, False, False],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, QwenImageCausalConv3d):
                module.weight[:, :, :-1] = 0
            if isinstance(module, QwenImageResidualBlock):
                _zero(module.conv2)
            elif name.endswith("attentions.0"):
                _zero(module.proj)
            elif name.endswith(("conv_in", "conv_shortcut", "resample.1")) and not isinstance(module, nn.Identity):
                _carry_colour(module, name)
        _open_ends(vae)
    return wrap_qwen_image_vae(vae)


def wrap_qwen_image_vae(vae: AutoencoderKLQwenImage) -> ImageVae:
    """Wrap `vae`. Its latents are standardised by the means and deviations in its configuration, as in the pipeline."""
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            vars(module)["forward"] = MethodType(_single_frame_forward, module)

    def scale() -> tuple[Tensor, Tensor]:
        mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)

    def encode(images: Tensor) -> Tensor:
        mean, std = scale()
        return (vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std

    def decode(latents: Tensor) -> Tensor:
        mean, std = scale()
        frames = latents * std + mean
        # `vae.decode` would clamp, and a clamped pixel has no gradient.
        vae.clear_cache()
        image: Tensor = vae.decoder(vae.post_quant_conv(frames[:, :, None]), vae._feat_map, [0])[:, :, 0]
        vae.clear_cache()
        return image

    def standardise(latents: Tensor) -> None:
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -10
        mean, std = latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()
        vae.register_to_config(latents_mean=mean, latents_std=std)

    return ImageVae(vae, encode, decode, standardise)


def _single_frame_forward(self: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """Equals the original for one frame. The original pads with two empty frames, which triples the work."""
    assert x.shape[2] == 1
    assert cache_x is None
    padding = (int(self._padding[2]), int(self._padding[0]))
    return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=padding)[:, :, None]


def _zero(conv: nn.Module) -> None:
    for parameter in conv.parameters():
        parameter.zero_()


def _image_kernel(conv: nn.Module) -> Tensor:
    """A convolution's weight for single images, `(out, in, height, width)`; for causal ones, that of the last frame."""
    assert isinstance(conv, nn.Conv2d | nn.Conv3d)
    return conv.weight if isinstance(conv, nn.Conv2d) else conv.weight[:, :, -1]


def _carry_colour(conv: nn.Module, name: str) -> None:
    """Make channels 0:3 carry +RGB and 3:6 -RGB (SiLU(x) - SiLU(-x) = x). The last third are constants of +-1.

    With the default initialisation the norms remove an image's mean colour, and training stalls near 20 dB. The
    constants fix the norms' statistics. The reconstruction then has 23 dB before the first step.
    """
    weight = _image_kernel(conv)
    if "down" in name and "shortcut" not in name:
        kernel = torch.zeros(3, 3)
        kernel[:2, :2] = 0.25
    elif "upsamplers" in name:
        kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    else:
        kernel = torch.zeros(weight.shape[2:])
        kernel[weight.shape[2] // 2, weight.shape[3] // 2] = 1
    weight.mul_(0.5)
    bias = conv.bias
    assert isinstance(bias, Tensor)
    first = name.endswith("conv_in")
    for i in range(3):
        for row, sign in ((i, 1.0), (3 + i, -1.0)):
            weight[row] = 0
            weight[row, i if first else row] = kernel * (sign if first else 1.0)
            bias[row] = 0
    count = len(weight) // 3
    weight[-count:] = 0
    bias[-count:] = torch.tensor([1.0, -1.0]).repeat(len(weight))[:count]


def _open_ends(vae: AutoencoderKL | AutoencoderKLQwenImage) -> None:
    """Continue the path for colour through the outputs of both halves and the two 1x1 convolutions between them."""
    for half in (vae.encoder, vae.decoder):
        last = _image_kernel(half.conv_out)
        last.mul_(0.1)
        half.conv_out.bias.zero_()
        for i in range(3):
            last[i] = 0
            last[i, i, 1, 1] = 0.58
            last[i, 3 + i, 1, 1] = -0.58
    for conv in (vae.quant_conv, vae.post_quant_conv):
        weight = _image_kernel(conv)
        weight.mul_(0.1)
        conv.bias.zero_()
        weight += torch.eye(*weight.shape[:2])[:, :, None, None]


def train_vae(vae: ImageVae, run_dir: Path, *, num_steps: int = NUM_STEPS) -> None:
    """Train, or resume, and standardise the latents channel by channel."""
    for module in vae.module.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.module.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    schedule = partial(warm_then_linear, num_steps=num_steps, warm_up=30, hold=0.5, end=0.03)
    scheduled = ScheduledOptimizers([optimizer], schedule)
    images = _render_many(_NUM_SCENES)
    held_out = render([sample_scene(10**9 + i) for i in range(64)])

    def train_step(step: int) -> dict[str, float]:
        rng = torch.Generator().manual_seed(step)
        batch = _batch(images, rng, whole=step >= num_steps * (1 - _WHOLE_IMAGE_SHARE))
        with autocast():
            latents = vae.encode(batch)
            result = vae.decode(latents + 0.05 * torch.randn(latents.shape, generator=rng)).float()
        loss = _reconstruction_loss(result, batch) + 1e-4 * latents.float().square().mean()
        scheduled.minimise(loss, step)
        return {"loss": loss.item()}

    run_loop(
        "vae",
        num_steps,
        train_step,
        {"vae": vae.module, "optimizer": optimizer},
        run_dir / "vae.pt",
        save_every=550,
        look=lambda step: print(f"  step {step}: {reconstruction_psnr(vae, held_out):.2f} dB", flush=True),
    )
    with torch.no_grad():
        vae.standardise(torch.cat([vae.encode(p.float()) for p in images[:1024].split(32)]))
    vae.module.eval()


def _reconstruction_loss(result: Tensor, truth: Tensor) -> Tensor:
    error = result - truth
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.25 * edges


def _render_many(count: int) -> Tensor:
    scenes = list(training_scenes(0, count))
    return torch.cat([render(scenes[i : i + 64]).half() for i in range(0, count, 64)])


def _batch(images: Tensor, rng: torch.Generator, whole: bool) -> Tensor:
    size = images.shape[-1] if whole else 64
    count = 4 if whole else 8
    rows = torch.randint(len(images), (count,), generator=rng).tolist()
    corners = torch.randint(images.shape[-1] - size + 1, (count, 2), generator=rng).tolist()
    crops = torch.stack([images[r, :, y : y + size, x : x + size] for r, (y, x) in zip(rows, corners, strict=True)])
    if torch.rand(1, generator=rng) < 0.5:
        crops = crops.flip(3)
    return crops.float().contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def reconstruction_psnr(vae: ImageVae, images: Tensor) -> float:
    """Mean PSNR in dB of encode and decode, over images `(batch, 3, height, width)` in [-1, 1]."""
    result = vae.decode(vae.encode(images)).clamp(-1, 1)
    return float(psnr(result, images).mean())
