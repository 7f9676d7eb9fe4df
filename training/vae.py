"""The small picture autoencoder: stock `AutoencoderKL`, eight times smaller sides, 8 latent channels."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.loop import run_loop, warm_then_linear
from training.rendering import render
from training.scenes import sample_scene, training_scenes

NUM_STEPS = 4400
_WHOLE_PICTURE_STEPS = 700  # at the end: whole pictures instead of crops
_NUM_SCENES = 8192


def build_vae() -> AutoencoderKL:
    """The untrained network, initialised as an exact linear path for colour.

    With the default initialisation GroupNorm removes a picture's mean colour and training stalls near 20 dB. Here
    channels 0:3 carry +RGB and 3:6 carry -RGB through every convolution on the way (SiLU(x) - SiLU(-x) = x), and the
    last third of the channels are constants of +-1 that fix the norm's statistics. About 29 dB before the first step.
    """
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=8,
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
                    module.weight.zero_()
                    module.bias.zero_()
                elif isinstance(module, nn.Conv2d) and name.endswith(("conv_in", "conv_shortcut", "conv")):
                    _carry_colour(module, name)
            last = half.conv_out
            last.weight.mul_(0.1)
            last.bias.zero_()
            for i in range(3):
                last.weight[i].zero_()
                last.weight[i, i, 1, 1] = 0.58
                last.weight[i, 3 + i, 1, 1] = -0.58
        for conv in (vae.quant_conv, vae.post_quant_conv):
            conv.weight.mul_(0.1)
            conv.bias.zero_()
            conv.weight += torch.eye(*conv.weight.shape[:2])[:, :, None, None]
    return vae


def _carry_colour(conv: nn.Conv2d, name: str) -> None:
    if "downsamplers" in name:
        kernel = torch.zeros(3, 3)
        kernel[:2, :2] = 0.25
    elif "upsamplers" in name:
        kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    else:
        kernel = torch.zeros(conv.kernel_size)
        kernel[conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1
    conv.weight.mul_(0.5)
    bias = conv.bias
    assert bias is not None
    first = name == "conv_in"
    for i in range(3):
        for row, sign in ((i, 1.0), (3 + i, -1.0)):
            conv.weight[row].zero_()
            conv.weight[row, i if first else row] = kernel * (sign if first else 1.0)
            bias[row] = 0
    anchors = slice(conv.out_channels - conv.out_channels // 3, None)
    conv.weight[anchors].zero_()
    bias[anchors] = torch.tensor([1.0, -1.0]).repeat(conv.out_channels)[: conv.out_channels // 3]


def train_vae(run_dir: Path, *, num_steps: int = NUM_STEPS) -> AutoencoderKL:
    """Train, or resume, and return the autoencoder with its latents standardised channel by channel."""
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    pictures = _render_many(_NUM_SCENES)
    held_out = render([sample_scene(10**9 + i) for i in range(64)])

    def train_step(step: int) -> dict[str, float]:
        rng = torch.Generator().manual_seed(step)
        whole = step >= num_steps - _WHOLE_PICTURE_STEPS
        batch = _batch(pictures, rng, whole)
        factor = warm_then_linear(step, num_steps, warm_up=30, hold=0.5, end=0.03)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(batch).latent_dist.mode()
            result = vae.decode(latents + 0.05 * torch.randn(latents.shape, generator=rng)).sample.float()
        error = result - batch
        edges = sum((error.diff(dim=d)).abs().mean() for d in (2, 3))
        loss = error.abs().mean() + error.square().mean() + 0.25 * edges + 1e-4 * latents.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.item()}

    run_loop(
        "vae",
        num_steps,
        train_step,
        {"vae": vae, "optimizer": optimizer},
        run_dir / "vae.pt",
        save_every=550,
        look=lambda step: print(f"  step {step}: {reconstruction_psnr(vae, held_out):.2f} dB", flush=True),
    )
    _standardise_latents(vae, pictures[:1024])
    return vae.eval()


def _render_many(count: int) -> Tensor:
    scenes = list(training_scenes(0, count))
    return torch.cat([render(scenes[i : i + 64]).half() for i in range(0, count, 64)])


def _batch(pictures: Tensor, rng: torch.Generator, whole: bool) -> Tensor:
    size = pictures.shape[-1] if whole else 64
    count = 4 if whole else 8
    rows = torch.randint(len(pictures), (count,), generator=rng).tolist()
    corners = torch.randint(pictures.shape[-1] - size + 1, (count, 2), generator=rng).tolist()
    crops = torch.stack([pictures[r, :, y : y + size, x : x + size] for r, (y, x) in zip(rows, corners, strict=True)])
    if torch.rand(1, generator=rng) < 0.5:
        crops = crops.flip(3)
    return crops.float().contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean PSNR in dB of encode and decode, over pictures `(batch, 3, height, width)` in [-1, 1]."""
    result = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    return float((10 * torch.log10(4 / (result - pictures).square().mean((1, 2, 3)))).mean())


@torch.no_grad()
def _standardise_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold per-channel mean and deviation of the latents into the two 1x1 convolutions.

    FluxPipeline knows one scaling factor for all channels, and ours differ by 3.5 times, so the checkpoint's is 1.
    """
    latents = torch.cat([vae.encode(p.float()).latent_dist.mode() for p in pictures.split(32)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    vae.quant_conv.weight[:channels] /= std[:, None, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
    # The variance half is never trained: fix it at e^-10, so that sampling is the mode.
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = -10
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]
