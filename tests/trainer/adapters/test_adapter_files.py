"""Deltas of adapter files against PEFT's own; malicious and damaged files."""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import tiny_base

from scumble.configs.errors import Refused
from scumble.trainer.adapters.adapter import Adapter, Module, from_tensors, read_adapter, to_tensors
from scumble.trainer.adapters.convert import convert
from scumble.trainer.adapters.files import write_adapter
from scumble.trainer.adapters.inspect import inspect
from scumble.trainer.adapters.keys import ModulePath
from scumble.trainer.adapters.lowrank import Rule
from scumble.trainer.adapters.resize import resize
from scumble.trainer.base_model.detect import EMBEDDED
from scumble.trainer.system.safetensors_header import read_header

TARGETS = r".*\.attn[12]\.to_[qv]|.*\.resnets\.\d+\.conv[12]"


def unet() -> UNet2DConditionModel:
    model = UNet2DConditionModel.from_pretrained(EMBEDDED, subfolder="unet", torch_dtype=torch.float32)
    assert isinstance(model, UNet2DConditionModel)
    return model


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("lora_", "hada_", "lokr_")):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", ["lora", "loha", "loha-core", "lokr", "lokr-factored", "lokr-core"])
def test_deltas_equal_those_of_peft(kind: str):
    model = unet()
    config = {
        "lora": LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS),
        "loha": LoHaConfig(r=4, alpha=2, target_modules=TARGETS),
        "loha-core": LoHaConfig(r=4, alpha=2, target_modules=TARGETS, use_effective_conv2d=True),
        "lokr-core": LoKrConfig(r=2, alpha=1, target_modules=TARGETS, use_effective_conv2d=True),
        "lokr": LoKrConfig(r=64, alpha=64, target_modules=TARGETS),
        "lokr-factored": LoKrConfig(r=2, alpha=1, target_modules=TARGETS),
    }[kind]
    inject_adapter_in_model(config, model, "it")
    randomize(model)
    checked = 0
    layers: list[tuple[str, Any]] = list(model.named_modules())
    for path, layer in layers:
        if isinstance(layer, LoHaLayer | LoKrLayer | LoraLayer):
            module = module_of(layer, kind.split("-")[0])
            torch.testing.assert_close(
                module.delta(), layer.get_delta_weight("it").flatten(1), rtol=1e-4, atol=1e-5, msg=path
            )
            checked += 1
    assert checked > 20


def module_of(layer: Any, kind: str) -> Module:
    """The factors of a PEFT layer under our slot names."""
    if kind == "lora":
        tensors = {"lora_down": layer.lora_A["it"].weight, "lora_up": layer.lora_B["it"].weight}
        return Module("lora", {name: tensor.detach() for name, tensor in tensors.items()}, 2.0)
    tensors = {}
    for name in dir(layer):
        if name.startswith(("hada_", "lokr_")) and "it" in getattr(layer, name):
            tensors[name] = getattr(layer, name)["it"].detach()
    return Module(kind, tensors, layer.scaling["it"] * layer.r["it"])


def test_a_file_from_diffusers_and_our_conversion_give_the_same_deltas(tmp_path: Path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base("sd1", tmp_path / "base"))
    pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0"]))
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "fc1"]))
    randomize(pipeline.unet), randomize(pipeline.text_encoder)
    pipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(pipeline.unet), get_peft_model_state_dict(pipeline.text_encoder)
    )
    theirs = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert theirs.dialect == "peft" and {layer.component for layer in theirs.modules} == {"unet", "text"}
    for dialect in ("kohya", "peft"):
        again = from_tensors(to_tensors(theirs, dialect), {}, dialect)
        assert again.dialect == dialect and again.modules.keys() == theirs.modules.keys()
        for layer, module in theirs.modules.items():
            torch.testing.assert_close(again.modules[layer].delta(), module.delta())


def lora(up: float, rank: int, alpha: float | None) -> Module:
    return Module("lora", {"lora_down": torch.ones(rank, 768), "lora_up": torch.full((8, rank), up)}, alpha)


def test_one_alpha_is_written_per_component_and_no_delta_changes():
    layers = [ModulePath("unet", f"down_blocks.0.attentions.{n}.transformer_blocks.0.attn2.to_k") for n in range(3)]
    adapter = Adapter(dict(zip(layers, [lora(1.0, 4, 4.0), lora(2.0, 4, 4.0), lora(1.0, 2, 0.5)], strict=True)))
    tensors = to_tensors(adapter)
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith("alpha")} == {4.0}
    again = from_tensors(tensors, {}, "x")
    for layer, module in adapter.modules.items():
        torch.testing.assert_close(again.modules[layer].delta(), module.delta())


def test_a_file_is_byte_for_byte_what_the_safetensors_library_writes(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    types = [torch.float16, torch.float32, torch.bfloat16, torch.float64]
    tensors = {f"b{n}": torch.randn(n + 1, 5, generator=generator).to(types[n % 4]) for n in range(8)}
    tensors |= {"alpha": torch.tensor(4.0), "a.transposed": tensors["b3"].T, "a.part": tensors["b5"][:, 1:3]}
    write_adapter(tensors, {}, tmp_path / "ours.safetensors")
    ours = (tmp_path / "ours.safetensors").read_bytes()
    header = read_header(tmp_path / "ours.safetensors")
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs.safetensors", header.metadata)
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()
    assert header.metadata == {"sshs_model_hash": hashlib.sha256(ours[header.size :]).hexdigest()}
    with pytest.raises(Refused, match=r"integers is torch\.int8"):
        write_adapter({"integers": torch.ones(2, dtype=torch.int8)}, {}, tmp_path / "ints.safetensors")


def test_a_missing_alpha_means_scale_1_and_the_family_follows_from_the_cross_attention_width():
    layer = ModulePath("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k")
    for width, family in ((768, "sd1"), (1024, "sd2"), (2048, "sdxl")):
        tensors = {"lora_down": torch.ones(4, width), "lora_up": torch.ones(8, 4)}
        named = {
            f"unet.{layer.path}.lora_{'A' if name == 'lora_down' else 'B'}.weight": t for name, t in tensors.items()
        }
        adapter = from_tensors(named, {}, "x")
        assert adapter.family == family and adapter.modules[layer].scale == 1.0


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "is missing lora_up"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.alpha", "is missing its factors"),
        ("../../etc/passwd", r"1 of 1 keys are not adapter keys, first \.\./\.\./etc/passwd"),
    ],
)
def test_missing_tensors_and_unknown_keys_are_refused_by_name(name: str, line: str):
    with pytest.raises(Refused, match=line):
        from_tensors({name: torch.ones(2, 2)}, {}, "x")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_integer_factors_are_refused(dtype: torch.dtype):
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    with pytest.raises(Refused, match=r"proj_in has lora_(down|up) in (int32|bool), expected a floating-point type"):
        from_tensors({f"{stem}.lora_{end}.weight": torch.ones(2, 2, dtype=dtype) for end in ("down", "up")}, {}, "x")


def test_fp8_files_are_read_and_results_are_written_in_fp16(tmp_path: Path):
    stem, path = "lora_unet_mid_block_attentions_0_proj_in", tmp_path / "x.safetensors"
    parts = {f"{stem}.lora_{end}.weight": torch.ones(2, 2).to(torch.float8_e4m3fn) for end in ("down", "up")}
    save_file(parts, path)
    report = inspect(path)
    assert report.dtypes == ("float8_e4m3fn",) and not report.broken and list(report.norms.values()) == [4.0]
    module = next(iter(resize(read_adapter(path), Rule(1), "x").adapter.modules.values()))
    assert {tensor.dtype for tensor in module.tensors.values()} == {torch.float16}
    with pytest.raises(Refused, match="use `scumble adapter convert --dtype fp16`"):
        convert(path, "kohya", "", tmp_path / "y.safetensors")
    convert(path, "kohya", "fp16", tmp_path / "y.safetensors")


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "length", "line"),
    [
        ({}, b"", 2**63, r"shorter than its header length\); copy or download it again"),
        (b"{" * 100_000, b"", None, "not a safetensors file"),
        (b'{"a": 1, "a": 2}', b"", None, "duplicate name in the header"),
        (b"[]", b"", None, "the header is not a JSON object"),
        ({"a": entry(offsets=(0, 8))}, b"0" * 8, None, "has 8 bytes, which does not match its shape"),
        ({"a": entry(offsets=(4, 8))}, b"0" * 8, None, "overlaps another or leaves a gap"),
        ({"a": entry(), "b": entry()}, b"0" * 4, None, "overlaps another or leaves a gap"),
        ({"a": entry()}, b"", None, "contains 0 bytes of tensors, but its header describes 4; copy or download"),
        ({"a": entry()}, b"0" * 9, None, "contains 9 bytes of tensors, but its header describes 4"),
        ({"a": entry(dtype="F31")}, b"0" * 4, None, "has the unknown dtype F31"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"0" * 4, None, "has the unknown dtype"),
        ({"a": entry(shape=(-1,))}, b"0" * 4, None, "invalid shape or invalid offsets"),
        ({"a": entry(shape=(2**62, 4))}, b"0" * 4, None, "does not match its shape"),
        ({"a": entry(shape=(True,))}, b"0" * 4, None, "invalid shape or invalid offsets"),
        ({"a": 3}, b"", None, "must have dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 3}}, b"", None, "not an object with string values"),
        ({"__metadata__": {"a": "x" * 10_000_000}}, b"", None, "the metadata has 10,000,001 characters"),
    ],
)  # fmt: skip
def test_a_malicious_header_is_refused_in_one_line_and_nothing_is_allocated(
    header: object, data: bytes, length: int | None, line: str, tmp_path: Path
):
    with pytest.raises(Refused, match=line) as error:
        read_header(raw(tmp_path / "x.safetensors", header, data, length))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_an_oversized_header_is_not_read(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:  # a sparse file that claims to have a header of 2 GiB
        file.write(struct.pack("<Q", 2**31))
        file.truncate(2**31 + 8)
    with pytest.raises(Refused, match="the header has 2,147,483,648 bytes"):
        read_header(path)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(Refused, match="not a regular file"):
        read_header(tmp_path / "x.safetensors")


def test_a_header_written_by_the_safetensors_library_is_parsed(tmp_path: Path):
    tensors = {
        "a": torch.ones(2, 3, dtype=torch.float16),
        "b": torch.zeros(()),
        "c": torch.ones(5, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"who": "me"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: entry.shape for name, entry in header.entries.items()
    }
    assert header.metadata == {"who": "me"}


def test_a_pickle_is_never_read_and_an_existing_file_is_not_overwritten(tmp_path: Path):
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(Refused, match="pickle files can run arbitrary code"):
        read_adapter(tmp_path / "x.pt")
    write_adapter({"a": torch.ones(1)}, {}, tmp_path / "x.safetensors")
    with pytest.raises(Refused, match="file exists; choose another name, or use --force"):
        write_adapter({"a": torch.ones(1)}, {}, tmp_path / "x.safetensors", force=False)
    with pytest.raises(Refused, match="metadata is larger than"):
        write_adapter({"a": torch.ones(1)}, {"a": "x" * 2**21}, tmp_path / "y.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pt", "x.safetensors"]
