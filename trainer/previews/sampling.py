"""Shots painted by diffusers' own pipeline over the modules that train."""

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
BATCH = 8
MAX_CAPTURED = 8  # pictures in a pass, empty prompts too: with more, launching is not what takes the time


@torch.no_grad()
def render(
    base: Base,
    shots: Sequence[PreviewPrompt],
    sampler: str,
    say: Callable[[str], None] = lambda line: None,
    capture: Capture | None = None,
) -> list[Image.Image]:
    """One picture a shot, as stock diffusers paints it; noise is drawn on the CPU, so any batch gives the same.

    The UNet's passes of few pictures are captured by `capture`, if None on CUDA as graphs; `say` hears where they
    cannot be.
    """
    if capture is None and base.device.type == "cuda":
        capture = CudaGraphs()
    pipeline = base.pipeline
    own, was_training = pipeline.scheduler, [module for module in (base.unet, *base.text_encoders) if module.training]
    pipeline.scheduler = SAMPLERS[sampler].from_config(own.config)
    if base.device.type == "cuda":
        base.vae.enable_slicing()  # of all that paints, decoding needs the most memory
    pictures: dict[int, Image.Image] = {}
    for module in was_training:
        module.eval()
    try:
        with _captured_passes(base.unet, capture, say) as captured, _decoded_in_own_dtype(base.vae):
            for alike in _batches(shots):
                pictures |= dict(zip(alike, _painted(base, [shots[index] for index in alike], captured), strict=True))
    finally:
        pipeline.scheduler = own
        for module in was_training:
            module.train()
    return [pictures[index] for index in range(len(shots))]


@contextmanager
def _captured_passes(unet: Any, capture: Capture | None, say: Callable[[str], None]) -> Generator[Captured]:
    """Within the block a pipeline's calls of the UNet for few pictures are captured once a shape, and replayed."""
    forward = unet.forward

    def run(tensors: Tensors) -> torch.Tensor:
        added = {name: tensors[name] for name in ("text_embeds", "time_ids") if name in tensors}
        hidden = tensors["hidden"]
        return forward(tensors["sample"], tensors["timestep"], hidden, added_cond_kwargs=added, return_dict=False)[0]

    captured = Captured(run, capture, say)

    def call(sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **others: Any) -> Any:
        added = others.get("added_cond_kwargs") or {}
        told = {name for name, value in others.items() if value is not None} - {"added_cond_kwargs", "return_dict"}
        if told or captured.capture is None or len(sample) > MAX_CAPTURED:
            return forward(sample, timestep, encoder_hidden_states, **others)
        tensors = {"sample": sample, "timestep": timestep.to(sample.device), "hidden": encoder_hidden_states}
        return (captured(tensors | added).clone(),)

    unet.forward = call
    try:
        yield captured
    finally:
        del unet.forward


@contextmanager
def _decoded_in_own_dtype(vae: Any) -> Generator[None]:
    """Within the block a VAE takes latents in any dtype: beside a UNet in fp16 it is in fp32, and the pipeline casts
    nothing."""
    decode = vae.decode
    vae.decode = lambda latents, *others, **named: decode(latents.to(vae.dtype), *others, **named)
    try:
        yield
    finally:
        del vae.decode


def _painted(base: Base, shots: Sequence[PreviewPrompt], captured: Captured) -> list[Image.Image]:
    """Shots that are alike, all at once, or as many as fit into memory. Raises `TooLarge` where not one does.

    Passes are captured no more where memory lacks: a captured one keeps its own.
    """
    first, encode_prompt = shots[0], cast("Callable[..., tuple[torch.Tensor, ...]]", base.pipeline.encode_prompt)

    def painted() -> list[Image.Image]:
        with on_device(base, *base.text_encoders):
            heard = encode_prompt(
                [shot.prompt for shot in shots],
                device=base.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=first.guidance_scale > 1,
                negative_prompt=[shot.negative_prompt for shot in shots],
            )
        with on_device(base, base.vae):
            return base.pipeline(
                **dict(zip(EMBEDDINGS, heard, strict=False)),
                num_inference_steps=first.num_inference_steps,
                guidance_scale=first.guidance_scale,
                height=first.height,
                width=first.width,
                generator=[torch.Generator().manual_seed(shot.seed) for shot in shots],
            ).images

    images = unless_too_large(painted)
    if images is None and captured.capture is not None:
        captured.disable()
        images = unless_too_large(painted)
    if images is not None:
        return images
    if len(shots) == 1:
        raise TooLarge(
            f"a preview of {first.width}x{first.height} does not fit into memory; lower --preview-size", UNAVAILABLE
        )
    half = len(shots) // 2
    return _painted(base, shots[:half], captured) + _painted(base, shots[half:], captured)


def _batches(shots: Sequence[PreviewPrompt]) -> list[list[int]]:
    """Indices of shots that can be painted together: one size, one number of steps, one guidance."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, shot in enumerate(shots):
        alike.setdefault((shot.width, shot.height, shot.num_inference_steps, shot.guidance_scale), []).append(index)
    return [indices[start : start + BATCH] for indices in alike.values() for start in range(0, len(indices), BATCH)]
