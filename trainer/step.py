"""One forward pass: a batch of looks -> the weighted loss of each; every random number from (seed, step, slot)."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scumble.configs.options import Data, Objective
from scumble.datasets.captions import ruled, said
from scumble.datasets.folder import Example
from scumble.datasets.images import Crop

from . import diffusion
from .latents import Latents
from .models import Base
from .text import Conditioning, encode, size_numbers

MAX_ENCODINGS = 512  # for SDXL 0.3 MB each


@dataclass(frozen=True)
class Look:
    """One example in one step. `slot` numbers the examples of a step over all its forward passes."""

    index: int
    step: int
    slot: int


class Objectives:
    """The loss of looks at a set, on one base. `crops[i]` are those of example i, of which each look sees one, and
    `masks[i]` weights over the latents of each, or none. Text encodings are kept where the text encoders are frozen."""

    def __init__(
        self,
        base: Base,
        examples: Sequence[Example],
        crops: Sequence[Sequence[Crop]],
        latents: Latents,
        data: Data,
        objective: Objective,
        seed: int,
        text_is_trained: bool,
        masks: Sequence[Sequence[torch.Tensor]] = (),
    ):
        self.base, self.examples, self.crops, self.latents = base, examples, crops, latents
        self.masks = masks or [()] * len(examples)
        self.data, self.objective, self.seed = data, objective, seed
        self.rules_of_prior = data.model_copy(update={"trigger": "", "prefix": "", "suffix": ""})
        self.text_is_trained = text_is_trained
        self.device = base.unet.device
        self.alphas_cumprod = base.alphas_cumprod.to(self.device)
        self.encodings: dict[str, Conditioning] = {}

    def losses(self, looks: Sequence[Look]) -> torch.Tensor:
        """Weighted loss of each look (B,), with gradients to the adapter. All looks have one bucket."""
        draws = [self._draw(look) for look in looks]
        latents = torch.stack([latent for latent, _, _, _ in draws])  # (B, 4, H/8, W/8)
        noise = torch.stack([noise for _, noise, _, _ in draws])
        shown_noise = torch.stack([shown for _, _, shown, _ in draws])
        timesteps = torch.stack([timestep for _, _, _, timestep in draws]).to(self.device)
        noisy = diffusion.add_noise(latents, shown_noise, timesteps, self.alphas_cumprod)
        conditioning = self._conditioning([self._caption(look) for look in looks])
        added = None
        if conditioning.pooled is not None:
            sizes = size_numbers([self.crops[look.index][self._crop(look)] for look in looks]).to(self.device)
            added = {"text_embeds": conditioning.pooled, "time_ids": sizes}
        dtype = self.base.unet.dtype
        prediction = self.base.unet(
            noisy.to(dtype), timesteps, conditioning.hidden.to(dtype), added_cond_kwargs=added
        ).sample
        kind = self.base.source.prediction
        target = diffusion.target(kind, latents, noise, timesteps, self.alphas_cumprod)
        distances = diffusion.distances(prediction, target, self.objective.loss, self.objective.huber_delta)
        weights = diffusion.loss_weights(
            self.objective.weighting,
            kind,
            diffusion.snr(self.alphas_cumprod, timesteps),
            self.objective.min_snr_gamma,
        )
        return (distances * self._masks(looks)).mean((1, 2, 3)) * weights * self._example_weights(looks)

    def _draw(self, look: Look) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, noise of the target, noise of the input, and timestep of one look."""
        generator = generator_for(self.seed, look.step, look.slot)
        shape = (2, *self.latents.mean[look.index][0].shape)
        posterior, noise = torch.randn(shape, generator=generator)
        low, high = self.objective.min_timestep, self.objective.max_timestep
        timestep = torch.randint(low, high + 1, (), generator=generator)
        noise = noise[None]
        if self.objective.multires_noise:
            noise = diffusion.multires_noise(noise, self.objective.multires_noise, generator)
        if self.objective.noise_offset:
            noise = diffusion.offset_noise(noise, self.objective.noise_offset, generator)
        shown = noise
        if self.objective.input_perturbation:
            shown = diffusion.perturb_input(noise, self.objective.input_perturbation, generator)
        latents = self.latents.sample(look.index, self._crop(look), posterior.to(self.device))
        return latents, noise[0].to(self.device), shown[0].to(self.device), timestep

    def _crop(self, look: Look) -> int:
        """Which of the picture's crops is seen, drawn apart so that more crops change no other number."""
        return random.Random(f"{self.seed}/{look.step}/{look.slot}/crop").randrange(len(self.crops[look.index]))

    def _masks(self, looks: Sequence[Look]) -> torch.Tensor | float:
        """Weights of mean 1 over the latents of each look, (B, 1, H/8, W/8); 1 where no look has a mask."""
        if not any(self.masks[look.index] for look in looks):
            return 1.0
        ones = torch.ones(self.latents.mean[looks[0].index][0].shape[1:])
        masks = [self.masks[look.index][self._crop(look)] if self.masks[look.index] else ones for look in looks]
        return torch.stack(masks)[:, None].to(self.device)

    def _caption(self, look: Look) -> str:
        example = self.examples[look.index]
        rules = ruled(self.rules_of_prior if example.prior else self.data, example.rules)
        return said(example.lines or [example.caption], rules, seed=self.seed, step=look.step, index=look.slot)

    def _conditioning(self, captions: Sequence[str]) -> Conditioning:
        if self.text_is_trained:
            return encode(self.base, captions)
        kept = [self._encoding(caption) for caption in captions]
        pooled = [one.pooled for one in kept if one.pooled is not None]
        return Conditioning(torch.cat([one.hidden for one in kept]), torch.cat(pooled) if pooled else None)

    def _encoding(self, caption: str) -> Conditioning:
        """Of a frozen text encoder; the latest are kept, which are all of them unless tags are shuffled."""
        if caption not in self.encodings:
            if len(self.encodings) >= MAX_ENCODINGS:
                del self.encodings[next(iter(self.encodings))]
            with torch.no_grad():
                self.encodings[caption] = encode(self.base, [caption])
        return self.encodings[caption]

    def _example_weights(self, looks: Sequence[Look]) -> torch.Tensor:
        weights = [self.data.prior_weight if self.examples[look.index].prior else 1.0 for look in looks]
        return torch.tensor(weights, device=self.device)


def generator_for(seed: int, step: int, slot: int) -> torch.Generator:
    """A generator that depends on nothing else, so that resuming, or more processes, draw the same numbers."""
    return torch.Generator().manual_seed(seed_for(seed, step, slot))


def seed_for(seed: int, step: int, use: int | str) -> int:
    """A seed of its own for each use of chance in a step, below 2^63."""
    digest = hashlib.blake2b(f"{seed}/{step}/{use}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
