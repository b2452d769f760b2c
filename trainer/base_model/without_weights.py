"""A base with all its layers but no weights: enough for diffusers' LoRA loader to map each key to a layer."""

import json
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from .detect import DetectedBase
from .load import PIPELINES, Pipeline


def base_without_weights(source: DetectedBase) -> Pipeline:
    """The stock diffusers pipeline of a base's UNet and text encoders, without reading weights.

    Each weight is a single zero expanded to its shape, so the pipeline takes almost no memory. They are on the
    CPU, because diffusers would move the loaded factors to the meta device along with them.
    """
    transformers_logging.disable_progress_bar()
    folder = source.configs
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet/config.json").read_text(encoding="utf-8")))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        text2 = None
        if source.family.name == "sdxl":
            text2 = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder / "text_encoder_2"))
    assert isinstance(unet, UNet2DConditionModel)
    for component in (unet, text, text2):
        for module in component.modules() if component else ():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))
    parts: dict[str, Any] = {"vae": None, "tokenizer": None, "scheduler": None, "unet": unet, "text_encoder": text}
    if text2:
        parts |= {"text_encoder_2": text2, "tokenizer_2": None}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return PIPELINES[source.family.name](**parts)
