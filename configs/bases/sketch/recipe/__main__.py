"""Train the embedded base model `sketch`: `make sketch`, or
`python -m scumble.configs.bases.sketch.recipe --work FOLDER --out FOLDER`.

Three stages: the VAE; then the text encoder and the UNet on the unmodified images, until these are memorized; then on
augmented images, for generalization. The published weights are an interpolation of the last two stages. All state is
kept in the work folder; repeat the command to resume an interrupted run.
"""

import argparse
import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from .denoiser import Denoiser, train_denoiser
from .judge import held_out_metrics, latents_of, prompt_metrics, publish
from .pictures import augmented, render_emoji
from .text import make_tokenizer
from .vae import train_vae

NUM_VARIANTS = 7  # of each image, in addition to the image itself


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/sketch"), help="folder for the training state")
    parser.add_argument("--out", type=Path, default=Path("build/sketch/out"), help="folder for the finished model")
    parser.add_argument("--vae-steps", type=int, default=4500)
    parser.add_argument("--steps", type=int, default=6500, help="training steps on the unmodified images")
    parser.add_argument("--varied-steps", type=int, default=1500, help="further training steps on augmented images")
    parser.add_argument("--keep", type=float, default=0.35, help="share of the weights before augmented training")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    emoji = render_emoji(arguments.work)
    training = [one for one in emoji if not one.held_out]
    print(f"{len(training)} training images, {len(emoji) - len(training)} held out, on {device}")

    tokenizer_folder = arguments.work / "tokenizer"
    emojibase = arguments.work / "npm/node_modules/emojibase-data"
    tokenizer = make_tokenizer(emojibase, [one.caption for one in emoji], tokenizer_folder)
    rgba = torch.from_numpy(np.stack([one.rgba for one in training])).permute(0, 3, 1, 2).float() / 255
    vae = train_vae(rgba, arguments.work, device, arguments.vae_steps)

    memorized = train_denoiser(
        latents_of(vae, training), tokenizer, arguments.work / "plain", device, arguments.steps, None
    )
    varied = latents_of(vae, [*training, *(augmented(one, n) for n in range(NUM_VARIANTS) for one in training)])
    general = train_denoiser(
        varied, tokenizer, arguments.work / "varied", device, arguments.varied_steps, deepcopy(memorized)
    )
    model = interpolate(general.to("cpu"), memorized.to("cpu"), arguments.keep)
    vae.to("cpu")
    publish(vae, model, tokenizer_folder, emoji, arguments.out)
    metrics = held_out_metrics(vae, model, tokenizer, emoji) | prompt_metrics(arguments.out)
    (arguments.out / "figures.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


def interpolate(model: Denoiser, other: Denoiser, share: float) -> Denoiser:
    """Interpolate the weights of a fine-tuned model with a `share` of those before fine-tuning (Wortsman et al. 2022).

    The result generalizes like `model` and follows the text like `other`.
    """
    others = other.state_dict()
    weights = {name: weight.lerp(others[name], share) if weight.is_floating_point() else weight
               for name, weight in model.state_dict().items()}  # fmt: skip
    model.load_state_dict(weights)
    return model


if __name__ == "__main__":
    main()
