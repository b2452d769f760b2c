"""The mathematics of diffusion training: noise, targets, losses and weights. Pure functions.

Notation of the papers: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4),
SNR(t) = abar_t / (1 - abar_t).
"""

import torch
import torch.nn.functional as F


def stratified(timesteps: torch.Tensor, stratum: int, num_strata: int, low: int, high: int) -> torch.Tensor:
    """Map timesteps that are uniform from `low` to `high` into one of `num_strata` equal parts of that range."""
    return low + (timesteps - low + stratum * (high - low + 1)) // num_strata


def snr(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The signal-to-noise ratio of each timestep (B,); 0 at the end of a schedule with zero terminal SNR."""
    alpha_bar = alphas_cumprod[timesteps]
    return alpha_bar / (1 - alpha_bar)


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """x_t from `latents` x_0 and `noise` eps, both (B, C, H, W) (Ho et al. 2020, eq. 4)."""
    alpha_bar = alphas_cumprod[timesteps].view(-1, 1, 1, 1).to(latents.dtype)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def target(
    prediction_type: str,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """The target of the prediction: eps, or v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans and Ho 2022)."""
    if prediction_type == "epsilon":
        return noise
    alpha_bar = alphas_cumprod[timesteps].view(-1, 1, 1, 1).to(latents.dtype)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents


def offset_noise(noise: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Noise (B, C, H, W) plus a random constant per channel, so that training learns brightness (Guttenberg 2023)."""
    shift = torch.randn(*noise.shape[:2], 1, 1, generator=generator, dtype=noise.dtype)
    return noise + strength * shift.to(noise.device)


def multires_noise(noise: torch.Tensor, discount: float, generator: torch.Generator) -> torch.Tensor:
    """Noise (B, C, H, W) plus coarser noise, scaled by `discount` per octave, at unit variance (Whitaker 2023)."""
    batch, channels, height, width = noise.shape
    total, variance, octave = noise, 1.0, 1
    while min(height, width) >> octave >= 1:
        coarse = torch.randn(batch, channels, height >> octave, width >> octave, generator=generator, dtype=noise.dtype)
        fine = F.interpolate(coarse.to(noise.device), (height, width), mode="nearest-exact")
        total = total + discount**octave * fine
        variance += discount ** (2 * octave)
        octave += 1
    return total / variance**0.5


def perturb_input(noise: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """The noise to add to the latents, while the target keeps `noise` itself (Ning et al. 2023, algorithm 1)."""
    return noise + strength * torch.randn(noise.shape, generator=generator, dtype=noise.dtype).to(noise.device)


def distances(prediction: torch.Tensor, target: torch.Tensor, loss_type: str, huber_delta: float) -> torch.Tensor:
    """The loss of each element in fp32: e², or pseudo-Huber 2 d (sqrt(e² + d²) - d) (Charbonnier et al. 1997)."""
    error = prediction.float() - target.float()
    if loss_type == "l2":
        return error**2
    return 2 * huber_delta * ((error**2 + huber_delta**2).sqrt() - huber_delta)


def loss_weights(weighting: str, prediction_type: str, snr: torch.Tensor, min_snr_gamma: float) -> torch.Tensor:
    """The loss weight of each timestep (B,), finite at SNR 0.

    min_snr: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v (Hang et al. 2023, eq. 10 and appendix).
    debiased: 1 / sqrt(SNR) for epsilon (Yu et al. 2023, eq. 11) with SNR clamped at 0.001, 1 / (SNR + 1) for v.
    """
    if weighting == "none":
        return torch.ones_like(snr)
    if weighting == "min_snr":
        if prediction_type == "epsilon":
            return (min_snr_gamma / snr).clamp(max=1.0)
        return snr.clamp(max=min_snr_gamma) / (snr + 1)
    if prediction_type == "epsilon":
        return snr.clamp(min=1e-3).rsqrt()
    return 1 / (snr + 1)
