"""Prompts -> conditioning: tokens, text encodings, and the pooled text and time ids of SDXL."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scumble.datasets.reading.images import Crop

from ..system.device import to_device
from .load import Base


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of the UNet: `hidden` (B, T, D) and, for SDXL, `pooled` (B, 1280)."""

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None

    def __getitem__(self, rows: torch.Tensor) -> "Conditioning":
        return Conditioning(self.hidden[rows], None if self.pooled is None else self.pooled[rows])


def token_ids(base: Base, prompts: Sequence[str]) -> list[torch.Tensor]:
    """Token ids (B, T) for each text encoder, padded and truncated to the maximum length as the pipelines do."""
    ids: list[torch.Tensor] = []
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders, strict=True):
        padding: dict[str, Any] = {"padding": "max_length", "max_length": tokenizer.model_max_length}
        tokens = tokenizer(list(prompts), truncation=True, return_tensors="pt", **padding).input_ids
        ids.append(to_device(tokens, encoder.device))
    return ids


def encode_prompts(base: Base, prompts: Sequence[str]) -> Conditioning:
    """Encode prompts as the pipeline of the family does."""
    return encode_ids(base, token_ids(base, prompts))


def encode_ids(base: Base, ids: Sequence[torch.Tensor]) -> Conditioning:
    """Encode the tokens of each text encoder (B, T).

    SD 1 and 2: the last hidden state after the final norm. SDXL: the penultimate hidden states of both encoders,
    concatenated, and the second encoder's projection of the end-of-text token (Podell et al. 2023, section 2.1).
    """
    if len(ids) == 1:
        return Conditioning(base.text_encoders[0](ids[0]).last_hidden_state)
    outputs = [encoder(part, output_hidden_states=True) for encoder, part in zip(base.text_encoders, ids, strict=True)]
    return Conditioning(torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds)


def time_ids(crops: Sequence[Crop]) -> torch.Tensor:
    """SDXL's time ids (B, 6): original height, width, crop top, left, target height, width (Podell et al. 2023, 2.2).

    The original size is that of the image before any resizing. The crop corner is in pixels of the resized image.
    """
    return torch.tensor(
        [
            [crop.original.height, crop.original.width, *reversed(crop.corner), crop.target.height, crop.target.width]
            for crop in crops
        ],
        dtype=torch.float32,
    )
