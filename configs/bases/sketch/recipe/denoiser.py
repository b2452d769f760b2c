"""The second part of the recipe: the UNet and the text encoder, trained together on cached latents.

The UNet starts as the identity (`start_as_identity`); without this, such a small model does not follow the text. At
high noise, epsilon almost equals the input: an error of 2 % there is a wrong image, and the text has no effect until
the error is smaller.
"""

import random
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTextModel, CLIPTokenizer

from .state import Clock, load_state, save_state
from .text import caption, make_text_encoder

TEXT_WIDTH = 192
BATCH = 32
LEARNING_RATE = 5e-4
WARMUP_STEPS = 200
DECAY_SHARE = 0.25
HIGH_NOISE = 700  # half of each batch is drawn from here up: below, the noisy image is more informative than the text
LAST_BLOCK = "up_blocks.2.resnets.1"
IDENTITY_CONSTANT = 8.0
IDENTITY_LR_SCALE = 0.1  # learning rate factor for the layers that carry the identity
MIN_SNR = 5.0
Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]
EMA_EVERY, EMA_DECAY = 5, 0.997
TEXT_STEPS, TEXT_BATCH, TEXT_LEARNING_RATE = 3000, 64, 5e-4
SAVE_EVERY = 250


@dataclass(frozen=True)
class Latents:
    """The training data of the UNet: posterior mean and std (N, 4, 16, 16), names and styles."""

    mean: torch.Tensor
    std: torch.Tensor
    names: list[str]
    styles: list[str]


class Denoiser(torch.nn.Module):
    """Text encoder and UNet as one module: (noisy latents, timesteps, token ids) -> predicted noise."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, timesteps, self.text_encoder(ids).last_hidden_state).sample


def make_unet() -> UNet2DConditionModel:
    """A UNet with cross-attention at 8 x 8 and 4 x 4: at 16 x 16 it costs 40 % more and had no benefit.

    The pooled text is also added to the time embedding (`addition_embed_type`), so that it reaches every layer.
    """
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 240),
        attention_head_dim=(4, 4, 5),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def make_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1 (Rombach et al. 2022): scaled linear, epsilon prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def identity_layers(unet: UNet2DConditionModel) -> list[torch.nn.Module]:
    """The layers that carry the input to the output after `start_as_identity`."""
    return [
        unet.get_submodule(name) for name in ("conv_in", f"{LAST_BLOCK}.conv_shortcut", "conv_norm_out", "conv_out")
    ]


@torch.no_grad()
def start_as_identity(unet: UNet2DConditionModel) -> None:
    """Initialize the weights so that the UNet returns its input almost exactly, whatever its other layers do.

    The first skip connection carries x to the shortcut of the last block. Each latent channel has a separate group of
    the output norm: (x, -x, K, -K). The constants keep the standard deviation of the group fixed, and
    silu(x) - silu(-x) = x inverts the nonlinearity. All weights remain trainable; the other channels of the last block
    learn the difference.
    """
    weights = unet.state_dict()
    layers = ("conv_in", f"{LAST_BLOCK}.conv_shortcut", f"{LAST_BLOCK}.conv2", "conv_out")
    in_weight, shortcut_weight, branch_weight, out_weight = (weights[f"{layer}.weight"] for layer in layers)
    in_bias, shortcut_bias, branch_bias, out_bias = (weights[f"{layer}.bias"] for layer in layers)
    assert out_weight.shape[1] == 4 * unet.config["norm_num_groups"]
    first_skip = shortcut_weight.shape[1] - in_weight.shape[0]
    std = ((1 + IDENTITY_CONSTANT**2) / 2) ** 0.5  # of (x, -x, K, -K) if x has std 1
    out_weight *= 0.01
    out_bias.zero_()
    for channel in range(in_weight.shape[1]):
        in_weight[channel] = 0
        in_weight[channel, channel, 1, 1] = 1
        in_bias[channel] = 0
        group = slice(4 * channel, 4 * channel + 4)
        branch_weight[group] = branch_bias[group] = shortcut_weight[group] = 0
        shortcut_weight[group, first_skip + channel] = torch.tensor([1.0, -1, 0, 0])[:, None, None]
        shortcut_bias[group] = torch.tensor([0.0, 0, IDENTITY_CONSTANT, -IDENTITY_CONSTANT])
        out_weight[:, group] = 0
        out_weight[channel, group, 1, 1] = std * torch.tensor([1.0, -1, 0, 0])


def sample_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (count,): half of them uniform in [HIGH_NOISE, 1000), the others uniform in [0, 1000)."""
    timesteps = torch.randint(1000, (count,), generator=generator)
    timesteps[: count // 2] = torch.randint(HIGH_NOISE, 1000, (count // 2,), generator=generator)
    return timesteps


def moving_average(averaged: Tensors, current: Tensors, count: torch.Tensor | int) -> None:
    """Exponential moving average; its decay rises to EMA_DECAY so that the initial weights lose influence quickly."""
    updates = int(count)
    torch._foreach_lerp_(averaged, current, 1 - min(EMA_DECAY, (1 + updates) / (10 + updates)))


def learning_rate_at(step: int, steps: int) -> float:
    """Warmup, constant, and linear decay over the last quarter (so that a longer run starts like a shorter one)."""
    decay_steps = max(1, int(DECAY_SHARE * steps))
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / decay_steps)


def epsilon_losses(
    model: torch.nn.Module,
    latents: torch.Tensor,
    ids: torch.Tensor,
    scheduler: DDIMScheduler,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error on epsilon for each image (B,), and its weight (B,).

    The weight (SNR + 1) / SNR turns it into the loss on v (Salimans and Ho 2022): at high noise, where the text decides
    the content, even a tiny error on epsilon is a wrong image. Without this weight, the text has no effect for many
    epochs. Above gamma, the weight decreases with 1 / SNR (min-SNR, Hang et al. 2023).
    """
    alpha_bar = scheduler.alphas_cumprod.to(latents.device)[timesteps]
    noisy = alpha_bar.sqrt()[:, None, None, None] * latents + (1 - alpha_bar).sqrt()[:, None, None, None] * noise
    attention = sdpa_kernel(SDPBackend.MATH) if latents.device.type == "cpu" else nullcontext()
    with torch.autocast(latents.device.type, torch.bfloat16), attention:
        predicted = model(noisy, timesteps, ids)
    snr = alpha_bar / (1 - alpha_bar)
    return (predicted.float() - noise).pow(2).mean((1, 2, 3)), snr.clamp(max=MIN_SNR) / snr * (snr + 1) / snr


def token_ids(tokenizer: CLIPTokenizer, prompts: Iterable[str]) -> torch.Tensor:
    """Token ids (B, 16), padded and truncated as in the pipeline."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def pretrain_text_encoder(
    model: Denoiser, latents: Latents, tokenizer: CLIPTokenizer, work: Path, device: torch.device, steps: int
) -> None:
    """Train the text encoder to predict the latents from the pooled text with a linear head, which is then discarded.

    Real base models start with a text encoder trained on images (CLIP). This one starts from random weights, and with
    the denoising loss alone it needs hundreds of epochs before it has an effect. This takes a minute or two.
    """
    text_modules = (model.text_encoder, model.unet.add_embedding)
    target = latents.mean.flatten(1).to(device)
    head = torch.nn.Linear(model.unet.config["block_out_channels"][0] * 4, target.shape[1]).to(device)
    parameters = [parameter for module in (*text_modules, head) for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=TEXT_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    first = load_state(work / "words.pt", model=model, head=head, optimizer=optimizer)
    clock = Clock("text", first, steps)
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = TEXT_LEARNING_RATE * min(1.0, (step + 1) / 50, (steps - step) / (0.5 * steps))
        caption_rng = random.Random(step)
        indices = torch.randint(len(target), (TEXT_BATCH,), generator=torch.Generator().manual_seed(step))
        ids = token_ids(tokenizer, [caption(latents.names[i], latents.styles[i], caption_rng) for i in indices])
        with torch.autocast(device.type, torch.bfloat16):
            predicted = head(model.unet.add_embedding(model.text_encoder(ids.to(device)).last_hidden_state))
        loss = (predicted.float() - target[indices]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        clock.tick(step, loss=loss.detach())
    if first < steps:
        save_state(work / "words.pt", steps, model=model, head=head, optimizer=optimizer)


def train_denoiser(
    latents: Latents,
    tokenizer: CLIPTokenizer,
    work: Path,
    device: torch.device,
    steps: int,
    start: Denoiser | None,
) -> Denoiser:
    """Train or resume for a total of `steps` steps; returns the moving average of the weights."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    model = start or Denoiser(make_text_encoder(tokenizer, TEXT_WIDTH), make_unet())
    if start is None:
        start_as_identity(model.unet)
    model.to(device).train().requires_grad_(True)
    if start is None:
        pretrain_text_encoder(model, latents, tokenizer, work, device, TEXT_STEPS)
    average = AveragedModel(model, multi_avg_fn=moving_average)
    identity = [parameter for layer in identity_layers(model.unet) for parameter in layer.parameters()]
    identity_ids = {id(parameter) for parameter in identity}
    others = [parameter for parameter in model.parameters() if id(parameter) not in identity_ids]
    groups = [
        {"params": others, "lr_scale": 1.0},
        {"params": identity, "lr_scale": IDENTITY_LR_SCALE},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first = load_state(work / "denoiser.pt", model=model, average=average, optimizer=optimizer)
    scheduler = make_scheduler()
    mean, std = latents.mean.to(device), latents.std.to(device)
    clock = Clock("denoiser", first, steps)
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps) * group["lr_scale"]
        rng, caption_rng = torch.Generator().manual_seed(step), random.Random(step)
        indices = batch_indices(step, len(mean))
        ids = token_ids(tokenizer, [caption(latents.names[i], latents.styles[i], caption_rng) for i in indices])
        noise, posterior_noise = torch.randn(2, len(indices), *mean.shape[1:], generator=rng).to(device)
        timesteps = sample_timesteps(len(indices), rng).to(device)
        losses, weights = epsilon_losses(
            model, mean[indices] + std[indices] * posterior_noise, ids.to(device), scheduler, timesteps, noise
        )
        optimizer.zero_grad()
        (losses * weights).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % EMA_EVERY == 0:
            average.update_parameters(model)
        clock.tick(step, loss=losses.detach().mean(), weighted=(losses * weights).detach().mean())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_state(work / "denoiser.pt", step + 1, model=model, average=average, optimizer=optimizer)
    averaged = average.module
    assert isinstance(averaged, Denoiser)
    return averaged.eval().requires_grad_(False)


def batch_indices(step: int, count: int) -> torch.Tensor:
    """Indices of the images in one batch; the images are shuffled anew in each epoch, seeded by its number."""
    positions = range(step * BATCH, (step + 1) * BATCH)
    orders = {
        epoch: torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        for epoch in {position // count for position in positions}
    }
    return torch.stack([orders[position // count][position % count] for position in positions])


@torch.no_grad()
def held_out_loss(model: Denoiser, latents: Latents, tokenizer: CLIPTokenizer, draws: int = 8) -> float:
    """The unweighted epsilon loss on held-out images, with fixed noise and `draws` timesteps per image."""
    device = latents.mean.device
    ids = token_ids(tokenizer, [f"{name}, {style}" for name, style in zip(latents.names, latents.styles, strict=True)])
    total = 0.0
    for index in range(draws):
        rng = torch.Generator().manual_seed(index)
        timesteps = ((torch.rand(len(ids), generator=rng) + index) * 1000 / draws).long()
        noise = torch.randn(latents.mean.shape, generator=rng)
        losses, _ = epsilon_losses(
            model,
            latents.mean,
            ids.to(device),
            make_scheduler(),
            timesteps.to(device),
            noise.to(device),
        )
        total += float(losses.mean()) / draws
    return total
