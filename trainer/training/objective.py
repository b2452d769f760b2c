"""The training objective: a batch of samples -> the weighted loss of each.

Every random number depends only on (seed, step, position), so that a resumed run, or one on more devices, draws the
same numbers.
"""

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
from ..base_model.text_encoding import Conditioning, encode_ids, encode_prompts, time_ids, token_ids
from ..system.device import to_device
from . import diffusion

MAX_ENCODINGS = 512  # 0.3 MB each for SDXL
Batch = dict[str, torch.Tensor]
"""`latents`, `noise`, `input_noise` (B, 4, H/8, W/8), `timesteps` and `weights` (B,); `masks` (B, 1, H/8, W/8) if there
are any; `time_ids` (B, 6) for SDXL; token `ids` and `ids2` (B, T), or the encoded text `hidden` and `pooled`."""


@dataclass(frozen=True)
class Sample:
    """A training sample: example `index` in one step, at a `position` among all samples of that step."""

    index: int
    step: int
    position: int


class Objectives:
    """The losses of training samples of an image set on a base.

    `crops[i]` are the crops of example i, of which each sample uses one. `masks[i]` are their masks over the latents,
    or empty. Text encodings are cached if the text encoders are frozen.
    """

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
        self.regularization_rules = data.model_copy(update={"trigger": "", "caption_prefix": "", "caption_suffix": ""})
        self.text_is_trained = text_is_trained
        self.device, self.dtype = base.device, base.unet.dtype
        self.alphas_cumprod = base.alphas_cumprod.to(self.device)
        self.encodings: dict[str, Conditioning] = {}

    def without_randomness(self) -> "Objectives":
        """The same objective with whole captions in their original order. It shares the cache of text encodings."""
        twin = copy(self)
        twin.data = self.data.model_copy(update=NOT_RANDOM)
        twin.examples = [
            replace(example, rules=tuple(rule for rule in example.rules if rule[0] not in NOT_RANDOM))
            for example in self.examples
        ]
        return twin

    def losses(self, samples: Sequence[Sample]) -> torch.Tensor:
        """The weighted loss of each sample (B,), with gradients to the adapter. All samples must be of one bucket."""
        return self.losses_of(self.batch(samples))

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """The inputs of a pass over samples of one bucket. Computes no gradients and never waits for the device."""
        posterior, noise, input_noise, timesteps = map(torch.stack, zip(*map(self._draw, samples), strict=True))
        places = [(sample.index, self._crop(sample)) for sample in samples]
        batch = {
            "latents": self.latents.sample(places, self._sent(posterior)),
            "noise": self._sent(noise),
            "input_noise": self._sent(input_noise),
            "timesteps": self._sent(timesteps),
            "weights": self._sent(torch.tensor([self._weight(sample) for sample in samples])),
        }
        if any(self.masks[sample.index] for sample in samples):
            batch["masks"] = self._sent(self._masks(places))
        if len(self.base.text_encoders) > 1:
            batch["time_ids"] = self._sent(time_ids([self.crops[index][crop] for index, crop in places]))
        captions = [self._caption(sample) for sample in samples]
        if self.text_is_trained:
            return batch | dict(zip(("ids", "ids2"), token_ids(self.base, captions), strict=False))
        encodings = [self._encoding(caption) for caption in captions]
        batch["hidden"] = torch.cat([one.hidden for one in encodings])
        pooled = [one.pooled for one in encodings if one.pooled is not None]
        return batch | ({"pooled": torch.cat(pooled)} if pooled else {})

    def losses_of(self, batch: Batch) -> torch.Tensor:
        """The weighted loss of each sample (B,). Everything is computed on the device, so that it can be captured."""
        timesteps, noise, latents = batch["timesteps"], batch["noise"], batch["latents"]
        noisy = diffusion.add_noise(latents, batch["input_noise"], timesteps, self.alphas_cumprod)
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

    def _draw(self, sample: Sample) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw the noise of the posterior, the target and the input, each (4, H/8, W/8), and the timestep."""
        generator = generator_for(self.seed, sample.step, sample.position)
        shape = (2, *self.latents.mean[sample.index][0].shape)
        posterior, noise = torch.randn(shape, generator=generator)
        low, high = self.objective.min_timestep, self.objective.max_timestep
        timestep = torch.randint(low, high + 1, (), generator=generator)
        noise = noise[None]
        if self.objective.multires_noise_discount:
            noise = diffusion.multires_noise(noise, self.objective.multires_noise_discount, generator)
        if self.objective.noise_offset:
            noise = diffusion.offset_noise(noise, self.objective.noise_offset, generator)
        input_noise = noise
        if self.objective.input_perturbation:
            input_noise = diffusion.perturb_input(noise, self.objective.input_perturbation, generator)
        return posterior, noise[0], input_noise[0], timestep

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        return to_device(tensor, self.device)

    def _crop(self, sample: Sample) -> int:
        """The index of a random crop, drawn separately, so that the number of crops changes no other random number."""
        draw = random.Random(f"{self.seed}/{sample.step}/{sample.position}/crop")
        return draw.randrange(len(self.crops[sample.index]))

    def _masks(self, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Weights of mean 1 over the latents of each (example, crop), (B, 1, H/8, W/8); all 1 without a mask."""
        ones = torch.ones(self.latents.mean[places[0][0]][0].shape[1:])
        floor = self.data.mask_floor
        return torch.stack(
            [mask_weights(self.masks[index][crop], floor) if self.masks[index] else ones for index, crop in places]
        )[:, None]

    def _weight(self, sample: Sample) -> float:
        return self.data.prior_loss_weight if self.examples[sample.index].is_regularization else 1.0

    def encode_ahead(self, samples: Iterable[Sample]) -> bool:
        """Encode the captions of all samples, so that frozen text encoders can be offloaded; False if too many."""
        captions: dict[str, None] = {}
        for sample in samples:
            captions[self._caption(sample)] = None
            if len(captions) > MAX_ENCODINGS:
                return False
        with on_device(self.base, *self.base.text_encoders):
            for caption in captions:
                self._encoding(caption)
        return True

    def _caption(self, sample: Sample) -> str:
        example = self.examples[sample.index]
        rules = with_folder_rules(self.regularization_rules if example.is_regularization else self.data, example.rules)
        return caption_at_step(
            example.lines or [example.caption], rules, seed=self.seed, step=sample.step, index=sample.position
        )

    def _encoding(self, caption: str) -> Conditioning:
        """The cached encoding of a caption by frozen text encoders. The oldest is dropped beyond `MAX_ENCODINGS`."""
        if caption not in self.encodings:
            if len(self.encodings) >= MAX_ENCODINGS:
                del self.encodings[next(iter(self.encodings))]
            with torch.no_grad(), on_device(self.base, *self.base.text_encoders):
                self.encodings[caption] = encode_prompts(self.base, [caption])
        return self.encodings[caption]


def generator_for(seed: int, step: int, position: int) -> torch.Generator:
    """The random generator of one sample."""
    return torch.Generator().manual_seed(seed_for(seed, step, position))


def seed_for(seed: int, step: int, use: int | str) -> int:
    """A seed below 2^63 for one use of random numbers in a step."""
    digest = hashlib.blake2b(f"{seed}/{step}/{use}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
