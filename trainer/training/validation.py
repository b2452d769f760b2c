"""The loss on held-out images, which shows whether the adapter generalizes or memorizes the training images."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from .diffusion import stratified
from .objective import Objectives, Sample

DRAWS = 4  # samples per image, at timesteps spread over the range


class Validation:
    """The mean loss of the held-out examples `indices`, in batches of at most `batch_size`, each from one bucket.

    It is the training loss, but with the same noise, timesteps and crops each time, and whole captions. Two
    measurements therefore differ only by what the adapter learned in between, and training draws the same random
    numbers as without validation. `buckets[i]` is the bucket of example i; `autocast` is that of the training pass.
    """

    def __init__(
        self,
        objectives: Objectives,
        indices: Sequence[int],
        buckets: Sequence[object],
        batch_size: int,
        autocast: Callable[[], AbstractContextManager[object]],
    ):
        self.objectives, self.autocast = objectives.without_randomness(), autocast
        by_bucket: dict[object, list[Sample]] = {}
        for position, index in enumerate(indices):
            by_bucket.setdefault(buckets[index], []).append(Sample(index, 0, position))
        self.batches = [
            samples[start : start + batch_size]
            for samples in by_bucket.values()
            for start in range(0, len(samples), batch_size)
        ]

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss of the current adapter. Modules in training mode are in eval mode meanwhile."""
        base, objective = self.objectives.base, self.objectives.objective
        training = [module for module in (base.unet, *base.text_encoders) if module.training]
        for module in training:
            module.eval()
        losses: list[torch.Tensor] = []
        try:
            for samples in self.batches:
                for draw in range(DRAWS):
                    batch = self.objectives.batch([replace(sample, step=draw) for sample in samples])
                    batch["timesteps"] = stratified(
                        batch["timesteps"], draw, DRAWS, objective.min_timestep, objective.max_timestep
                    )
                    with self.autocast():
                        losses.append(self.objectives.losses_of(batch))
        finally:
            for module in training:
                module.train()
        return float(torch.cat(losses).mean())
