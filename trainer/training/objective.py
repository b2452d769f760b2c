"""One forward pass: a batch of looks -> the weighted loss of each; every random number from (seed, step, slot)."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch

from scumble.configs.options import Data, Objective
from scumble.datasets.captions import NOT_RANDOM, caption_at_step, with_folder_rules
from scumble.datasets.reading.folder import Example
from scumble.datasets.reading.images import Crop
from scumble.datasets.tensors import mask_weights

from ..base_model.latents import Latents
from ..base_model.load import Base
from ..base_model.offload import on_device
from ..base_model.text_encoding import Conditioning, encode_ids, encode_prompts, size_numbers, token_ids
from ..system.device import to_device
from . import diffusion

MAX_ENCODINGS = 512  # for SDXL 0.3 MB each
Batch = dict[str, torch.Tensor]
"""`latents`, `noise`, `shown_noise` (B, 4, H/8, W/8), `timesteps` and `weights` (B,); where the set has them `masks`
(B, 1, H/8, W/8) and SDXL's `time_ids` (B, 6); of the text `ids` and `ids2` (B, T), or encoded `hidden` and `pooled`."""


@dataclass(frozen=True)
class Sample:
    """One example in one step. `position` numbers the examples of a step over all its forward passes."""

    index: int
    step: int
    position: int


class Objectives:
    """The loss of looks at a set, on one base. `crops[i]` are those of example i, of which each look sees one, and
    `masks[i]` masks over the latents of each, or none. Text encodings are kept where the text encoders are frozen."""

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
        self.rules_of_prior = data.model_copy(update={"trigger": "", "caption_prefix": "", "caption_suffix": ""})
        self.text_is_trained = text_is_trained
        self.device, self.dtype = base.device, base.unet.dtype
        self.alphas_cumprod = base.alphas_cumprod.to(self.device)
        self.encodings: dict[str, Conditioning] = {}

    def without_randomness(self) -> "Objectives":
        """The same, but captions are heard whole and in their order; text encodings are kept together."""
        twin = copy(self)
        twin.data = self.data.model_copy(update=NOT_RANDOM)
        twin.examples = [
            replace(example, rules=tuple(rule for rule in example.rules if rule[0] not in NOT_RANDOM))
            for example in self.examples
        ]
        return twin

    def losses(self, looks: Sequence[Sample]) -> torch.Tensor:
        """Weighted loss of each look (B,), with gradients to the adapter. All looks have one bucket."""
        return self.losses_of(self.batch(looks))

    def batch(self, looks: Sequence[Sample]) -> Batch:
        """All that a pass over looks of one bucket needs; without gradients, and without waiting for the device."""
        posterior, noise, shown_noise, timesteps = map(torch.stack, zip(*map(self._draw, looks), strict=True))
        places = [(look.index, self._crop(look)) for look in looks]
        batch = {
            "latents": self.latents.sample(places, self._sent(posterior)),
            "noise": self._sent(noise),
            "shown_noise": self._sent(shown_noise),
            "timesteps": self._sent(timesteps),
            "weights": self._sent(torch.tensor([self._weight(look) for look in looks])),
        }
        if any(self.masks[look.index] for look in looks):
            batch["masks"] = self._sent(self._masks(places))
        if len(self.base.text_encoders) > 1:
            batch["time_ids"] = self._sent(size_numbers([self.crops[index][crop] for index, crop in places]))
        captions = [self._caption(look) for look in looks]
        if self.text_is_trained:
            return batch | dict(zip(("ids", "ids2"), token_ids(self.base, captions), strict=False))
        kept = [self._encoding(caption) for caption in captions]
        batch["hidden"] = torch.cat([one.hidden for one in kept])
        pooled = [one.pooled for one in kept if one.pooled is not None]
        return batch | ({"pooled": torch.cat(pooled)} if pooled else {})

    def losses_of(self, batch: Batch) -> torch.Tensor:
        """Weighted loss of each look (B,); on the device from beginning to end, so that it can be captured."""
        timesteps, noise, latents = batch["timesteps"], batch["noise"], batch["latents"]
        noisy = diffusion.add_noise(latents, batch["shown_noise"], timesteps, self.alphas_cumprod)
        if "ids" in batch:
            conditioning = encode_ids(self.base, [batch[name] for name in ("ids", "ids2") if name in batch])
        else:
            conditioning = Conditioning(batch["hidden"], batch.get("pooled"))
        added = None
        if conditioning.pooled is not None:
            added = {"text_embeds": conditioning.pooled, "time_ids": batch["time_ids"]}
        prediction = self.base.unet(
            noisy.to(self.dtype), timesteps, conditioning.hidden.to(self.dtype), added_cond_kwargs=added
        ).sample
        kind = self.base.source.prediction
        target = diffusion.target(kind, latents, noise, timesteps, self.alphas_cumprod)
        distances = diffusion.distances(prediction, target, self.objective.loss_type, self.objective.huber_delta)
        weights = diffusion.loss_weights(
            self.objective.loss_weighting,
            kind,
            diffusion.snr(self.alphas_cumprod, timesteps),
            self.objective.min_snr_gamma,
        )
        return (distances * batch.get("masks", 1.0)).mean((1, 2, 3)) * weights * batch["weights"]

    def _draw(self, look: Sample) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise of the posterior, of the target and of the input, each (4, H/8, W/8), and timestep of one look."""
        generator = generator_for(self.seed, look.step, look.position)
        shape = (2, *self.latents.mean[look.index][0].shape)
        posterior, noise = torch.randn(shape, generator=generator)
        low, high = self.objective.min_timestep, self.objective.max_timestep
        timestep = torch.randint(low, high + 1, (), generator=generator)
        noise = noise[None]
        if self.objective.multires_noise_discount:
            noise = diffusion.multires_noise(noise, self.objective.multires_noise_discount, generator)
        if self.objective.noise_offset:
            noise = diffusion.offset_noise(noise, self.objective.noise_offset, generator)
        shown = noise
        if self.objective.input_perturbation:
            shown = diffusion.perturb_input(noise, self.objective.input_perturbation, generator)
        return posterior, noise[0], shown[0], timestep

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        return to_device(tensor, self.device)

    def _crop(self, look: Sample) -> int:
        """Which of the picture's crops is seen, drawn apart so that more crops change no other number."""
        return random.Random(f"{self.seed}/{look.step}/{look.position}/crop").randrange(len(self.crops[look.index]))

    def _masks(self, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Weights of mean 1 over the latents of each (example, crop), (B, 1, H/8, W/8); 1 where one has no mask."""
        ones = torch.ones(self.latents.mean[places[0][0]][0].shape[1:])
        floor = self.data.mask_floor
        return torch.stack(
            [mask_weights(self.masks[index][crop], floor) if self.masks[index] else ones for index, crop in places]
        )[:, None]

    def _weight(self, look: Sample) -> float:
        return self.data.prior_loss_weight if self.examples[look.index].is_regularization else 1.0

    def encode_ahead(self, looks: Iterable[Sample]) -> bool:
        """Encode the captions of all looks, so that frozen text encoders can wait; not, where they are too many."""
        captions: dict[str, None] = {}
        for look in looks:
            captions[self._caption(look)] = None
            if len(captions) > MAX_ENCODINGS:
                return False
        with on_device(self.base, *self.base.text_encoders):
            for caption in captions:
                self._encoding(caption)
        return True

    def _caption(self, look: Sample) -> str:
        example = self.examples[look.index]
        rules = with_folder_rules(self.rules_of_prior if example.is_regularization else self.data, example.rules)
        return caption_at_step(
            example.lines or [example.caption], rules, seed=self.seed, step=look.step, index=look.position
        )

    def _encoding(self, caption: str) -> Conditioning:
        """Of a frozen text encoder; the latest are kept, which are all of them unless tags are shuffled."""
        if caption not in self.encodings:
            if len(self.encodings) >= MAX_ENCODINGS:
                del self.encodings[next(iter(self.encodings))]
            with torch.no_grad(), on_device(self.base, *self.base.text_encoders):
                self.encodings[caption] = encode_prompts(self.base, [caption])
        return self.encodings[caption]


def generator_for(seed: int, step: int, slot: int) -> torch.Generator:
    """A generator that depends on nothing else, so that resuming, or more processes, draw the same numbers."""
    return torch.Generator().manual_seed(seed_for(seed, step, slot))


def seed_for(seed: int, step: int, use: int | str) -> int:
    """A seed of its own for each use of chance in a step, below 2^63."""
    digest = hashlib.blake2b(f"{seed}/{step}/{use}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
