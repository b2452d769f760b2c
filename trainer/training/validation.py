"""The loss on pictures that training never sees: what tells learning from learning by heart."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from .diffusion import stratified
from .objective import Objectives, Sample

DRAWS = 4  # looks at each picture, at timesteps spread over the range


class Validation:
    """The mean loss of held-out examples `indices`, at most `batch` at once; `buckets[i]` is the shape of example i.

    It is the loss that is trained, but with the same noise, timesteps and crops each time, and whole captions. So two
    measurements differ by what the adapter learned in between, and none of the run's own chance is used up.
    """

    def __init__(
        self,
        objectives: Objectives,
        indices: Sequence[int],
        buckets: Sequence[object],
        batch: int,
        surroundings: Callable[[], AbstractContextManager[object]],
    ):
        self.objectives, self.surroundings = objectives.without_randomness(), surroundings
        alike: dict[object, list[Sample]] = {}
        for slot, index in enumerate(indices):
            alike.setdefault(buckets[index], []).append(Sample(index, 0, slot))
        self.batches = [looks[at : at + batch] for looks in alike.values() for at in range(0, len(looks), batch)]

    @torch.no_grad()
    def loss(self) -> float:
        """Of the adapter as it is now; modules that train are put back into training."""
        base, objective = self.objectives.base, self.objectives.objective
        training = [module for module in (base.unet, *base.text_encoders) if module.training]
        for module in training:
            module.eval()
        losses: list[torch.Tensor] = []
        try:
            for looks in self.batches:
                for draw in range(DRAWS):
                    batch = self.objectives.batch([replace(look, step=draw) for look in looks])
                    batch["timesteps"] = stratified(
                        batch["timesteps"], draw, DRAWS, objective.min_timestep, objective.max_timestep
                    )
                    with self.surroundings():
                        losses.append(self.objectives.losses_of(batch))
        finally:
            for module in training:
                module.train()
        return float(torch.cat(losses).mean())
