"""Inspecting adapters: norms against dense products, hashes against hashlib, and reports on untrusted files."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from scumble.trainer import cli
from scumble.trainer.adapters.adapter import Module
from scumble.trainer.adapters.files import write_adapter
from scumble.trainer.adapters.inspect import block_norms, block_of, inspect, norm
from scumble.trainer.adapters.keys import ModulePath
from scumble.trainer.commands import adapter_tables

ATTN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_up_blocks_1_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_5_mlp_fc1"
METADATA = {
    "ss_base_model_version": "sd_v1",
    "ss_sd_model_name": "my.safetensors",
    "ss_unet_lr": "0.0001",
    "ss_clip_skip": "None",
    "ss_tag_frequency": json.dumps({"a": {"tree": 3, "zwx": 5}, "b": {"tree": 4}}),
    "modelspec.trigger_phrase": "zwx",
}


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tensors() -> dict[str, torch.Tensor]:
    return {
        f"{ATTN}.lora_down.weight": numbers(4, 32), f"{ATTN}.lora_up.weight": numbers(16, 4),
        f"{ATTN}.alpha": torch.tensor(2.0),
        f"{CONV}.lora_down.weight": numbers(2, 8, 3, 3), f"{CONV}.lora_up.weight": numbers(16, 2, 1, 1),
        f"{CONV}.alpha": torch.tensor(1.0),
        f"{TEXT}.lora_down.weight": numbers(8, 32), f"{TEXT}.lora_up.weight": numbers(64, 8),
    }  # fmt: skip


def shown(path: Path, width: int = 100) -> str:
    console = Console(width=width, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(adapter_tables.report_page(inspect(path)))
    return console.export_text()


def test_the_norm_of_a_lora_equals_that_of_the_dense_product():
    up, down = numbers(48, 6), numbers(6, 32)
    assert norm(Module("lora", {"lora_up": up, "lora_down": down}, 3.0)) == pytest.approx(
        float(torch.linalg.matrix_norm(0.5 * up.double() @ down.double())), rel=1e-9
    )
    up, down = numbers(48, 6, 1, 1), numbers(6, 32, 3, 3)
    dense = torch.nn.functional.conv2d(down.permute(1, 0, 2, 3).double(), up.double())
    assert norm(Module("lora", {"lora_up": up, "lora_down": down}, None)) == pytest.approx(
        float(dense.norm()), rel=1e-9
    )
    middle = numbers(6, 6, 3, 3)
    parts = {"lora_up": up, "lora_down": numbers(6, 32, 1, 1), "lora_mid": middle}
    dense = torch.einsum("oi,ijhw,jn->onhw", up[..., 0, 0], middle, parts["lora_down"][..., 0, 0])
    assert norm(Module("lora", parts, 6.0)) == pytest.approx(float(dense.norm()), rel=1e-5)


def test_the_norm_of_fp16_factors_neither_overflows_nor_underflows():
    for size in (300.0, 1e-4):
        up, down = (size * numbers(64, 4)).half(), (size * numbers(4, 64)).half()
        dense = float((up.double() @ down.double()).norm())
        assert norm(Module("lora", {"lora_up": up, "lora_down": down}, 4.0)) == pytest.approx(dense, rel=1e-9)


def test_the_norms_of_loha_and_lokr_equal_those_of_the_dense_products():
    parts = {"hada_w1_a": numbers(24, 3), "hada_w1_b": numbers(3, 32), "hada_w2_a": numbers(24, 3)}
    parts["hada_w2_b"] = numbers(3, 32) + 1
    dense = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    assert norm(Module("loha", parts, 3.0)) == pytest.approx(float(dense.norm()), rel=1e-5)
    parts = {"lokr_w1": numbers(4, 4), "lokr_w2_a": numbers(8, 2), "lokr_w2_b": numbers(2, 6)}
    dense = 0.5 * torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
    assert norm(Module("lokr", parts, 1.0)) == pytest.approx(float(dense.norm()), rel=1e-5)


def test_hashes_equal_those_of_hashlib_and_a_modified_file_is_reported(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write_adapter(tensors(), METADATA, path)
    data = path.read_bytes()
    model_hash = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    report = inspect(path)
    assert report.hashes.a1111 == model_hash[:12] and report.hashes.stored == model_hash
    assert report.hashes.auto_v2 == hashlib.sha256(data).hexdigest()[:10]
    assert "modified after it was written" not in shown(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "modified after it was written" in shown(path)


def test_the_report_has_parts_trigger_words_and_settings(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write_adapter(tensors(), METADATA, path)
    report = inspect(path)
    assert (report.family, report.network, report.dialect, report.dtypes) == ("sd1", "lora", "kohya", ("float32",))
    assert [(group.label, group.modules, group.ranks, group.alphas) for group in report.groups] == [
        ("text encoder", 1, (8,), (None,)), ("UNet", 1, (4,), (2.0,)), ("UNet convolutions", 1, (2,), (1.0,)),
    ]  # fmt: skip
    assert report.trigger == "zwx" and report.tags == (("tree", 7), ("zwx", 5))
    assert report.settings == {"base": "my.safetensors", "learning rate (UNet)": "0.0001"}
    assert [match.matched for match in report.uis] == [3] * 5
    text = shown(path)
    assert all(
        word in text
        for word in ("LoRA for Stable Diffusion 1", "zwx (5)", "text encoder layers 4-7", "up_blocks.1", "3 / 3")
    )


def test_blocks_add_squared_norms_and_are_listed_in_forward_order(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write_adapter(tensors() | {f"{ATTN[:-1]}k.lora_{end}.weight": numbers(4, 4) for end in ("up", "down")}, {}, path)
    norms = inspect(path).norms
    blocks = block_norms(norms)
    assert list(blocks) == ["text encoder layers 4-7", "UNet down 0", "UNet up 1"]
    squares = [size**2 for layer, size in norms.items() if "down_blocks" in layer.path]
    assert blocks["UNet down 0"] == (pytest.approx(sum(squares) ** 0.5), 2)
    assert block_of(ModulePath("unet", "mid_block.attentions.0.proj_in")) == "UNet mid"
    assert block_of(ModulePath("text2", "encoder.layers.31.mlp.fc1")) == "text encoder 2 layers 28-31"


def test_the_longest_block_names_leave_room_for_full_bars_in_80_columns(tmp_path: Path):
    deltas = {
        "lora_te2_text_model_encoder_layers_31_mlp_fc1": 4.0,
        "lora_unet_time_embed_0": 1.0,
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": 2.0,
    }
    parts = {}
    for stem, size in deltas.items():
        down, up = torch.zeros(1, 2048), torch.ones(1, 1)
        down[0, 0] = 500 * size
        parts |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    write_adapter(parts, {}, tmp_path / "x.safetensors")
    lines = shown(tmp_path / "x.safetensors", width=80).splitlines()
    bars = {line.split("  ")[0]: line.count("█") for line in lines if "█" in line}
    assert bars == {"text encoder 2 layers 28-31": 16, "UNet time embedding": 4, "UNet down 1": 8}
    assert "2,000" in "".join(lines) and max(map(len, lines)) <= 80


def test_many_ranks_are_shown_as_a_range(tmp_path: Path):
    parts = {}
    for rank in range(1, 12):
        stem = TEXT.replace("5", str(rank - 1))
        parts |= {f"{stem}.lora_down.weight": numbers(rank, 32), f"{stem}.lora_up.weight": numbers(64, rank)}
    save_file(parts, tmp_path / "x.safetensors")
    assert "1 to 11 (11 values)  none (scale 1)" in shown(tmp_path / "x.safetensors", width=80)
    save_file(tensors(), tmp_path / "x.safetensors")
    assert "UNet                     1  4" in shown(tmp_path / "x.safetensors", width=80)


def test_modules_with_zero_or_non_finite_values_are_named(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    parts = tensors()
    parts[f"{ATTN}.lora_up.weight"].zero_()
    parts[f"{CONV}.lora_down.weight"][0, 0, 0, 0] = float("nan")
    save_file(parts, path)
    report = inspect(path)
    assert [layer.path for layer in report.broken] == ["up_blocks.1.resnets.0.conv1"]
    assert [layer.path.rpartition(".")[2] for layer in report.zero] == ["to_q"]
    text = shown(path, width=200)
    assert "1 module with non-finite values: unet.up_blocks.1.resnets.0.conv1" in text
    assert "1 module without effect (all zeros)" in text


def test_untrusted_metadata_is_printed_as_plain_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "x.safetensors"
    evil = {"modelspec.trigger_phrase": "[red]a[/] \x1b[2J\nb", "ss_tag_frequency": '{"a": [1]}'}
    save_file(tensors(), path, evil)
    text = shown(path)
    assert "[red]a[/]  [2J b" in text and "\x1b" not in text
    assert inspect(path).tags == ()
    save_file({"\x1b[31m\nred": torch.ones(1)}, path)
    with pytest.raises(SystemExit):
        cli.main(["adapter", "inspect", str(path)])
    assert capsys.readouterr().err == f"scumble: {path}: 1 of 1 keys are not adapter keys, first  [31m red\n"


def test_the_command_prints_json_without_loading_diffusers_and_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "x.safetensors"
    write_adapter(tensors(), METADATA, path)
    script = (
        "import sys\nfrom scumble.trainer import cli\n"
        f"cli.main(['adapter', 'inspect', '--json', {str(path)!r}, {str(path)!r}])\n"
        "print([m for m in ('diffusers', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second, loaded = done.stdout.splitlines()
    report = json.loads(first)
    assert first == second and loaded == "[]"
    assert report["hashes"]["stored_is_true"] and report["uis"]["Forge"] == {"matched": 3, "total": 3, "refusal": ""}
    for arguments, line in (
        ([], "adapter inspect: name at least one adapter file"),
        ([str(tmp_path / "none.safetensors")], "cannot be read (No such file or directory)"),
        ([str(tmp_path)], "is a folder; name a .safetensors file in it"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["adapter", "inspect", *arguments])
        assert line in capsys.readouterr().err
