"""The last part of the recipe: writes the model folder and evaluates it."""

import json
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from .denoiser import Denoiser, Latents, held_out_loss, make_scheduler
from .pictures import EVALUATED, STYLES, Emoji
from .vae import AutoencoderKL, encode, psnr_db

NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 20, 5.0


def pixels_of(emoji: list[Emoji]) -> torch.Tensor:
    """RGB in [-1, 1], (N, 3, 64, 64)."""
    return torch.stack([torch.from_numpy(e.on_white()).permute(2, 0, 1).float() / 127.5 - 1 for e in emoji])


def latents_of(vae: AutoencoderKL, emoji: list[Emoji]) -> Latents:
    """The scaled posteriors that the UNet is trained on."""
    mean, std = (part * vae.config["scaling_factor"] for part in encode(vae, pixels_of(emoji)))
    return Latents(mean, std, [e.name for e in emoji], [e.style for e in emoji])


def publish(vae: AutoencoderKL, model: Denoiser, tokenizer_folder: Path, emoji: list[Emoji], out: Path) -> None:
    """Write the model in fp16 in the diffusers layout, with the held-out and reference latents that tests need."""
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
        settings.pop("_name_or_path", None)  # a path in the work folder
        if settings.get("dtype") == "float16":  # otherwise transformers loads only this part in fp16
            settings["dtype"] = "float32"
        config.write_text(json.dumps(settings, indent=2) + "\n")
    for name in ("vocab.json", "merges.txt"):
        (out / "tokenizer" / name).write_bytes((tokenizer_folder / name).read_bytes())
    vae.float(), model.float()
    held_out = [e for e in emoji if e.held_out]
    (out / "held_out.txt").write_text("".join(e.caption + "\n" for e in held_out), encoding="utf-8")
    groups = {"held_out": held_out}
    for style in STYLES.values():
        by_name = {e.name: e for e in emoji if e.style == style}
        groups[style] = [by_name[name] for name in EVALUATED]
    tensors = {name: latents_of(vae, group).mean.half() for name, group in groups.items()}
    save_file(tensors, out / "references.safetensors", metadata={"names": json.dumps(EVALUATED)})


@torch.no_grad()
def generate_latents(pipeline: StableDiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    """Generate latents (N, 4, 16, 16) for `prompts`; prompt i has seed i."""
    return pipeline(
        prompts,
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        output_type="latent",
    ).images


def share_nearest(generated: torch.Tensor, references: torch.Tensor) -> float:
    """The share of latents (N, …) that are closer to their own reference than to the other N - 1 references."""
    distances = torch.cdist(generated.flatten(1).float(), references.flatten(1).float())
    return float((distances.argmin(1) == torch.arange(len(generated))).float().mean())


def held_out_metrics(
    vae: AutoencoderKL, model: Denoiser, tokenizer: CLIPTokenizer, emoji: list[Emoji]
) -> dict[str, float]:
    """PSNR of the VAE and denoising loss, on the held-out images."""
    held_out = [e for e in emoji if e.held_out]
    return {
        "vae_psnr_db": round(float(psnr_db(vae, pixels_of(held_out)).mean()), 2),
        "held_out_loss": round(held_out_loss(model, latents_of(vae, held_out), tokenizer), 5),
    }


def prompt_metrics(out: Path) -> dict[str, float]:
    """For each style: the share of images nearest to their own reference, and the share in the requested style."""
    pipeline = StableDiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    references = load_file(out / "references.safetensors")
    shares = {}
    for style in STYLES.values():
        generated = generate_latents(pipeline, [f"{name}, {style}" for name in EVALUATED])
        shares[f"nearest_{style.split()[0]}"] = round(share_nearest(generated, references[style]), 3)
        other = next(references[name] for name in STYLES.values() if name != style)
        own, far = ((generated - latents.float()).flatten(1).norm(dim=1) for latents in (references[style], other))
        shares[f"style_{style.split()[0]}"] = round(float((own < far).float().mean()), 3)
    return shares
