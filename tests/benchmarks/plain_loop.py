"""The baseline: a plain LoRA training loop with diffusers and PEFT, like the text-to-image LoRA example of diffusers.

A DataLoader loads the images, every step encodes them with the VAE and the captions with the text encoder, and AdamW
trains a LoRA on the UNet's attention. Uses no code of scumble, only its sample images.

`python plain_loop.py BASE IMAGES OUT THREADS` trains with the settings that `speed.py --whole` compares.
"""

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class RunTimes:
    """Seconds of the loop alone, and including loading and saving."""

    loop_s: float
    whole_s: float


class ImageFolder(Dataset[tuple[torch.Tensor, str]]):
    """The .webp images of a folder on white: (pixels in [-1, 1] (3, P, P), caption)."""

    def __init__(self, folder: Path, size_px: int):
        self.paths, self.size_px = sorted(folder.glob("*.webp")), size_px

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        path = self.paths[index]
        image = Image.open(path).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        image = image.resize((self.size_px, self.size_px), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
        return pixels, path.with_suffix(".txt").read_text(encoding="utf-8").strip()


def train_plainly(
    base: Path, folder: Path, out: Path, *, size_px: int, steps: int, batch_size: int, rank: int, learning_rate: float,
    min_snr_gamma: float, seed: int, dtype: torch.dtype,
) -> RunTimes:  # fmt: skip
    """Train on `folder`, write `out`/pytorch_lora_weights.safetensors as diffusers does, and return the times."""
    started = time.monotonic()
    torch.manual_seed(seed)
    random.seed(seed)
    pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=dtype)
    unet, vae, encoder, tokenizer = pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
    for module in (unet, vae, encoder):
        module.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                   target_modules=["to_k", "to_q", "to_v", "to_out.0"])
    )  # fmt: skip
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=1e-2)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    loader = DataLoader(ImageFolder(folder, size_px), batch_size=batch_size, shuffle=True)
    scheduler, done, loop_started = pipeline.scheduler, 0, time.monotonic()
    while done < steps:
        for pixels, captions in loader:
            with torch.no_grad():
                latents = vae.encode(pixels.to(dtype)).latent_dist.sample() * vae.config["scaling_factor"]
                captions = ["" if random.random() < 0.05 else caption for caption in captions]
                ids = tokenizer(
                    captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                    return_tensors="pt",
                ).input_ids  # fmt: skip
                hidden = encoder(ids)[0]
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, scheduler.config["num_train_timesteps"], (len(latents),))
            noisy = scheduler.add_noise(latents, noise, timesteps)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                prediction = unet(noisy, timesteps, hidden).sample
            snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
            weights = snr.clamp(max=min_snr_gamma) / snr
            loss = (F.mse_loss(prediction.float(), noise.float(), reduction="none").mean((1, 2, 3)) * weights).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break
    loop_s = time.monotonic() - loop_started
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=get_peft_model_state_dict(unet))
    return RunTimes(loop_s, time.monotonic() - started)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    train_plainly(
        Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), size_px=64, steps=160, batch_size=4, rank=16,
        learning_rate=2e-3, min_snr_gamma=5.0, seed=0, dtype=torch.bfloat16,
    )  # fmt: skip
