"""Last part of the recipe: the finished folder, its picture, its figures and its README."""

import json
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from .denoiser import Denoiser, Latents, held_out_loss, make_scheduler
from .pictures import JUDGED, STYLES, Picture
from .vae import AutoencoderKL, encode, psnr_db

STEPS, CFG = 20, 5.0


def pixels_of(pictures: list[Picture]) -> torch.Tensor:
    """RGB in [-1, 1], (N, 3, 64, 64)."""
    return torch.stack([torch.from_numpy(p.on_white()).permute(2, 0, 1).float() / 127.5 - 1 for p in pictures])


def latents_of(vae: AutoencoderKL, pictures: list[Picture]) -> Latents:
    """Posteriors as the UNet sees them, scaled."""
    mean, std = (part * vae.config["scaling_factor"] for part in encode(vae, pixels_of(pictures)))
    return Latents(mean, std, [p.name for p in pictures], [p.style for p in pictures])


def publish(vae: AutoencoderKL, model: Denoiser, tokenizer_folder: Path, pictures: list[Picture], out: Path) -> None:
    """Write the base as fp16 in diffusers' layout, with what its tests need: held-out and reference latents."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=make_scheduler(),  # ty: ignore[invalid-argument-type]
        safety_checker=None,  # ty: ignore[invalid-argument-type]
        feature_extractor=None,  # ty: ignore[invalid-argument-type]
        requires_safety_checker=False,
    )
    pipeline.to("cpu", torch.float16).save_pretrained(out)
    for config in out.glob("*/config.json"):
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)  # where the recipe kept it
        if settings.get("dtype") == "float16":  # or transformers loads this part in fp16 and diffusers the rest in fp32
            settings["dtype"] = "float32"
        config.write_text(json.dumps(settings, indent=2) + "\n")
    for name in ("vocab.json", "merges.txt"):
        (out / "tokenizer" / name).write_bytes((tokenizer_folder / name).read_bytes())
    vae.float(), model.float()
    held_out = [p for p in pictures if p.held_out]
    (out / "held_out.txt").write_text("".join(p.caption + "\n" for p in held_out), encoding="utf-8")
    kept = {"held_out": held_out}
    for style in STYLES.values():
        by_name = {p.name: p for p in pictures if p.style == style}
        kept[style] = [by_name[name] for name in JUDGED]
    tensors = {name: latents_of(vae, chosen).mean.half() for name, chosen in kept.items()}
    save_file(tensors, out / "references.safetensors", metadata={"names": json.dumps(JUDGED)})


@torch.no_grad()
def paint_latents(pipeline: StableDiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    """What the base paints for `prompts`, as latents (N, 4, 16, 16); prompt number i has seed i."""
    return pipeline(
        prompts,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        output_type="latent",
    ).images


def share_nearest(painted: torch.Tensor, references: torch.Tensor) -> float:
    """Share of pictures (N, …) whose own reference is the nearest of all N in squared distance."""
    distances = torch.cdist(painted.flatten(1).float(), references.flatten(1).float())
    return float((distances.argmin(1) == torch.arange(len(painted))).float().mean())


def figures(vae: AutoencoderKL, model: Denoiser, tokenizer: CLIPTokenizer, pictures: list[Picture]) -> dict[str, float]:
    """Measured on pictures that training never saw (PSNR, loss) and on what text does (shares)."""
    held_out = [p for p in pictures if p.held_out]
    return {
        "vae_psnr_db": round(float(psnr_db(vae, pixels_of(held_out)).mean()), 2),
        "held_out_loss": round(held_out_loss(model, latents_of(vae, held_out), tokenizer), 5),
    }


def steering(out: Path) -> dict[str, float]:
    """How often the painted thing is nearest to its own reference among all of its style, by style."""
    pipeline = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    references = load_file(out / "references.safetensors")
    shares = {}
    for style in STYLES.values():
        painted = paint_latents(pipeline, [f"{name}, {style}" for name in JUDGED])
        shares[f"nearest_{style.split()[0]}"] = round(share_nearest(painted, references[style]), 3)
        other = next(references[name] for name in STYLES.values() if name != style)
        own, far = ((painted - chosen.float()).flatten(1).norm(dim=1) for chosen in (references[style], other))
        shares[f"style_{style.split()[0]}"] = round(float((own < far).float().mean()), 3)
    return shares
