"""Baking gives the same images as an adapter loaded by diffusers, and the same weights as PEFT's own merge."""

import errno
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_files import PIPELINES, narrow, one_file, parameters_of, random_parts
from tiny import tiny_base

from scumble.configs.errors import Refused
from scumble.trainer.adapters.adapter import Adapter, Module, from_tensors, read_adapter, to_tensors
from scumble.trainer.adapters.bake import BakedAdapter, bake
from scumble.trainer.adapters.files import write_adapter
from scumble.trainer.adapters.keys import ModulePath
from scumble.trainer.adapters.weights import find_weights
from scumble.trainer.base_model.detect import EMBEDDED

VERSIONS = {"sketch": "sd_v1", "sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
FAMILIES = {"sketch": "sd1", "sd15": "sd1", "sd21": "sd2", "sd1": "sd1", "sd2": "sd2", "sdxl": "sdxl"}
UNET = ("attn1.to_q", "attn2.to_v", "to_out.0", "proj_in", "ff.net.2", "conv1")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # without out_proj, diffusers loses the others


def base_of(kind: str, folder: Path) -> Path:
    """A folder in fp32, so that rendering uses exactly the stored weights."""
    if kind != "sketch":
        return tiny_base(kind, folder)
    pipeline(EMBEDDED).save_pretrained(folder)
    return folder


def pipeline(folder: Path) -> Any:
    loaded = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def adapter_for(base: Path, family: str, seed: int, layers: tuple[str, ...] = UNET + TEXT) -> Adapter:
    """A LoRA of rank 2 on some layers, with 0.3 times the norm of their weights."""
    weights = find_weights(base)
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for layer in sorted(weights.layers):
        if not layer.path.endswith(layers) or layer.path.startswith("add_embedding"):
            continue
        weight = weights.read(layer)
        ones = (1,) * (weight.dim() - 2)
        down = torch.randn(2, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), 2, *ones, generator=generator)
        factor = 0.3 * float(weight.float().norm() / (up.flatten(1) @ down.flatten(1)).norm())
        modules[layer] = Module("lora", {"lora_down": down, "lora_up": up * factor}, 2.0)
    return Adapter(modules, {}, family)


def written(adapter: Adapter, kind: str, path: Path) -> Path:
    write_adapter(to_tensors(adapter), {"ss_base_model_version": VERSIONS[kind]}, path)
    return path


def rendered(loaded: Any) -> torch.Tensor:
    side = loaded.unet.config.sample_size * loaded.vae_scale_factor
    result = loaded(
        "a fox", num_inference_steps=2, guidance_scale=4.0, height=side, width=side, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return result.images


@pytest.mark.parametrize("kind", ["sketch", "sd1", "sdxl"])
def test_a_baked_folder_gives_the_same_images_as_the_base_with_loaded_adapters(kind: str, tmp_path: Path):
    base = base_of(kind, tmp_path / "base")
    adapters = []
    stock = pipeline(base)
    plain = rendered(stock)
    for name, seed, strength, layers in (("one", 1, 0.8, UNET + TEXT), ("two", 2, -0.5, UNET)):
        file = written(adapter_for(base, FAMILIES[kind], seed, layers), kind, tmp_path / f"{name}.safetensors")
        stock.load_lora_weights(file, adapter_name=name)
        adapters.append(BakedAdapter(name, read_adapter(file), strength))
    stock.set_adapters(["one", "two"], [0.8, -0.5])
    expected = rendered(stock)
    bake(base, tmp_path / "baked", adapters)
    found = rendered(pipeline(tmp_path / "baked"))
    assert float((expected - plain).abs().mean()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert float((found - expected).abs().mean()) < 1e-4


def test_the_embedded_base_keeps_its_dtypes_and_its_other_files(tmp_path: Path):
    adapter = adapter_for(EMBEDDED, "sd1", 1)
    bake(EMBEDDED, tmp_path / "baked", [BakedAdapter("one", adapter)])
    before, after = find_weights(EMBEDDED), find_weights(tmp_path / "baked")
    assert before.layers.keys() == after.layers.keys()
    for layer in before.layers:
        old, new = before.read(layer), after.read(layer)
        assert old.dtype == new.dtype and old.shape == new.shape
        if layer in adapter.modules:
            expected = old.float() + adapter.modules[layer].delta().reshape(old.shape)
            assert torch.equal(new, expected.to(old.dtype))
        else:
            assert torch.equal(new, old)
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "baked" / vae).read_bytes() == (EMBEDDED / vae).read_bytes()
    pipeline(tmp_path / "baked")
    with safe_open(tmp_path / "baked/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata()["baked"] == "one x 1"


def test_a_baked_folder_contains_no_file_paths_of_its_base(tiny: Path, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    names = {
        "model_index.json": ("_name_or_path", "/home/mia-q7/models/base", "base"),
        "unet/config.json": ("_name_or_path", "C:\\Users\\mia-q7\\sd\\unet", "unet"),
        "text_encoder/config.json": ("_name_or_path", "openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14"),
        "tokenizer/tokenizer_config.json": ("name_or_path", "/home/mia-q7/models/base/tokenizer", "tokenizer"),
    }
    for name, (key, path, _) in names.items():
        config = json.loads((base / name).read_text(encoding="utf-8")) | {key: path}
        (base / name).write_text(json.dumps(config), encoding="utf-8")
    lines = bake(base, tmp_path / "baked", [BakedAdapter("one", adapter_for(base, "sd1", 1))])
    assert "model_index.json" in lines[0] and "unet/config.json" in lines[0] and "text_encoder" not in lines[0]
    for name, (key, _, expected) in names.items():
        config = json.loads((tmp_path / "baked" / name).read_text(encoding="utf-8"))
        assert config == json.loads((base / name).read_text(encoding="utf-8")) | {key: expected}
    texts = [file.read_bytes() for file in (tmp_path / "baked").rglob("*") if file.is_file()]
    assert not any(b"mia-q7" in text for text in texts)
    pipeline(tmp_path / "baked")


@pytest.mark.parametrize("base", ["sd15", "sd21", "sdxl"])
def test_a_single_file_checkpoint_is_baked_like_the_folder(base: str, tmp_path: Path):
    folder = narrow(base, tmp_path / "configs")
    parts = random_parts(base, folder)
    checkpoint = tmp_path / "checkpoint.safetensors"
    save_file(one_file(base, parts), checkpoint, {"who": "me"})
    pipeline = PIPELINES[base].from_single_file(str(checkpoint), config=str(folder), local_files_only=True)
    pipeline.save_pretrained(tmp_path / "folder")
    assert find_weights(checkpoint).family == FAMILIES[base]
    folders, files = find_weights(tmp_path / "folder"), find_weights(checkpoint)
    assert (
        folders.layers.keys() == files.layers.keys() or base == "sdxl"
    )  # a single file stores its text projection transposed
    adapter = adapter_for(tmp_path / "folder", FAMILIES[base], 1)
    assert {layer.component for layer in adapter.modules} == {"unet", "text"} | ({"text2"} if base == "sdxl" else set())
    bake(checkpoint, tmp_path / "baked.safetensors", [BakedAdapter("one", adapter, 0.7)])
    bake(tmp_path / "folder", tmp_path / "baked", [BakedAdapter("one", adapter, 0.7)])
    again = PIPELINES[base].from_single_file(
        str(tmp_path / "baked.safetensors"), config=str(folder), local_files_only=True
    )
    from_folder = PIPELINES[base].from_pretrained(tmp_path / "baked")
    for part in parts:
        one, other = parameters_of(getattr(again, part)), parameters_of(getattr(from_folder, part))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), part
    layer = next(layer for layer in adapter.modules if layer.path.endswith("v_proj"))
    module = getattr(again, "text_encoder" if layer.component == "text" else "text_encoder_2")
    old = parts["text_encoder" if layer.component == "text" else "text_encoder_2"][f"{layer.path}.weight"]
    new = parameters_of(module)[f"{layer.path}.weight"]
    torch.testing.assert_close(new, old + 0.7 * adapter.modules[layer].delta(), rtol=1e-5, atol=1e-6)
    with safe_open(tmp_path / "baked.safetensors", "pt") as file:
        assert file.metadata() == {"who": "me", "baked": "one x 0.7"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_undo_restores_the_base_up_to_rounding(dtype: torch.dtype, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    prefix, fused = "model.diffusion_model.middle_block.1", "conditioner.embedders.1.model.transformer.resblocks.0.attn"
    tensors = {
        f"{prefix}.proj_in.weight": torch.randn(30, 30, generator=generator).to(dtype),
        f"{prefix}.proj_in.bias": torch.randn(30, generator=generator).to(dtype),
        f"{fused}.in_proj_weight": torch.randn(60, 20, generator=generator).to(dtype),
    }
    save_file(tensors, tmp_path / "base.safetensors")
    adapters = [
        BakedAdapter("one", adapter_for(tmp_path / "base.safetensors", "sdxl", 1, ("proj_in", "q_proj", "v_proj")), 0.9)
    ]
    bake(tmp_path / "base.safetensors", tmp_path / "baked.safetensors", adapters)
    bake(tmp_path / "baked.safetensors", tmp_path / "restored.safetensors", adapters, undo=True)
    restored, baked = load_file(tmp_path / "restored.safetensors"), load_file(tmp_path / "baked.safetensors")
    changed = {name for name in tensors if not torch.equal(baked[name], tensors[name])}
    assert changed == {f"{prefix}.proj_in.weight", f"{fused}.in_proj_weight"}
    keys = slice(20, 40)  # rows of k, which the adapter does not change
    assert torch.equal(baked[f"{fused}.in_proj_weight"][keys], tensors[f"{fused}.in_proj_weight"][keys])
    step = 2 * torch.finfo(dtype).eps
    for name, tensor in tensors.items():
        torch.testing.assert_close(restored[name].float(), tensor.float(), rtol=step, atol=step)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(12, 20, bias=False)
        self.conv = torch.nn.Conv2d(6, 6, 3, bias=False)


def test_a_dora_from_peft_is_baked_as_peft_merges_it():
    torch.manual_seed(0)
    model = Small()
    old = {"to_q": model.to_q.weight.detach().clone(), "conv": model.conv.weight.detach().clone()}
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "conv"], use_dora=True), model, "it")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.abs() + 0.3 * torch.rand(parameter.shape)
    prefixes = {"to_q": "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
                "conv": "unet.down_blocks.0.downsamplers.0.conv"}  # fmt: skip
    state = get_peft_model_state_dict(model, adapter_name="it")
    renamed = {prefixes[name.split(".")[0]] + "." + name.split(".", 1)[1]: tensor for name, tensor in state.items()}
    settings = json.dumps({"unet.lora_alpha": 6})
    adapter = from_tensors(renamed, {"lora_adapter_metadata": settings}, "x")
    assert adapter.dialect == "peft"
    for name, prefix in prefixes.items():
        layer = getattr(model, name)
        assert isinstance(layer, LoraLayer)
        layer.merge()
        module = adapter.modules[ModulePath("unet", prefix.removeprefix("unet."))]
        found = module.on(old[name])
        torch.testing.assert_close(found, layer.get_base_layer().weight.detach(), rtol=1e-5, atol=1e-6)


def test_dora_with_per_input_magnitudes_sets_the_norm_of_every_column():
    torch.manual_seed(0)
    weight, magnitude = torch.randn(8, 5, 3, 3), torch.rand(1, 5, 1, 1) + 0.5
    module = Module(
        "lora", {"lora_down": torch.randn(2, 5, 3, 3), "lora_up": torch.randn(8, 2, 1, 1), "dora_scale": magnitude}, 1.0
    )
    whole, half = module.on(weight), module.on(weight, 0.5)
    direction = weight + module.delta().reshape(weight.shape)
    for column in range(5):
        expected = direction[:, column] / direction[:, column].norm() * magnitude[0, column]
        torch.testing.assert_close(whole[:, column], expected)
    torch.testing.assert_close(half, (weight + whole) / 2)


def ones() -> Module:
    return Module("lora", {"lora_down": torch.ones(1, 1024), "lora_up": torch.ones(1024, 1)}, 1.0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_large_file_is_baked_in_little_memory(tmp_path: Path):
    blocks = [(i, j) for i in range(12) for j in range(5)]
    tensors = {
        f"model.diffusion_model.output_blocks.{i}.1.transformer_blocks.{j}.attn1.to_q.weight": torch.ones(1024, 1024)
        for i, j in blocks
    }  # 240 MiB
    save_file(tensors, tmp_path / "base.safetensors")
    layers = [
        ModulePath("unet", f"up_blocks.{i // 3}.attentions.{i % 3}.transformer_blocks.{j}.attn1.to_q")
        for i, j in blocks
    ]
    write_adapter(to_tensors(Adapter({p: ones() for p in layers})), {}, tmp_path / "x.safetensors")
    script = """if True:
        import sys
        from pathlib import Path
        from scumble.trainer.adapters.adapter import read_adapter
        from scumble.trainer.adapters.bake import BakedAdapter, bake
        here = Path(sys.argv[1])
        adapter = read_adapter(here / "x.safetensors")
        peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        before = peak()
        bake(here / "base.safetensors", here / "baked.safetensors", [BakedAdapter("x", adapter, 2.0)])
        print((peak() - before) // 1024)
    """
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64, done.stdout
    with safe_open(tmp_path / "baked.safetensors", "pt") as file:
        assert all(float(file.get_tensor(name).mean()) == 3.0 for name in file.keys())  # noqa: SIM118


def test_an_overflow_is_refused_and_leaves_no_files(tmp_path: Path):
    name = "model.diffusion_model.middle_block.1.proj_in"
    save_file({f"{name}.weight": torch.ones(4, 4, dtype=torch.float16)}, tmp_path / "base.safetensors")
    huge = {"lora_down": torch.full((1, 4), 300.0), "lora_up": torch.full((4, 1), 300.0)}
    adapter = Adapter({ModulePath("unet", "mid_block.attentions.0.proj_in"): Module("lora", huge, None)})
    with pytest.raises(Refused, match=r"proj_in\.weight would overflow F16; use a smaller strength"):
        bake(tmp_path / "base.safetensors", tmp_path / "out.safetensors", [BakedAdapter("x", adapter)])
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base("sd1", tmp_path_factory.mktemp("bake") / "base")


def test_an_adapter_that_does_not_fit_is_refused_in_one_line_before_anything_is_written(tiny: Path, tmp_path: Path):
    fits = adapter_for(tiny, "sd1", 1)
    layer = next(iter(fits.modules))
    other = Adapter(fits.modules | {ModulePath("unet", "down_blocks.7.attentions.0.proj_in"): fits.modules[layer]})
    wide = Adapter({layer: Module("lora", {"lora_down": torch.ones(2, 9), "lora_up": torch.ones(4, 2)}, None)})
    dora = {layer: Module("lora", fits.modules[layer].tensors | {"dora_scale": torch.ones(99, 1)}, None)}
    for adapter, undo, line in (
        (Adapter({layer: replace(fits.modules[layer], alpha=math.nan)}), False, "x: .* has non-finite values"),
        (other, False, r"x: unet\.down_blocks\.7\.attentions\.0\.proj_in is not in the base; .* made for a different"),
        (wide, False, r"x: .* is 4 x 9, but the base's layer is \d+ x \d+; .* made for a different base than .*base"),
        (Adapter(dora), False, r"DoRA magnitudes of shape \(99, 1\)"),
        (Adapter(dora), True, "--undo x: .* is DoRA, which replaces weight norms.*use the original base"),
    ):
        with pytest.raises(Refused, match=line) as error:
            bake(tiny, tmp_path / "out", [BakedAdapter("x", adapter)], undo=undo)
        assert "\n" not in str(error.value)
    for base, line in (
        (tmp_path / "none", "no such file or folder"),
        (tmp_path, r"no \.safetensors file in unet/"),
    ):
        with pytest.raises(Refused, match=line):
            bake(base, tmp_path / "out", [BakedAdapter("x", fits)])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_in_one_line_and_leaves_no_files(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(Refused, match=r"out: cannot be written \(No space left on device\)$") as error:
        bake(tiny, tmp_path / "out", [BakedAdapter("x", adapter_for(tiny, "sd1", 1))])
    assert error.value.exit_code == 73 and list(tmp_path.iterdir()) == []


def test_a_disk_with_too_little_space_is_refused_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_file({"model.diffusion_model.middle_block.1.proj_in.weight": torch.ones(30, 30)}, tmp_path / "b.safetensors")
    size_of_folder = sum(file.stat().st_size for file in tiny.rglob("*/*") if file.is_file())
    sizes = {tiny: size_of_folder, tmp_path / "b.safetensors": (tmp_path / "b.safetensors").stat().st_size}
    for base, needed in sizes.items():
        out, adapters = tmp_path / f"out{base.suffix}", [BakedAdapter("x", adapter_for(base, "sd1", 1))]
        own = out.with_name(out.name + ".part")  # a file of the user, which must not be touched
        own.write_bytes(b"mine")
        for free in (needed - 1, needed):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
            if free < needed:
                with pytest.raises(Refused, match=rf"--out .*{out.name}: needs .*, but only .* is free") as error:
                    bake(base, out, adapters)
                assert error.value.exit_code == 73 and not out.exists()
        bake(base, out, adapters)
        assert out.exists() and own.read_bytes() == b"mine"
        assert {path.name for path in tmp_path.glob("*.part")} <= {"out.part", "out.safetensors.part"}


def test_an_existing_output_needs_force_and_other_folders_are_never_replaced(tiny: Path, tmp_path: Path):
    adapters = [BakedAdapter("x", adapter_for(tiny, "sd1", 1))]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/diary.txt").write_text("dear diary")
    with pytest.raises(Refused, match="already exists; choose another name, or use --force"):
        bake(tiny, tmp_path / "mine", adapters)
    with pytest.raises(Refused, match="is not a diffusers folder, so --force does not replace it"):
        bake(tiny, tmp_path / "mine", adapters, force=True)
    with pytest.raises(
        Refused, match=r"the base is a folder, so the result is one too; use a name without \.safetensors"
    ):
        bake(tiny, tmp_path / "x.safetensors", adapters)
    shutil.copytree(tiny, tmp_path / "outer")
    shutil.copytree(tiny, tmp_path / "outer/inner")
    for base in (tmp_path / "outer", tmp_path / "outer/inner"):
        with pytest.raises(Refused, match="is the base itself or contains it"):
            bake(base, tmp_path / "outer", adapters, force=True)
    shutil.rmtree(tmp_path / "outer")
    assert (tmp_path / "mine/diary.txt").read_text() == "dear diary"
    shutil.copytree(tiny, tmp_path / "base")
    (tmp_path / "base/unet/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    bake(tmp_path / "base", tmp_path / "baked", adapters)
    bake(tmp_path / "base", tmp_path / "baked", adapters, force=True)
    assert not (tmp_path / "baked/unet/diffusion_pytorch_model.bin").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["baked", "base", "mine"]
