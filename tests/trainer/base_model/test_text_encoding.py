"""Text encodings and the time ids of SDXL match the diffusers pipelines."""

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from tiny import tiny_base

from scumble.configs.options import Model
from scumble.datasets.reading.images import Size, center_crop
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.load import load
from scumble.trainer.base_model.text_encoding import encode_prompts, time_ids

PROMPTS = ["a photo of a cat", "", "a " + "very " * 100 + "long prompt"]


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_encodings_match_the_pipeline(kind: str, tmp_path: Path):
    model = Model(base=str(tiny_base(kind, tmp_path / kind)))
    base = load(model, detect_base(model), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        ours = encode_prompts(base, PROMPTS)
        theirs = base.pipeline.encode_prompt(
            PROMPTS,  # ty: ignore[invalid-argument-type]
            device=torch.device("cpu"),
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    torch.testing.assert_close(ours.hidden, theirs[0])
    if kind == "sdxl":
        torch.testing.assert_close(ours.pooled, theirs[2])
    else:
        assert ours.pooled is None


def test_time_ids_match_the_sdxl_pipeline(tmp_path: Path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_base("sdxl", tmp_path))
    crop = center_crop(Size(1500, 1000), Size(1216, 832))
    assert (crop.resized, crop.left, crop.top) == (Size(1248, 832), 16, 0)
    expected = pipeline._get_add_time_ids(
        (1000, 1500), (0, 16), (832, 1216), dtype=torch.float32, text_encoder_projection_dim=48
    )
    torch.testing.assert_close(time_ids([crop]), expected)
