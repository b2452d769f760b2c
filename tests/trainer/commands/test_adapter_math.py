"""Adapter commands on real files: results, metadata, messages, and refused arguments."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cyclopts import App, CycloptsError
from safetensors import safe_open

from scumble.configs.errors import Refused
from scumble.trainer.adapters.adapter import Adapter, Module, read_adapter, to_tensors
from scumble.trainer.adapters.files import write_adapter
from scumble.trainer.adapters.keys import ModulePath
from scumble.trainer.adapters.weights import find_weights
from scumble.trainer.base_model.detect import EMBEDDED
from scumble.trainer.commands import adapter_math

app = App()
for command in (adapter_math.merge, adapter_math.resize, adapter_math.extract, adapter_math.bake):
    app.command(command)


def run(*arguments: object) -> None:
    app([str(argument) for argument in arguments], exit_on_error=False, print_error=False, result_action="return_value")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of rank 4 for the embedded base."""
    folder = tmp_path_factory.mktemp("commands")
    weights = find_weights(EMBEDDED)
    for seed, name in enumerate(("clay", "paper")):
        generator = torch.Generator().manual_seed(seed)
        modules = {}
        for layer in sorted(weights.layers):
            if layer.path.endswith(("attn1.to_q", "attn2.to_v")):
                out, inputs = weights.read(layer).shape
                down = torch.randn(4, inputs, generator=generator)
                up = 0.02 * torch.randn(out, 4, generator=generator)
                modules[layer] = Module("lora", {"lora_down": down, "lora_up": up}, 4.0)
        metadata = {"ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": name}
        write_adapter(to_tensors(Adapter(modules)), metadata, folder / f"{name}.safetensors")
    return folder


def test_merge_writes_the_weighted_sum_and_records_its_inputs(folder: Path):
    out = folder / "both.safetensors"
    run("merge", folder / "clay.safetensors", folder / "paper.safetensors", "--out", out, "--weights", 0.7, -0.5,
        "--blocks", "mid_block=0.5", "2:up_blocks.0=0")  # fmt: skip
    clay, paper, both = (read_adapter(folder / f"{name}.safetensors") for name in ("clay", "paper", "both"))
    for layer, module in both.modules.items():
        factor = 0.5 if layer.block == "mid_block" else 1.0
        second = 0.0 if layer.block == "up_blocks.0" else -0.5 * factor
        expected = 0.7 * factor * clay.modules[layer].delta() + second * paper.modules[layer].delta()
        torch.testing.assert_close(module.delta(), expected, rtol=1e-4, atol=1e-4)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    comment = metadata["ss_training_comment"]
    assert comment.startswith("merged with scumble (linear): clay x 0.7 {mid_block: 0.5}, paper x -0.5 {")
    assert metadata["modelspec.trigger_phrase"] == "clay, paper" and metadata["ss_network_dim"] == "8"
    assert not any(str(folder) in value for value in metadata.values())


def test_a_large_exact_sum_is_refused_with_both_sizes_unless_requested(tmp_path: Path):
    layer = ModulePath("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    dense, out = {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.randn(320, 320)}, tmp_path / "out.safetensors"
    for name, module in (("dense", Module("lokr", dense, None)), ("small", loha(rank=4))):
        write_adapter(to_tensors(Adapter({layer: module})), {}, tmp_path / f"{name}.safetensors")
    line = (
        r"dense\.safetensors is LoKr: the exact sum needs full-rank layers \(13\.1 MB, or 328 kB at rank 32\); "
        "use --method svd --rank 32, or --method linear for the exact sum"
    )
    files = tmp_path / "small.safetensors", tmp_path / "dense.safetensors"
    with pytest.raises(Refused, match=rf"/{line}$"):
        run("merge", *files, "--out", out)
    assert not out.exists()
    run("merge", *files, "--out", out, "--method", "svd", "--rank", 32)
    assert out.stat().st_size == pytest.approx(0.3e6, rel=0.1)
    run("merge", *files, "--out", out, "--method", "linear", "--force")
    assert out.stat().st_size == pytest.approx(13.1e6, rel=0.01)
    run("merge", files[0], "--out", out, "--force")  # a LoRA of rank 16
    assert read_adapter(out).modules[layer].rank == 16


def loha(rank: int) -> Module:
    parts = {f"hada_w{n}_{end}": torch.randn(1280, rank) for n in (1, 2) for end in "ab"}
    return Module("loha", {name: x.T if name.endswith("b") else x for name, x in parts.items()}, float(rank))


def test_resize_reports_the_error_of_each_block(folder: Path, capsys: pytest.CaptureFixture[str]):
    out = folder / "small.safetensors"
    run("resize", folder / "clay.safetensors", "--out", out, "--rank", 2)
    printed = capsys.readouterr().out
    assert "mid_block" in printed and "rank 2" in printed and "no layer's rank was reduced" not in printed
    for norm, energy in re.findall(r"relative error +([\d.]+)% \(([\d.]+)% of the energy is lost\)", printed):
        assert float(energy) / 100 == pytest.approx((float(norm) / 100) ** 2, abs=1e-3)
    assert "of the energy is lost" in printed
    assert {module.rank for module in read_adapter(out).modules.values()} == {2}
    with pytest.raises(Refused, match=r"small\.safetensors: file exists; choose another name, or use --force"):
        run("resize", folder / "clay.safetensors", "--out", out, "--rank", 2)
    run("resize", folder / "clay.safetensors", "--out", out, "--energy", 0.9, "--force")
    capsys.readouterr()
    run("resize", folder / "clay.safetensors", "--out", out, "--rank", 9, "--force")
    assert "no layer's rank was reduced; the largest rank is 4" in capsys.readouterr().out


def test_the_error_of_dare_is_explained_as_noise(folder: Path, capsys: pytest.CaptureFixture[str]):
    for method, is_explained in (("dare", True), ("ties", False)):
        run("merge", folder / "clay.safetensors", "--out", folder / "d.safetensors", "--method", method, "--force")
        assert ("dare drops values at random" in capsys.readouterr().out) == is_explained


def test_a_baked_adapter_can_be_extracted_and_subtracted_again(folder: Path, capsys: pytest.CaptureFixture[str]):
    run("bake", folder / "clay.safetensors", "--base", "sketch", "--out", folder / "baked", "--strengths", 0.5)
    size = sum(file.stat().st_size for file in (folder / "baked").rglob("*") if file.is_file())
    assert f"wrote {folder / 'baked'}: {size / 1e6:.1f} MB" in capsys.readouterr().out
    run("extract", folder / "baked", "--base", "sketch", "--out", folder / "found.safetensors", "--rank", 4,
        "--dtype", "fp32")  # fmt: skip
    found, clay = read_adapter(folder / "found.safetensors"), read_adapter(folder / "clay.safetensors")
    assert found.modules.keys() == clay.modules.keys()
    assert found.metadata["ss_training_comment"] == "extracted with scumble (rank 4): baked"
    assert found.metadata["ss_sd_model_name"] == "sketch"
    assert found.metadata["modelspec.prediction_type"] in ("v", "epsilon")
    for layer, module in found.modules.items():
        expected = 0.5 * clay.modules[layer].delta()
        assert float((module.delta() - expected).norm() / expected.norm()) < 0.05  # rounding in the base's dtype
    run("bake", folder / "clay.safetensors", "--base", folder / "baked", "--out", folder / "restored", "--strengths",
        0.5, "--undo")  # fmt: skip
    before, after = find_weights(EMBEDDED), find_weights(folder / "restored")
    for layer in clay.modules:
        torch.testing.assert_close(after.read(layer), before.read(layer), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["merge", "--out", "x.safetensors"], "name at least one adapter file"),
        (["merge", "a", "b", "--out", "x.safetensors", "--weights", "1"], "--weights: got 1 numbers for 2 files"),
        (["merge", "a", "--out", "x.safetensors", "--weights", "1,2"], "--weights: got 2 numbers for 1 files"),
        (["merge", "a", "--out", "x.safetensors", "--weights", "x"], "--weights x: must be numbers, such as 0.7 0.5"),
        (["merge", "a", "--out", "x.safetensors", "--blocks", "3:text=1"], "--blocks 3:text=1: must be BLOCK=FACTOR"),
        (["merge", "a", "--out", "x.safetensors", "--blocks", "text=much"], "--blocks text=much: must be BLOCK=FACTOR"),
        (["merge", "a", "--out", "x.safetensors", "--blocks", "text=inf"], "--blocks text=inf: must be BLOCK=FACTOR"),
        (["merge", "a", "--out", "x.safetensors", "--blocks", "0:text=1"], "--blocks 0:text=1: must be BLOCK=FACTOR"),
        (
            ["merge", "a", "--out", "x.safetensors", "--blocks", "text=1,text=0"],
            "text=0: text is already set to 1",
        ),
        (["merge", "a", "--out", "x.safetensors", "--density", "0.3"], r"--density 0\.3: linear keeps all values; use"),
        (
            ["merge", "a", "--out", "x.safetensors", "--method", "ties", "--seed", "1"],
            "--seed 1: ties uses no random numbers",
        ),
        (["merge", "a", "--out", "/dev/null/x.safetensors"], r"x\.safetensors: cannot be written \(Not a directory\)"),
        (
            ["merge", "x.safetensors", "--out", "x.safetensors", "--force"],
            "--out x.safetensors: is an input of this command",
        ),
        (
            ["bake", "x/a", "--base", "sketch", "--out", "x", "--force"],
            "--out x: contains an input of this command; choose another",
        ),
        (["resize", "a", "--out", "x.pt"], r"--out x\.pt: must end in \.safetensors"),
        (
            ["bake", "a", "--base", "sketch", "--out", "x", "--strengths", "nan"],
            "--strengths nan: must be a finite number",
        ),
    ],
)
def test_invalid_arguments_are_refused_before_a_file_is_read(arguments: list[str], line: str):
    with pytest.raises(Refused, match=line):
        run(*arguments)


def test_block_factors_of_one_file_override_those_of_all_files_in_any_order():
    for values in (["2:text=0", "text=0.5", "mid_block=2"], ["text=0.5,2:text=0,mid_block=2"]):
        assert adapter_math.block_factors(values, 2) == [{"text": 0.5, "mid_block": 2}, {"text": 0, "mid_block": 2}]


def test_a_flag_without_numbers_is_refused(folder: Path):
    with pytest.raises(CycloptsError, match="requires at least 1 element"):
        run("merge", folder / "clay.safetensors", "--weights", "--out", folder / "no.safetensors")


def test_commands_on_files_do_not_import_diffusers(folder: Path):
    clay, out = folder / "clay.safetensors", folder / "quick.safetensors"
    script = "import sys\nfrom scumble.trainer import cli\n"
    for arguments in (["convert", clay], ["merge", clay, clay], ["resize", clay, "--rank", "1"]):
        script += f"cli.main({['adapter', *map(str, arguments), '--out', str(out), '--force']})\n"
    script += f"cli.main({['adapter', 'bake', str(clay), '--base', str(EMBEDDED), '--out', str(folder / 'quick')]})\n"
    script += "sys.exit(str([name for name in ('diffusers', 'transformers', 'peft') if name in sys.modules]) != '[]')"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_defining_the_commands_does_not_import_torch():
    script = "import sys, scumble.trainer.commands.adapter_math; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
