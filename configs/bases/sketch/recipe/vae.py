"""The first part of the recipe: a small AutoencoderKL that encodes 64 px images as latents (4, 16, 16).

It is trained on crops, which are cheap, and on whole images in the last fifth of the steps. 40 % of the images are
recolored and placed on random backgrounds, so that images in unseen styles are also reconstructed well.
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
PEAK_LR = 1.5e-3
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
    """The learning rate: linear warmup over 5 % of the steps, then cosine decay to zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def random_background(generator: torch.Generator) -> torch.Tensor:
    """A smooth random background (3, 128, 128) in [0, 1]: one color or a gradient between colors."""
    coarse = torch.rand(1, 3, 1, 1, generator=generator)
    if torch.rand((), generator=generator) < 0.5:
        coarse = coarse + 0.35 * torch.randn(1, 3, 3, 3, generator=generator)
    return F.interpolate(coarse.clamp(0, 1), 128, mode="bicubic" if coarse.shape[-1] > 1 else "nearest")[0].clamp(0, 1)


def training_batch(rgba: torch.Tensor, step: int, whole: bool) -> torch.Tensor:
    """Draw a batch from `rgba` (N, 4, 128, 128) in [0, 1]: RGB (B, 3, P, P) in [-1, 1], P = 64 if `whole` else 32.

    The same step always gives the same batch.
    """
    rng = torch.Generator().manual_seed(step)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    batch = []
    for index in torch.randint(len(rgba), (WHOLE_BATCH if whole else BATCH,), generator=rng):
        color, alpha = rgba[index, :3], rgba[index, 3:]
        background = torch.ones(3, 128, 128)
        if uniform(0, 1) < 0.4:
            mix = torch.eye(3)[torch.randperm(3, generator=rng)] + 0.15 * torch.randn(3, 3, generator=rng)
            color = (torch.einsum("ij,jhw->ihw", mix / mix.sum(1, keepdim=True), color) * uniform(0.6, 1.15)).clamp(
                0, 1
            )
            background = random_background(rng)
            color = color + uniform(0, 0.5) * alpha * (random_background(rng) - 0.5)  # soft shading
        image = (color * alpha + background * (1 - alpha)).clamp(0, 1)
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
    """L1 and L2 on pixels, L1 on their gradients (sharp edges) and on 8 x 8 means (accurate colors)."""
    error = output - pixels
    right, below = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    edges = 0.5 * (right.abs().mean() + below.abs().mean())
    colors = F.avg_pool2d(error, 8).abs().mean()
    return error.abs().mean() + error.pow(2).mean() + edges + 2 * colors


def train_vae(rgba: torch.Tensor, work: Path, device: torch.device, steps: int) -> AutoencoderKL:
    """Train or resume for a total of `steps` steps; returns a VAE with normalized latents."""
    finished = work / "vae"
    if finished.is_dir():
        return AutoencoderKL.from_pretrained(finished).to(device)
    torch.manual_seed(0)
    vae = make_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4)
    first = load_state(work / "vae.pt", model=vae, optimizer=optimizer)
    clock = Clock("vae", first, steps)
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, PEAK_LR)
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
    normalize_latents(vae, rgba, device)
    vae.save_pretrained(finished)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and std for RGB in [-1, 1], each (N, 4, 16, 16) on the CPU, unscaled."""
    device = next(vae.parameters()).device
    posteriors = [vae.encode(batch.to(device)).latent_dist for batch in pixels.split(32)]
    return (
        torch.cat([posterior.mean.float().cpu() for posterior in posteriors]),
        torch.cat([posterior.std.float().cpu() for posterior in posteriors]),
    )


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, rgba: torch.Tensor, device: torch.device) -> None:
    """Fold a shift and a scale per channel into the 1x1 convolutions around the latents, so that white is 0 and the
    std is 1. The decoded images stay the same, and each channel fits the noise better than with one `scaling_factor`.

    The std must not be larger: with so few latents, larger ones remain visible at the last noise level of Stable
    Diffusion, and a model that sees the answer in the noise ignores the text.
    """
    color, alpha = rgba[:, :3], rgba[:, 3:]
    mean, _ = encode(vae, F.avg_pool2d(color * alpha + (1 - alpha), 2) * 2 - 1)
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
    """Peak signal-to-noise ratio of each reconstruction in dB (N,), for RGB in [-1, 1]."""
    mean, _ = encode(vae, pixels)
    device = next(vae.parameters()).device
    output = torch.cat([vae.decode(batch.to(device)).sample.float().cpu() for batch in mean.split(32)])
    error = ((output.clamp(-1, 1) - pixels) / 2).pow(2).mean((1, 2, 3))
    return -10 * error.log10()
