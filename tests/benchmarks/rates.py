"""At which rate does each kind of adapter learn best? Multiples of LoRA's own rate, in short runs on `sketch`.

`python tests/benchmarks/rates.py` trains `clay-style` for 60 steps with each kind and rate, then measures the denoising
loss on held-out pictures of the style and on those it saw: fixed noise, fixed timesteps. Needs the held-out pictures
that held_out.py fetches. Writes results/rates.md.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from held_out import HERE, SAMPLES, SIZE_PX, losses_of
from plain_loop import Pictures

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
EVERY = 12  # one held-out picture in twelve


def trained(network: str, multiple: float, folder: Path) -> Path:
    """An adapter of rank 16 on the UNet's attention and 8 on the text encoder."""
    own = DEFAULTS["sketch"]
    flags = {
        "data": {"images": str(SAMPLES), "resolution": SIZE_PX},
        "network": {"algorithm": network},
        "optimization": {
            "steps": STEPS,
            "learning_rate": own.learning_rate * multiple,
            "text_encoder_lr": own.text_encoder_lr * multiple,
        },
        "machine": {"device": "cpu", "mixed_precision": "fp32"},
        "output": {
            "output_dir": str(folder),
            "output_name": f"{network}-{multiple}",
            "preview_every": 0,
            "save_every": 0,
        },
    }
    result = train(files.resolve(flags=flags), [], dry_run=False)
    assert result
    return result.adapter


def change(losses: torch.Tensor, base: torch.Tensor) -> str:
    """Mean change against the base in per cent, with the standard error of the paired differences."""
    change = 100 * (losses - base) / base.mean()
    return f"{float(change.mean()):+.1f} % ± {float(change.std()) / len(change) ** 0.5:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path("build/held-out"), help="held-out pictures")
    chosen = parser.parse_args()
    held, seen = Pictures(chosen.pictures, SIZE_PX), Pictures(SAMPLES, SIZE_PX)
    held.paths = held.paths[::EVERY]
    model = Model()
    base = load(model, detect_base(model), torch.device("cpu"), torch.float32)
    before = [losses_of(base.pipeline, pictures, 4) for pictures in (held, seen)]
    lines = [
        f"{STEPS} steps on `sketch`, the default ranks; change of the loss on {len(held)} pictures that no run saw,",
        f"and on the {len(seen)} it saw. Multiples are of LoRA's default rates.",
        "",
        "| kind | rate | held out | seen |",
        "|---|---|---|---|",
    ]
    with TemporaryDirectory() as folder:
        for network, multiples in MULTIPLES.items():
            for multiple in multiples:
                adapter = read_adapter(trained(network, multiple, Path(folder)))
                with applied(base, adapter):
                    after = [losses_of(base.pipeline, pictures, 4) for pictures in (held, seen)]
                told = [change(now, then) for now, then in zip(after, before, strict=True)]
                lines.append(f"| {network} | × {multiple:g} | {told[0]} | {told[1]} |")
                print(lines[-1], flush=True)
    (HERE / "results" / "rates.md").write_text("# Rates by kind of adapter\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
