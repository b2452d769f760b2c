"""Single-file checkpoints load offline with the folders in `configs/bases`.

The checkpoints are generated: random weights under the names of the original code (LDM, OpenCLIP), for models with all
layers of the published ones at a twentieth of their width.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from single_files import PIPELINES, narrow, one_file, parameters_of, random_parts


@pytest.mark.parametrize("base", PIPELINES)
def test_a_single_file_checkpoint_loads_with_only_the_config_folder_of_its_base(base: str, tmp_path: Path):
    folder = narrow(base, tmp_path / base)
    parts = random_parts(base, folder)
    save_file(one_file(base, parts), tmp_path / "checkpoint.safetensors")
    pipeline = PIPELINES[base].from_single_file(
        str(tmp_path / "checkpoint.safetensors"), config=str(folder), local_files_only=True
    )
    for name, weights in parts.items():
        loaded = parameters_of(getattr(pipeline, name))
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[key], weight) for key, weight in weights.items()), name
    assert pipeline.scheduler.config["prediction_type"] == ("v_prediction" if base == "sd21-v" else "epsilon")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a photo of a cat", height=64, width=64, num_inference_steps=2, output_type="latent")
    assert images.images.shape == (1, 4, 8, 8)
    assert images.images.isfinite().all()
