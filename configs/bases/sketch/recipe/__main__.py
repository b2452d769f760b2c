"""Make the embedded base `sketch`, or go on making it: `make sketch`, or
`python -m scumble.configs.bases.sketch.recipe --work FOLDER --out FOLDER`.

Three stages: the VAE; then words, UNet and text encoder on the pictures as they are, until these are known by heart;
then on variants of them, so that other pictures are drawn well too. What is published lies between the last two.
Everything is kept in the work folder; the same command goes on where it was cut.
"""

import argparse
import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from .denoiser import Denoiser, train_denoiser
from .judge import figures, latents_of, publish, steering
from .pictures import pictures, variant
from .text import make_tokenizer
from .vae import train_vae

VARIANTS = 7  # of each picture, beside the picture itself


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/sketch"), help="folder of the state")
    parser.add_argument("--out", type=Path, default=Path("build/sketch/out"), help="folder of the finished base")
    parser.add_argument("--vae-steps", type=int, default=4500)
    parser.add_argument("--steps", type=int, default=6500, help="of UNet and text encoder on the pictures as they are")
    parser.add_argument("--varied-steps", type=int, default=1500, help="of both on variants, after that")
    parser.add_argument("--keep-checkpoints", type=float, default=0.35, help="share of the weights before the variants")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    known = pictures(chosen.work)
    learned = [picture for picture in known if not picture.held_out]
    print(f"{len(learned)} pictures to learn, {len(known) - len(learned)} held out, on {device}")

    words = chosen.work / "tokenizer"
    names = chosen.work / "npm/node_modules/emojibase-data"
    tokenizer = make_tokenizer(names, [picture.caption for picture in known], words)
    rgba = torch.from_numpy(np.stack([picture.rgba for picture in learned])).permute(0, 3, 1, 2).float() / 255
    vae = train_vae(rgba, chosen.work, device, chosen.vae_steps)

    by_heart = train_denoiser(latents_of(vae, learned), tokenizer, chosen.work / "plain", device, chosen.steps, None)
    seen = [*learned, *(variant(picture, number) for number in range(VARIANTS) for picture in learned)]
    general = train_denoiser(
        latents_of(vae, seen), tokenizer, chosen.work / "varied", device, chosen.varied_steps, deepcopy(by_heart)
    )
    model = between(general.to("cpu"), by_heart.to("cpu"), chosen.keep)
    vae.to("cpu")
    publish(vae, model, words, known, chosen.out)
    measured = figures(vae, model, tokenizer, known) | steering(chosen.out)
    (chosen.out / "figures.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))


def between(model: Denoiser, other: Denoiser, share: float) -> Denoiser:
    """The weights of `model` with a `share` of those of `other`: as steerable as the one, as general as the other.

    Averages of a model and what it was tuned to (Wortsman et al. 2022).
    """
    theirs = other.state_dict()
    mixed = {name: weight.lerp(theirs[name], share) if weight.is_floating_point() else weight
             for name, weight in model.state_dict().items()}  # fmt: skip
    model.load_state_dict(mixed)
    return model


if __name__ == "__main__":
    main()
