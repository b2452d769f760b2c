"""Noise, targets, losses and weights compared with diffusers and with the formulas of the papers."""

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr
from tiny import SCHEDULE

from scumble.trainer.training import diffusion

SCHEDULER = DDIMScheduler(**SCHEDULE)
ABAR = SCHEDULER.alphas_cumprod
TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])
LATENTS, NOISE = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))

ZERO_TERMINAL_SNR = (1 - rescale_zero_terminal_snr(SCHEDULER.betas)).cumprod(0)


def test_noisy_latents_and_targets_match_diffusers():
    noisy = SCHEDULER.add_noise(LATENTS, NOISE, TIMESTEPS)  # ty: ignore[invalid-argument-type]
    torch.testing.assert_close(diffusion.add_noise(LATENTS, NOISE, TIMESTEPS, ABAR), noisy)
    assert diffusion.target("epsilon", LATENTS, NOISE, TIMESTEPS, ABAR) is NOISE
    velocity = SCHEDULER.get_velocity(LATENTS, NOISE, TIMESTEPS)  # ty: ignore[invalid-argument-type]
    torch.testing.assert_close(diffusion.target("v_prediction", LATENTS, NOISE, TIMESTEPS, ABAR), velocity)


def test_snr_matches_diffusers():
    torch.testing.assert_close(diffusion.snr(ABAR, TIMESTEPS), compute_snr(SCHEDULER, TIMESTEPS))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_match_the_paper(gamma: float):
    snr = compute_snr(SCHEDULER, TIMESTEPS)
    lower = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    torch.testing.assert_close(diffusion.loss_weights("min_snr", "epsilon", snr, gamma), lower / snr)
    torch.testing.assert_close(diffusion.loss_weights("min_snr", "v_prediction", snr, gamma), lower / (snr + 1))


@pytest.mark.parametrize("weighting", ["none", "min_snr", "debiased"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_weights_are_finite_with_zero_terminal_snr(weighting: str, kind: str):
    snr = diffusion.snr(ZERO_TERMINAL_SNR, torch.arange(1000))
    weights = diffusion.loss_weights(weighting, kind, snr, 5.0)
    assert torch.isfinite(weights).all() and (weights >= 0).all()


def test_weights_depend_on_the_noise_schedule():
    usual, rescaled = (
        diffusion.loss_weights("min_snr", "v_prediction", diffusion.snr(abar, TIMESTEPS), 5.0)
        for abar in (ABAR, ZERO_TERMINAL_SNR)
    )
    assert rescaled[-1] == 0 < usual[-1]


def test_debiased_weights_are_one_over_the_square_root_of_snr():
    snr = torch.tensor([0.25, 1.0, 4.0])
    torch.testing.assert_close(diffusion.loss_weights("debiased", "epsilon", snr, 5.0), torch.tensor([2.0, 1.0, 0.5]))


def test_multires_noise_has_unit_variance_and_more_low_frequencies():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(256, 4, 16, 16, generator=generator)
    coarse = diffusion.multires_noise(noise, 0.7, generator)
    assert float(coarse.var()) == pytest.approx(1.0, abs=0.05)
    pool = torch.nn.functional.avg_pool2d
    assert float(pool(coarse, 8).var()) > 5 * float(pool(noise, 8).var())


def test_offset_noise_shifts_each_channel_by_a_constant():
    generator = torch.Generator().manual_seed(0)
    shift = diffusion.offset_noise(NOISE, 0.1, generator) - NOISE
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), rtol=0, atol=1e-6)
    assert 0.01 < float(shift.std()) < 0.3


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    zero = torch.zeros(2)
    near, far = diffusion.distances(torch.tensor([1e-3, 100.0]), zero, "huber", 0.1)
    assert float(near) == pytest.approx(1e-6, rel=1e-2) and float(far) == pytest.approx(2 * 0.1 * 99.9, rel=1e-3)
    assert diffusion.distances(torch.tensor([2.0]), torch.zeros(1), "l2", 0.1).tolist() == [4.0]
