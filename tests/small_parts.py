"""Small modules and adapters shared by several tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tiny import tiny_base

from scumble.configs.options import Model
from scumble.trainer.adapters.targets import Part
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.load import Base, load
from scumble.trainer.base_model.text_encoding import encode_prompts
from scumble.trainer.kernels.capture import Replay

CPU = torch.device("cpu")


def loaded(kind: str, folder: Path) -> Base:
    model = Model(base="sketch" if kind == "sketch" else str(tiny_base(kind, folder / kind)))
    return load(model, detect_base(model), CPU, torch.float32)


def parts_of(base: Base, conv_rank: int = 0) -> list[Part]:
    texts = ["text", "text2"][: len(base.text_encoders)]
    return [Part("unet", 4, 8.0, conv_rank, 2.0), *(Part(name, 2, 1.0) for name in texts)]


def rendered(base: Base) -> np.ndarray:
    with torch.no_grad():
        return base.pipeline(
            "a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np",
            height=64, width=64,
        ).images[0]  # fmt: skip


def unet(linear: bool = False) -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=24,
        attention_head_dim=4, norm_num_groups=8, use_linear_projection=linear,
    ).requires_grad_(False)  # fmt: skip


PARTS = [Part("unet", 4, 4.0), Part("text", 2, 2.0)]


def loss_of(base: Base) -> torch.Tensor:
    torch.manual_seed(3)
    conditioning = encode_prompts(base, ["a cat", "a dog"])
    added = None
    if conditioning.pooled is not None:
        added = {"text_embeds": conditioning.pooled, "time_ids": torch.ones(2, 6)}
    noisy, timesteps = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    return base.unet(noisy, timesteps, conditioning.hidden, added_cond_kwargs=added).sample.pow(2).mean()


def recorded(run: Replay) -> Replay:
    """Stand-in for a CUDA graph on any device: one warm-up, then the same work on the same tensors each time."""
    run()
    return run
