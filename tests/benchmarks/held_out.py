"""Denoising loss on held-out images, of adapters trained with scumble and with a plain diffusers and PEFT loop.

`python tests/benchmarks/held_out.py` trains `clay-style` on `sketch` with both (same images, steps, batch size, rank,
learning rate and loss weighting; UNet attention only). Then it loads each saved file into unmodified diffusers and
measures the loss on held-out images of the style, with fixed noise and timesteps. Needs npm once, to download the
held-out images. Writes results/held_out.md.
"""

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from plain_loop import ImageFolder, RunTimes, train_plainly

from scumble.configs import files
from scumble.datasets.samples.fetch_held_out import fetch, prepare, write
from scumble.trainer.base_model.detect import EMBEDDED
from scumble.trainer.base_model.load import Pipeline
from scumble.trainer.train import train

HERE = Path(__file__).parent
SAMPLES = HERE.parent.parent / "datasets/samples/clay-style"
SIZE_PX, BATCH_SIZE, RANK, LEARNING_RATE, GAMMA, SEED = 64, 4, 16, 2e-3, 5.0, 0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@torch.no_grad()
def losses_of(pipeline: Pipeline, images: ImageFolder, draws: int) -> torch.Tensor:
    """Mean squared error of epsilon for each image (N,), over `draws` timesteps spread across the noise schedule."""
    pixels, captions = zip(*(images[index] for index in range(len(images))), strict=True)
    scale = pipeline.vae.config["scaling_factor"]
    latents = (
        torch.cat([pipeline.vae.encode(part).latent_dist.mode() for part in torch.stack(pixels).split(32)]) * scale
    )
    window = pipeline.tokenizer.model_max_length
    ids = pipeline.tokenizer(
        list(captions), padding="max_length", max_length=window, truncation=True, return_tensors="pt"
    ).input_ids
    hidden = torch.cat([pipeline.text_encoder(part)[0] for part in ids.split(64)])
    total = torch.zeros(len(latents))
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        timesteps = ((torch.rand(len(latents), generator=generator) + draw) * 1000 / draws).long()
        noise = torch.randn(latents.shape, generator=generator)
        noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
        for part in torch.arange(len(latents)).split(64):
            prediction = pipeline.unet(noisy[part], timesteps[part], hidden[part]).sample
            total[part] += (prediction - noise[part]).pow(2).mean((1, 2, 3)) / draws
    return total


def row(name: str, losses: torch.Tensor, base: torch.Tensor) -> str:
    """A table row: mean loss, paired change from the base with its standard error, and the share of improved images."""
    change = losses - base
    error = float(change.std() / len(change) ** 0.5)
    return (
        f"| {name} | {float(losses.mean()):.5f} | {100 * float(change.mean() / base.mean()):+.2f} % "
        f"± {100 * error / float(base.mean()):.2f} % | {100 * float((change < 0).float().mean()):.0f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--draws", type=int, default=4, help="timesteps per image")
    parser.add_argument("--turns", type=int, default=3, help="timed runs of each loop, in turns")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--pictures", type=Path, default=Path("build/held-out"), help="folder of held-out images, downloaded if missing"
    )
    args = parser.parse_args()
    if not args.pictures.is_dir():
        prepare(args.pictures)
        with TemporaryDirectory() as work:
            write(fetch(Path(work)), args.pictures)
    images = ImageFolder(args.pictures, SIZE_PX)

    def ours(folder: Path) -> tuple[RunTimes, Path]:
        started = time.monotonic()
        flags = {
            "data": {"images": str(SAMPLES), "resolution": SIZE_PX},
            "network": {"rank": RANK, "text_encoder_rank": 0},
            "objective": {"loss_weighting": "min_snr", "min_snr_gamma": GAMMA},
            "optimization": {"steps": args.steps, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE},
            "machine": {"device": "cpu", "mixed_precision": args.precision},
            "output": {"output_dir": str(folder), "output_name": "clay", "preview_every": 0,
                       "save_every": args.steps // 8,
                       "seed": SEED},
        }  # fmt: skip
        step_ends: list[float] = []
        result = train(
            files.resolve(flags=flags), [lambda e: step_ends.append(e["t"]) if e["kind"] == "step" else None]
        )
        assert result
        mean = statistics.fmean(b - a for a, b in pairwise(step_ends))
        return RunTimes(mean * args.steps, time.monotonic() - started), result.adapter

    def plain(folder: Path) -> tuple[RunTimes, Path]:
        timed = train_plainly(
            EMBEDDED, SAMPLES, folder, size_px=SIZE_PX, steps=args.steps, batch_size=BATCH_SIZE, rank=RANK,
            learning_rate=LEARNING_RATE, min_snr_gamma=GAMMA, seed=SEED, dtype=DTYPES[args.precision],
        )  # fmt: skip
        return timed, folder / "pytorch_lora_weights.safetensors"

    with TemporaryDirectory() as work:
        times: dict[str, list[RunTimes]] = {"ours": [], "plain": []}
        for turn in range(args.turns):
            timed, adapter = ours(Path(work) / f"ours{turn}")
            times["ours"].append(timed)
            timed, plain_adapter = plain(Path(work) / f"plain{turn}")
            times["plain"].append(timed)
        pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED)
        base = losses_of(pipeline, images, args.draws)
        lines = [
            f"{len(images)} held-out images, {args.draws} timesteps each; {args.steps} steps at batch size "
            f"{BATCH_SIZE}, rank {RANK} on the UNet's attention, {args.precision}, two threads.",
            "",
            "| adapter | loss | change (paired) | images that improved |",
            "|---|---|---|---|",
            row("base", base, base),
        ]
        saved = [*sorted((adapter.parent / "checkpoints").glob("*.safetensors")), adapter, plain_adapter]
        for path in saved:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
            name = "plain loop" if path == plain_adapter else f"step {args.steps}" if path == adapter else path.stem
            lines.append(row(name.replace("clay-", "step "), losses_of(pipeline, images, args.draws), base))
            pipeline.unload_lora_weights()
    ratios = [b.loop_s / a.loop_s for a, b in zip(times["ours"], times["plain"], strict=True)]
    whole = [b.whole_s / a.whole_s for a, b in zip(times["ours"], times["plain"], strict=True)]
    lines += [
        "",
        "| | steps per second, median | relative time of the loop | relative time of the whole run |",
        "|---|---|---|---|",
        *(
            f"| {name} | {args.steps / statistics.median(t.loop_s for t in times[key]):.2f} | {loop} | {total} |"
            for name, key, loop, total in (
                ("scumble", "ours", "1", "1"),
                ("plain loop", "plain", f"{statistics.median(ratios):.2f} ×", f"{statistics.median(whole):.2f} ×"),
            )
        ),
        "",
        f"Medians of {args.turns} runs each, in turns on one machine.",
    ]
    text = "# Held-out images\n\n" + "\n".join(lines) + "\n"
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "held_out.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
