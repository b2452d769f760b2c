"""Loading bases from a folder, from a Hub ID in the local cache and from a full-size single file, and refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from paths import CHECKOUT
from safetensors.torch import save_file
from single_files import BASES, one_file, random_parts
from tiny import tiny_base

from scumble.configs.errors import Refused
from scumble.configs.options import Model, Network
from scumble.trainer.adapters.targets import Part
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.base_model.load import load
from scumble.trainer.training.export import export
from scumble.trainer.training.lora import attach

CPU = torch.device("cpu")
HUB_ID = "someone/tiny"


def hub_cache(home: Path) -> Path:
    """Create a Hub cache in `home` with a tiny base as HUB_ID. Returns the folder of the base."""
    repository = home / "hub" / ("models--" + HUB_ID.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return tiny_base("sd1", repository / "snapshots" / ("0" * 40))


def dry_run(base: str, home: Path) -> subprocess.CompletedProcess[str]:
    samples = CHECKOUT / "datasets/samples/clay-cat"
    command = [sys.executable, "-m", "scumble.trainer.cli", "train", str(samples), "--base", base, "--dry-run"]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home)


def test_a_hub_id_is_found_in_the_local_cache_while_offline(tmp_path: Path):
    hub_cache(tmp_path)
    done = dry_run(HUB_ID, tmp_path)
    assert done.returncode == 0 and "for Stable Diffusion 1" in done.stdout


def test_an_unavailable_hub_id_is_refused_in_one_line(tmp_path: Path):
    done = dry_run("someone/elses", tmp_path)
    assert done.returncode == 69 and done.stderr.count("\n") == 1
    assert "--base someone/elses: no such local folder, not in the Hub cache" in done.stderr


def test_a_folder_with_only_fp16_weights_loads(tmp_path: Path):
    folder = tiny_base("sd1", tmp_path / "full")
    StableDiffusionPipeline.from_pretrained(folder).to(dtype=torch.float16).save_pretrained(
        tmp_path / "half", variant="fp16"
    )
    model = Model(base=str(tmp_path / "half"))
    base = load(model, detect_base(model), CPU, torch.float32)
    assert base.unet.dtype == torch.float32 and base.text_encoders[0].dtype == torch.float32


def test_a_folder_of_pickles_is_refused_with_a_reason(tmp_path: Path):
    folder = tiny_base("sd1", tmp_path / "it")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(Refused, match=r"no \.safetensors file in unet/; pickles"):
        detect_base(Model(base=str(folder)))


@pytest.mark.parametrize(
    ("kind", "family", "prediction", "resolution_px", "step_px"),
    [
        ("sd15", "sd1", "epsilon", 512, 64),
        ("sd21", "sd2", "epsilon", 512, 64),
        ("sd21-v", "sd2", "v_prediction", 768, 64),
        ("sdxl", "sdxl", "epsilon", 1024, 64),
    ],
)
def test_family_prediction_type_and_sizes_of_a_folder_are_detected(
    kind: str, family: str, prediction: str, resolution_px: int, step_px: int, tmp_path: Path
):
    folder = shutil.copytree(BASES / kind, tmp_path / kind)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").touch()
    source = detect_base(Model(base=str(folder)))
    assert (source.family.name, source.prediction) == (family, prediction)
    assert (source.resolution_px, source.step_px) == (resolution_px, step_px)


def minimal_checkpoint(
    path: Path, context: int, extra: dict[str, list[int]], norm1: torch.Tensor | None = None
) -> Path:
    """A single-file checkpoint with only the tensors that detection reads."""
    block = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0"
    tensors = {f"{block}.attn2.to_k.weight": torch.zeros(4, context)}
    tensors |= {f"{block}.norm1.bias": torch.zeros(8) if norm1 is None else norm1}
    save_file(tensors | {name: torch.zeros(shape) for name, shape in extra.items()}, path)
    return path


@pytest.mark.parametrize(
    ("context", "extra", "spread", "family", "prediction", "zero_snr"),
    [
        (768, {}, 0.0, "sd1", "epsilon", False),
        (768, {"v_pred": [0]}, 0.0, "sd1", "v_prediction", False),
        (1024, {}, 0.0, "sd2", "epsilon", False),
        (1024, {}, 0.2, "sd2", "v_prediction", False),
        (2048, {}, 0.0, "sdxl", "epsilon", False),
        (2048, {"v_pred": [0], "ztsnr": [0]}, 0.0, "sdxl", "v_prediction", True),
    ],
)
def test_a_single_file_is_detected_by_shapes_and_keys(
    context: int, extra: dict, spread: float, family: str, prediction: str, zero_snr: bool, tmp_path: Path
):
    norm1 = torch.tensor([-spread, spread] * 4)
    source = detect_base(Model(base=str(minimal_checkpoint(tmp_path / "m.safetensors", context, extra, norm1))))
    assert (source.family.name, source.prediction, source.zero_terminal_snr) == (family, prediction, zero_snr)


def test_options_override_the_file(tmp_path: Path):
    path = minimal_checkpoint(tmp_path / "m.safetensors", 768, {})
    source = detect_base(Model(base=str(path), prediction_type="v_prediction", zero_terminal_snr=True))
    assert source.prediction == "v_prediction" and source.zero_terminal_snr


@pytest.mark.parametrize("data", [b"", b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0[]", b"\x05\0\0\0\0\0\0\0hello"])
def test_an_invalid_safetensors_file_is_refused(data: bytes, tmp_path: Path):
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(Refused, match=r"m\.safetensors: not a safetensors file"):
        detect_base(Model(base=str(tmp_path / "m.safetensors")))


@pytest.mark.slow
def test_stock_diffusers_renders_an_adapter_for_a_full_size_sd15_file_the_same(tmp_path: Path):
    checkpoint = tmp_path / "sd15.safetensors"
    weights = one_file("sd15", random_parts("sd15", BASES / "sd15"))
    assert sum(weight.numel() for weight in weights.values()) > 1_000_000_000
    save_file({name: weight.half() for name, weight in weights.items()}, checkpoint)
    del weights
    model = Model(base=str(checkpoint))
    base = load(model, detect_base(model), CPU, torch.float32)
    trained = attach(base, Network(targets="full"), [Part("unet", 4, 4.0, 2, 2.0), Part("text", 4, 4.0)], seed=0)
    assert sum(module.part == "unet" for module in trained) == 278
    assert sum(module.part == "text" for module in trained) == 72
    for module in trained:
        torch.nn.init.normal_(module.tensors["lora_up"], std=0.02)
    assert isinstance(base.pipeline, StableDiffusionPipeline)
    live = rendered(base.pipeline)
    export(tmp_path / "it.safetensors", trained, {}, torch.float32)
    del base, trained
    stock = StableDiffusionPipeline.from_single_file(
        str(checkpoint), config=str(BASES / "sd15"), local_files_only=True, torch_dtype=torch.float32,
        safety_checker=None,
    )  # fmt: skip
    stock.register_modules(scheduler=DDIMScheduler.from_config(stock.scheduler.config))
    stock.set_progress_bar_config(disable=True)
    without = rendered(stock)
    stock.load_lora_weights(str(tmp_path / "it.safetensors"))
    np.testing.assert_allclose(rendered(stock), live, atol=1e-3)
    assert np.abs(live - without).max() > 1e-2


def rendered(pipeline: StableDiffusionPipeline) -> np.ndarray:
    """Latents (4, 8, 8) after two sampling steps."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipeline(
            "a cat", num_inference_steps=2, height=64, width=64, generator=generator, output_type="latent"
        ).images[0].numpy()  # fmt: skip


def test_the_config_folders_for_single_files_exist():
    for folder in ("sd15", "sd21", "sd21-v", "sdxl"):
        assert json.loads((BASES / folder / "model_index.json").read_text())["_class_name"].startswith(
            "StableDiffusion"
        )
