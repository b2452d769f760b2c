"""Previews: prompts painted by diffusers' own pipeline, and grids with a label under each picture."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image, ImageDraw, ImageFont

from scumble.configs.errors import Refused
from scumble.configs.options import Model, Previews

from .models import load_pipeline

SAMPLERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
SHOWN_WORDS = (
    "red apple", "tiger", "rocket", "princess", "castle", "sailboat",
    "owl", "pizza", "cactus", "guitar", "car", "ghost",
)  # fmt: skip
SHOWN_PROMPTS = [f"{word}, {style} style" for style in ("shaded", "flat") for word in SHOWN_WORDS]
BATCH = 8
GAP_PX = 8
INK, PAPER = (40, 40, 40), (255, 255, 255)


def paint_grid(model: Model, previews: Previews, out: Path) -> None:
    """Paint the prompts of `previews` (without any: 24 that show the embedded base) and write one labelled grid."""
    prompts = prompts_of(previews) or SHOWN_PROMPTS
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(model, device, torch.float32)
    use_sampler(pipeline, previews.sampler)
    pictures = paint(
        pipeline,
        prompts,
        negative=previews.negative,
        steps=previews.preview_steps,
        cfg=5.0 if previews.cfg == "auto" else previews.cfg,
        size_px=None if previews.preview_size == "auto" else previews.preview_size,
        seed=previews.preview_seed,
    )
    write_picture(grid(pictures, prompts, columns=min(6, len(pictures))), out)


def prompts_of(previews: Previews) -> list[str]:
    """The prompts given as options, then those of the prompt file (a line each, # for remarks)."""
    prompts = list(previews.prompts)
    if previews.prompt_file:
        try:
            text = Path(previews.prompt_file).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise Refused(f"--prompt-file {previews.prompt_file}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise Refused(f"--prompt-file {previews.prompt_file} is not UTF-8: save it as UTF-8") from None
        lines = (line.strip() for line in text.splitlines())
        prompts += [line for line in lines if line and not line.startswith("#")]
    return prompts


def use_sampler(pipeline: StableDiffusionPipeline, sampler: str) -> None:
    """Exchange the pipeline's sampler, keeping the base's own noise schedule and prediction type."""
    pipeline.scheduler = SAMPLERS[sampler].from_config(pipeline.scheduler.config)


def paint(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    negative: str = "",
    steps: int = 25,
    cfg: float = 5.0,
    size_px: int | None = None,
    seed: int = 1,
) -> list[Image.Image]:
    """One picture a prompt; prompt number i has seed `seed + i`, drawn on the CPU, so any batch gives the same."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        chunk = list(prompts[start : start + BATCH])
        result = pipeline(
            chunk,
            negative_prompt=[negative] * len(chunk),
            num_inference_steps=steps,
            guidance_scale=cfg,
            height=size_px,
            width=size_px,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))],
        )
        pictures += result.images
    return pictures


def grid(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """Pictures of one size in rows of `columns`, each with its label below, cut to the picture's width."""
    width, height = pictures[0].size
    text_px = max(11, width // 12)
    font = ImageFont.load_default(text_px)
    line_px = int(text_px * 1.7)
    cell_width, cell_height = width + GAP_PX, height + line_px + GAP_PX
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width + GAP_PX, rows * cell_height + GAP_PX), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left = GAP_PX + index % columns * cell_width
        top = GAP_PX + index // columns * cell_height
        sheet.paste(picture, (left, top))
        shown = label
        while shown and pen.textlength(shown, font) > width:
            shown = shown[:-2].rstrip() + "…"
        pen.text((left + width / 2, top + height + line_px / 2), shown, INK, font, anchor="mm")
    return sheet


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all; raises `Refused` (73) where the place cannot be written."""
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(temporary, format="PNG")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Refused(f"{path}: cannot be written ({error.strerror or error})", 73) from None
