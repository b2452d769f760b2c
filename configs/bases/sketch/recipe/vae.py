"""First part of the recipe: a small AutoencoderKL, 64 px <-> 16x16x4 latents.

Trained on crops (steps are cheap) and, for its last fifth, on whole pictures; half of the pictures are recoloured and
laid on random backgrounds, so that pictures in styles that it never saw come through as well.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from .state import Clock, load_state, save_state

BATCH = 16
CROP_PX = 32
WHOLE_SHARE = 0.2
WHOLE_BATCH = 8
PEAK_RATE = 1.5e-3
KL_WEIGHT = 5e-4


def make_vae() -> AutoencoderKL:
    channels = (32, 64, 96)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up over 5 % of the steps, then half a cosine down to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def background(generator: torch.Generator) -> torch.Tensor:
    """A smooth random ground (3, 128, 128) in [0, 1]: a plain colour or a gradient between colours."""
    coarse = torch.rand(1, 3, 1, 1, generator=generator)
    if torch.rand((), generator=generator) < 0.5:
        coarse = coarse + 0.35 * torch.randn(1, 3, 3, 3, generator=generator)
    return F.interpolate(coarse.clamp(0, 1), 128, mode="bicubic" if coarse.shape[-1] > 1 else "nearest")[0].clamp(0, 1)


def training_batch(rgba: torch.Tensor, step: int, whole: bool) -> torch.Tensor:
    """RGB in [-1, 1], (B, 3, P, P), crops of 32 px or whole pictures of 64 px, from `rgba` (N, 4, 128, 128) in [0, 1].

    A function of the step alone.
    """
    draw = torch.Generator().manual_seed(step)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw))

    batch = []
    for index in torch.randint(len(rgba), (WHOLE_BATCH if whole else BATCH,), generator=draw):
        colour, alpha = rgba[index, :3], rgba[index, 3:]
        ground = torch.ones(3, 128, 128)
        if uniform(0, 1) < 0.4:
            mix = torch.eye(3)[torch.randperm(3, generator=draw)] + 0.15 * torch.randn(3, 3, generator=draw)
            colour = (torch.einsum("ij,jhw->ihw", mix / mix.sum(1, keepdim=True), colour) * uniform(0.6, 1.15)).clamp(
                0, 1
            )
            ground = background(draw)
            colour = colour + uniform(0, 0.5) * alpha * (background(draw) - 0.5)  # soft light, as on round things
        image = (colour * alpha + ground * (1 - alpha)).clamp(0, 1)
        if uniform(0, 1) < 0.5:
            image = image.flip(-1)
        if not whole:
            side = int(uniform(40, 100))
            top, left = (int(uniform(0, 128 - side + 1)) for _ in range(2))
            image = F.interpolate(
                image[None, :, top : top + side, left : left + side], CROP_PX, mode="bilinear", antialias=True
            )[0]
        else:
            image = F.avg_pool2d(image, 2)
        batch.append(image * 2 - 1)
    return torch.stack(batch)


def reconstruction_loss(output: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """L1 and L2 on pixels, L1 on their differences (sharp edges) and on 8-pixel means (true colours)."""
    error = output - pixels
    right, below = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    edges = 0.5 * (right.abs().mean() + below.abs().mean())
    colours = F.avg_pool2d(error, 8).abs().mean()
    return error.abs().mean() + error.pow(2).mean() + edges + 2 * colours


def train_vae(rgba: torch.Tensor, work: Path, device: torch.device, steps: int) -> AutoencoderKL:
    """Train, or go on training, for `steps` steps in all; the result has latents of mean 0 and std 1."""
    finished = work / "vae"
    if finished.is_dir():
        return AutoencoderKL.from_pretrained(finished).to(device)
    torch.manual_seed(0)
    vae = make_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    first = load_state(work / "vae.pt", model=vae, optimizer=optimizer)
    clock = Clock("vae", first, steps)
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, PEAK_RATE)
        whole = step >= (1 - WHOLE_SHARE) * steps
        pixels = training_batch(rgba, step, whole).to(device)
        torch.manual_seed(step)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            output = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = reconstruction_loss(output.float(), pixels) + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        clock.tick(step, loss=loss.detach())
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_state(work / "vae.pt", step + 1, model=vae, optimizer=optimizer)
    vae.eval().requires_grad_(False)
    normalise_latents(vae, rgba, device)
    vae.save_pretrained(finished)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and std, each (N, 4, 16, 16) on the CPU, unscaled, of RGB in [-1, 1]."""
    device = next(vae.parameters()).device
    posteriors = [vae.encode(batch.to(device)).latent_dist for batch in pixels.split(32)]
    return (
        torch.cat([posterior.mean.float().cpu() for posterior in posteriors]),
        torch.cat([posterior.std.float().cpu() for posterior in posteriors]),
    )


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, rgba: torch.Tensor, device: torch.device) -> None:
    """Fold a per-channel shift and scale into the 1x1 convolutions around the latents, so that white paper is 0
    and each channel has std 1: exact for the pictures, and kinder to the noise than one `scaling_factor`.

    Not more than 1: with few latents the last noise level of Stable Diffusion still lets large latents shine through,
    and a model that sees the answer in the noise does not listen to the words."""
    colour, alpha = rgba[:, :3], rgba[:, 3:]
    mean, _ = encode(vae, F.avg_pool2d(colour * alpha + (1 - alpha), 2) * 2 - 1)
    white, _ = encode(vae, torch.ones(1, 3, 64, 64))
    shift = white[0, :, 8, 8].to(device)
    scale = (mean.to(device) - shift[None, :, None, None]).pow(2).mean((0, 2, 3)).sqrt()
    channels = len(scale)
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    assert quant is not None and quant.bias is not None
    assert post_quant is not None and post_quant.bias is not None
    post_quant.bias += (post_quant.weight[:, :, 0, 0] @ shift[:, None])[:, 0]
    post_quant.weight *= scale[None, :, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.bias[channels:] -= 2 * scale.log()
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def psnr_db(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each reconstruction in dB, (N,), for RGB in [-1, 1]."""
    mean, _ = encode(vae, pixels)
    device = next(vae.parameters()).device
    output = torch.cat([vae.decode(batch.to(device)).sample.float().cpu() for batch in mean.split(32)])
    error = ((output.clamp(-1, 1) - pixels) / 2).pow(2).mean((1, 2, 3))
    return -10 * error.log10()
