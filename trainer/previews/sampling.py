"""Render previews with the diffusers pipeline on the modules being trained."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image

from scumble.configs.exit_codes import UNAVAILABLE

from ..base_model.load import Base
from ..base_model.offload import on_device
from ..kernels.capture import Capture, Captured, Tensors
from ..kernels.cuda_graphs import CudaGraphs
from ..system.out_of_memory import TooLarge, unless_too_large
from .prompts import PreviewPrompt

SAMPLERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
EMBEDDINGS = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
BATCH_SIZE = 8
MAX_CAPTURED = 8  # batch size of a UNet call, with CFG; above it, kernel launches are not the bottleneck


@torch.no_grad()
def render(
    base: Base,
    prompts: Sequence[PreviewPrompt],
    sampler: str,
    report: Callable[[str], None] = lambda line: None,
    capture: Capture | None = None,
) -> list[Image.Image]:
    """Render one image per prompt, as stock diffusers does. Noise is drawn on the CPU, independent of the batch size.

    UNet calls with small batches are captured by `capture` (None: as CUDA graphs on a CUDA device). If capturing fails,
    `report` is called with the reason.
    """
    if capture is None and base.device.type == "cuda":
        capture = CudaGraphs()
    pipeline = base.pipeline
    original = pipeline.scheduler
    was_training = [module for module in (base.unet, *base.text_encoders) if module.training]
    pipeline.scheduler = SAMPLERS[sampler].from_config(original.config)
    if base.device.type == "cuda":
        base.vae.enable_slicing()  # decoding needs more memory than the other steps
    images: dict[int, Image.Image] = {}
    for module in was_training:
        module.eval()
    try:
        with _captured_calls(base.unet, capture, report) as captured, _decode_in_vae_dtype(base.vae):
            for batch in _batches(prompts):
                images |= dict(
                    zip(batch, _render_batch(base, [prompts[index] for index in batch], captured), strict=True)
                )
    finally:
        pipeline.scheduler = original
        for module in was_training:
            module.train()
    return [images[index] for index in range(len(prompts))]


@contextmanager
def _captured_calls(unet: Any, capture: Capture | None, report: Callable[[str], None]) -> Generator[Captured]:
    """Inside the block, UNet calls with small batches are captured once per shape and replayed."""
    forward = unet.forward

    def run(tensors: Tensors) -> torch.Tensor:
        added = {name: tensors[name] for name in ("text_embeds", "time_ids") if name in tensors}
        hidden = tensors["hidden"]
        return forward(tensors["sample"], tensors["timestep"], hidden, added_cond_kwargs=added, return_dict=False)[0]

    captured = Captured(run, capture, report)

    def call(sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **others: Any) -> Any:
        added = others.get("added_cond_kwargs") or {}
        unknown = {name for name, value in others.items() if value is not None} - {"added_cond_kwargs", "return_dict"}
        if unknown or captured.capture is None or len(sample) > MAX_CAPTURED:
            return forward(sample, timestep, encoder_hidden_states, **others)
        tensors = {"sample": sample, "timestep": timestep.to(sample.device), "hidden": encoder_hidden_states}
        return (captured(tensors | added).clone(),)

    unet.forward = call
    try:
        yield captured
    finally:
        del unet.forward


@contextmanager
def _decode_in_vae_dtype(vae: Any) -> Generator[None]:
    """Inside the block, the VAE accepts latents of any dtype. With an fp16 UNet it stays in fp32, and the pipeline does
    not cast the latents."""
    decode = vae.decode
    vae.decode = lambda latents, *others, **named: decode(latents.to(vae.dtype), *others, **named)
    try:
        yield
    finally:
        del vae.decode


def _render_batch(base: Base, prompts: Sequence[PreviewPrompt], captured: Captured) -> list[Image.Image]:
    """Render prompts of equal settings as one batch, split if it does not fit into memory.

    Capturing is disabled if memory runs out, since captured calls hold memory. Raises `TooLarge` if a single image does
    not fit.
    """
    first, encode_prompt = prompts[0], cast("Callable[..., tuple[torch.Tensor, ...]]", base.pipeline.encode_prompt)

    def attempt() -> list[Image.Image]:
        with on_device(base, *base.text_encoders):
            embeddings = encode_prompt(
                [prompt.prompt for prompt in prompts],
                device=base.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=first.guidance_scale > 1,
                negative_prompt=[prompt.negative_prompt for prompt in prompts],
            )
        with on_device(base, base.vae):
            return base.pipeline(
                **dict(zip(EMBEDDINGS, embeddings, strict=False)),
                num_inference_steps=first.num_inference_steps,
                guidance_scale=first.guidance_scale,
                height=first.height,
                width=first.width,
                generator=[torch.Generator().manual_seed(prompt.seed) for prompt in prompts],
            ).images

    images = unless_too_large(attempt)
    if images is None and captured.capture is not None:
        captured.disable()
        images = unless_too_large(attempt)
    if images is not None:
        return images
    if len(prompts) == 1:
        raise TooLarge(
            f"a preview of {first.width}x{first.height} does not fit into memory; lower --preview-size", UNAVAILABLE
        )
    half = len(prompts) // 2
    return _render_batch(base, prompts[:half], captured) + _render_batch(base, prompts[half:], captured)


def _batches(prompts: Sequence[PreviewPrompt]) -> list[list[int]]:
    """Return the indices of prompts that can share a batch: same size, number of steps and guidance scale."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        settings = prompt.width, prompt.height, prompt.num_inference_steps, prompt.guidance_scale
        groups.setdefault(settings, []).append(index)
    return [
        group[start : start + BATCH_SIZE] for group in groups.values() for start in range(0, len(group), BATCH_SIZE)
    ]
