"""The best learning rate for each adapter algorithm, as a multiple of LoRA's, in short runs on `sketch`.

`python tests/benchmarks/rates.py` trains `clay-style` for 60 steps with each algorithm and learning rate, then measures
the denoising loss on held-out images of the style and on the training images, with fixed noise and timesteps. Needs the
held-out images that held_out.py downloads. Writes results/rates.md.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from held_out import HERE, SAMPLES, SIZE_PX, losses_of
from plain_loop import ImageFolder

from scumble.configs import files
from scumble.configs.options import Model
from scumble.trainer.adapters.adapter import read_adapter
from scumble.trainer.adapters.applied import applied
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.load import load
from scumble.trainer.plan.plan import DEFAULTS
from scumble.trainer.train import train

MULTIPLES = {
    "lora": (0.5, 1, 2, 4), "dora": (0.5, 1, 2), "loha": (1, 2, 4, 6, 8), "lokr": (1, 2, 4, 8, 12, 16),
}  # fmt: skip
STEPS = 60
EVERY = 12  # use one of 12 held-out images


def train_adapter(algorithm: str, multiple: float, folder: Path) -> Path:
    """Train an adapter of rank 16 on the UNet's attention and of rank 8 on the text encoder."""
    defaults = DEFAULTS["sketch"]
    flags = {
        "data": {"images": str(SAMPLES), "resolution": SIZE_PX},
        "network": {"algorithm": algorithm},
        "optimization": {
            "steps": STEPS,
            "learning_rate": defaults.learning_rate * multiple,
            "text_encoder_lr": defaults.text_encoder_lr * multiple,
        },
        "machine": {"device": "cpu", "mixed_precision": "fp32"},
        "output": {
            "output_dir": str(folder),
            "output_name": f"{algorithm}-{multiple}",
            "preview_every": 0,
            "save_every": 0,
        },
    }
    result = train(files.resolve(flags=flags), [], dry_run=False)
    assert result
    return result.adapter


def change(losses: torch.Tensor, base: torch.Tensor) -> str:
    """Mean change from the base in percent, with the standard error of the paired differences."""
    percent = 100 * (losses - base) / base.mean()
    return f"{float(percent.mean()):+.1f} % ± {float(percent.std()) / len(percent) ** 0.5:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("build/held-out"), help="folder of held-out images")
    args = parser.parse_args()
    held_out, training = ImageFolder(args.pictures, SIZE_PX), ImageFolder(SAMPLES, SIZE_PX)
    held_out.paths = held_out.paths[::EVERY]
    model = Model()
    base = load(model, detect_base(model), torch.device("cpu"), torch.float32)
    before = [losses_of(base.pipeline, images, 4) for images in (held_out, training)]
    lines = [
        f"{STEPS} steps on `sketch`, default ranks; change of the loss on {len(held_out)} held-out images and on the",
        f"{len(training)} training images. Learning rates are multiples of LoRA's default.",
        "",
        "| algorithm | learning rate | held-out images | training images |",
        "|---|---|---|---|",
    ]
    with TemporaryDirectory() as folder:
        for algorithm, multiples in MULTIPLES.items():
            for multiple in multiples:
                adapter = read_adapter(train_adapter(algorithm, multiple, Path(folder)))
                with applied(base, adapter):
                    after = [losses_of(base.pipeline, images, 4) for images in (held_out, training)]
                changes = [change(now, then) for now, then in zip(after, before, strict=True)]
                lines.append(f"| {algorithm} | × {multiple:g} | {changes[0]} | {changes[1]} |")
                print(lines[-1], flush=True)
    (HERE / "results" / "rates.md").write_text("# Learning rates by algorithm\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
