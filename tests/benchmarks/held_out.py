"""How much nearer does an adapter come to pictures that it never saw? And how does a plain loop do on the same?

`python tests/benchmarks/held_out.py` trains `clay-style` on `sketch` with scumble and with a plain loop over diffusers
and PEFT (the same pictures, steps, batch, rank, rate and weighting; UNet attention alone), then measures the denoising
loss of stock diffusers with each saved file on the held-out pictures of the style: fixed noise, fixed timesteps, every
picture alike. Needs npm once, for the held-out pictures. Writes results/held_out.md.
"""

import argparse
import statistics
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from plain_loop import Pictures, Timed, train_plainly

from scumble.configs import files
from scumble.datasets.samples.fetch_held_out import fetch, prepare, write
from scumble.trainer.base_model.detect import EMBEDDED
from scumble.trainer.base_model.load import Pipeline
from scumble.trainer.train import train

HERE = Path(__file__).parent
SAMPLES = HERE.parent.parent / "datasets/samples/clay-style"
SIZE_PX, BATCH, RANK, RATE, GAMMA, SEED = 64, 4, 16, 2e-3, 5.0, 0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@torch.no_grad()
def losses_of(pipeline: Pipeline, pictures: Pictures, draws: int) -> torch.Tensor:
    """Squared error on epsilon of each picture (N,), the mean over `draws` timesteps spread over the schedule."""
    pixels, captions = zip(*(pictures[index] for index in range(len(pictures))), strict=True)
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
    """Mean loss, its change against the base with the standard error of the paired differences, and who gained."""
    change = losses - base
    error = float(change.std() / len(change) ** 0.5)
    return (
        f"| {name} | {float(losses.mean()):.5f} | {100 * float(change.mean() / base.mean()):+.2f} % "
        f"± {100 * error / float(base.mean()):.2f} % | {100 * float((change < 0).float().mean()):.0f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--draws", type=int, default=4, help="timesteps a picture")
    parser.add_argument("--turns", type=int, default=3, help="timed runs of each loop, in turn")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--pictures", type=Path, default=Path("build/held-out"), help="held-out pictures, fetched once")
    chosen = parser.parse_args()
    if not chosen.pictures.is_dir():
        prepare(chosen.pictures)
        with TemporaryDirectory() as work:
            write(fetch(Path(work)), chosen.pictures)
    pictures = Pictures(chosen.pictures, SIZE_PX)

    def ours(folder: Path) -> tuple[Timed, Path]:
        started = time.monotonic()
        flags = {
            "data": {"images": str(SAMPLES), "resolution": SIZE_PX},
            "network": {"rank": RANK, "text_encoder_rank": 0},
            "objective": {"loss_weighting": "min_snr", "min_snr_gamma": GAMMA},
            "optimization": {"steps": chosen.steps, "batch_size": BATCH, "learning_rate": RATE},
            "machine": {"device": "cpu", "mixed_precision": chosen.precision},
            "output": {"output_dir": str(folder), "output_name": "clay", "preview_every": 0,
                       "save_every": chosen.steps // 8,
                       "seed": SEED},
        }  # fmt: skip
        steps: list[float] = []
        result = train(files.resolve(flags=flags), [lambda e: steps.append(e["t"]) if e["kind"] == "step" else None])
        assert result
        mean = statistics.fmean(b - a for a, b in pairwise(steps))
        return Timed(mean * chosen.steps, time.monotonic() - started), result.adapter

    def plain(folder: Path) -> tuple[Timed, Path]:
        timed = train_plainly(
            EMBEDDED, SAMPLES, folder, size_px=SIZE_PX, steps=chosen.steps, batch=BATCH, rank=RANK, rate=RATE,
            min_snr_gamma=GAMMA, seed=SEED, dtype=DTYPES[chosen.precision],
        )  # fmt: skip
        return timed, folder / "pytorch_lora_weights.safetensors"

    with TemporaryDirectory() as work:
        times: dict[str, list[Timed]] = {"ours": [], "plain": []}
        for turn in range(chosen.turns):
            timed, adapter = ours(Path(work) / f"ours{turn}")
            times["ours"].append(timed)
            timed, plainly = plain(Path(work) / f"plain{turn}")
            times["plain"].append(timed)
        pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED)
        base = losses_of(pipeline, pictures, chosen.draws)
        lines = [
            f"{len(pictures)} pictures that no run saw, {chosen.draws} timesteps each; {chosen.steps} steps of "
            f"{BATCH}, rank {RANK} on the UNet's attention, {chosen.precision}, two threads.",
            "",
            "| after | loss | change, paired | pictures that gained |",
            "|---|---|---|---|",
            row("base", base, base),
        ]
        saved = [*sorted((adapter.parent / "checkpoints").glob("*.safetensors")), adapter, plainly]
        for path in saved:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
            name = "plain loop" if path == plainly else f"step {chosen.steps}" if path == adapter else path.stem
            lines.append(row(name.replace("clay-", "step "), losses_of(pipeline, pictures, chosen.draws), base))
            pipeline.unload_lora_weights()
    ratios = [b.loop_s / a.loop_s for a, b in zip(times["ours"], times["plain"], strict=True)]
    whole = [b.whole_s / a.whole_s for a, b in zip(times["ours"], times["plain"], strict=True)]
    lines += [
        "",
        "| | steps a second, median | loop against ours | whole run against ours |",
        "|---|---|---|---|",
        *(
            f"| {name} | {chosen.steps / statistics.median(t.loop_s for t in times[key]):.2f} | {loop} | {all_of_it} |"
            for name, key, loop, all_of_it in (
                ("scumble", "ours", "1", "1"),
                ("plain loop", "plain", f"{statistics.median(ratios):.2f} ×", f"{statistics.median(whole):.2f} ×"),
            )
        ),
        "",
        f"Medians of {chosen.turns} runs of each in turn, on one machine.",
    ]
    text = "# Held-out pictures\n\n" + "\n".join(lines) + "\n"
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "held_out.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
