"""Make the embedded base `sketch`, or go on making it: `make sketch`, or
`python -m scumble.configs.bases.sketch.recipe --work FOLDER --out FOLDER`.

Everything is kept in the work folder; the same command goes on where it was cut, and a larger `--steps`
continues a finished run. `--warm FOLDER` starts from a published base instead (its VAE and words are kept).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from .denoiser import Denoiser, train_denoiser
from .judge import figures, latents_of, publish, steering
from .pictures import pictures, variant
from .text import make_tokenizer
from .vae import AutoencoderKL, train_vae

VARIANTS = 7  # of each picture, beside the picture itself


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/sketch"), help="folder of the state")
    parser.add_argument("--out", type=Path, default=Path("build/sketch/out"), help="folder of the finished base")
    parser.add_argument("--warm", type=Path, help="published base to start from")
    parser.add_argument("--keep", type=float, default=0.0, help="share of the --warm base's weights in the result")
    parser.add_argument("--vae-steps", type=int, default=4500)
    parser.add_argument("--steps", type=int, default=8_000, help="of the UNet and the text encoder, in all")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    known = pictures(chosen.work)
    learned = [picture for picture in known if not picture.held_out]
    print(f"{len(learned)} pictures to learn, {len(known) - len(learned)} held out, on {device}")

    words = chosen.work / "tokenizer"
    start = before = None
    if chosen.warm:
        words = chosen.warm / "tokenizer"
        tokenizer = CLIPTokenizer.from_pretrained(words)
        vae = AutoencoderKL.from_pretrained(chosen.warm, subfolder="vae", torch_dtype=torch.float32).to(device)
        text_encoder = CLIPTextModel.from_pretrained(chosen.warm, subfolder="text_encoder", torch_dtype=torch.float32)
        unet = UNet2DConditionModel.from_pretrained(chosen.warm, subfolder="unet", torch_dtype=torch.float32)
        start = Denoiser(text_encoder, unet)
        before = {name: weight.clone() for name, weight in start.state_dict().items()}
    else:
        names = chosen.work / "npm/node_modules/emojibase-data"
        tokenizer = make_tokenizer(names, [picture.caption for picture in known], words)
        rgba = torch.from_numpy(np.stack([picture.rgba for picture in learned])).permute(0, 3, 1, 2).float() / 255
        vae = train_vae(rgba, chosen.work, device, chosen.vae_steps)

    seen = [*learned, *(variant(picture, number) for number in range(VARIANTS) for picture in learned)]
    model = train_denoiser(latents_of(vae, seen), tokenizer, chosen.work, device, chosen.steps, start).to("cpu")
    if (
        before and chosen.keep
    ):  # between the two: as steerable as the one, as general as the other (Wortsman et al. 2022)
        kept = {name: weight.lerp(before[name].to(weight.dtype), chosen.keep) if weight.is_floating_point() else weight
                for name, weight in model.state_dict().items()}  # fmt: skip
        model.load_state_dict(kept)
    vae.to("cpu")
    publish(vae, model, words, known, chosen.out)
    measured = figures(vae, model, tokenizer, known) | steering(chosen.out)
    (chosen.out / "figures.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
