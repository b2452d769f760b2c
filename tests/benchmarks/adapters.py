"""Time and memory of inspect, resize, merge, bake and verify at the real size of SDXL.

`python tests/benchmarks/adapters.py` writes random LoRAs of rank 64 in fp16 for all 722 attention, feed-forward and
projection layers of SDXL's UNet, and an fp16 checkpoint to bake into (UNet, text encoders and VAE, 6.9 GB of random
weights; only the middle block with `--bake reduced` or if the disk is too full). It runs each tool in a separate
process, and times the SVD through the factors against a dense SVD on one layer of each shape. Writes
results/adapters.md. `--base FILE` bakes into that checkpoint instead.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from scumble.configs.options import Model
from scumble.trainer.adapters.adapter import Adapter, read_adapter, to_tensors
from scumble.trainer.adapters.bake import BakedAdapter, bake
from scumble.trainer.adapters.files import write_adapter
from scumble.trainer.adapters.forward_check import checked_by_layer
from scumble.trainer.adapters.inspect import inspect
from scumble.trainer.adapters.keys import ModulePath, sgm_path
from scumble.trainer.adapters.lowrank import Rule, svd_of_factors
from scumble.trainer.adapters.merge import Input, Recipe, merge
from scumble.trainer.adapters.module import Module
from scumble.trainer.adapters.provenance import write_result
from scumble.trainer.adapters.resize import resize
from scumble.trainer.adapters.targets import FULL
from scumble.trainer.adapters.weights import Weights, find_weights
from scumble.trainer.base_model.detect import detect_base
from scumble.trainer.system.safetensors_header import Entry, header_bytes

HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs/bases/sdxl"
RANK = 64
TASKS = {
    "read": "read only",
    "inspect": "inspect",
    "resize-rank": "resize to rank 16",
    "resize-energy": "resize, 90 % of the energy",
    "merge-linear": "merge two, exact (rank 128)",
    "merge-svd": "merge two, svd to rank 64",
    "bake": "bake into {base}",
    "verify": "verify on that checkpoint, layer by layer",
    "resize-dora": "resize a DoRA to a LoRA of rank 16",
    "merge-dora": "merge a DoRA with a LoRA, svd to rank 64",
    "bake-dora": "bake a DoRA into that checkpoint",
}


def config(part: str) -> dict[str, Any]:
    return json.loads((CONFIGS / part / "config.json").read_text())


def shapes() -> dict[str, torch.Size]:
    """Shapes of all weights of SDXL's UNet, without allocating them."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config("unet"))
    return {name: tensor.shape for name, tensor in unet.state_dict().items()}


def other_shapes() -> dict[str, torch.Size]:
    """Shapes of the weights of SDXL's text encoders and VAE, which baking only copies, under checkpoint prefixes."""
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "conditioner.embedders.0.transformer": CLIPTextModel(
                CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder")
            ),
            "conditioner.embedders.1.model": CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder_2")),
            "first_stage_model": AutoencoderKL.from_config(config("vae")),
        }
    return {f"{prefix}.{name}": one.shape for prefix, part in parts.items() for name, one in part.state_dict().items()}


def layers(known: dict[str, torch.Size]) -> dict[ModulePath, torch.Size]:
    paths = {name.removesuffix(".weight"): shape for name, shape in known.items() if name.endswith(".weight")}
    return {ModulePath("unet", path): shape for path, shape in paths.items() if re.fullmatch(FULL, path)}


def draw_adapter(known: dict[str, torch.Size], path: Path, seed: int, dora_base: Weights | None = None) -> None:
    """Write a LoRA whose singular values decay like those of a trained one, by a factor of e^-3 over its ranks.

    With a base, write a DoRA whose magnitudes differ by about 2 % from the norms of the base's columns.
    """
    generator = torch.Generator().manual_seed(seed)
    decay = torch.linspace(0, -3, RANK).exp()[:, None]
    modules = {}
    for layer, (out, inputs) in layers(known).items():
        down = torch.randn(RANK, inputs, generator=generator) * decay
        up = 0.01 * torch.randn(out, RANK, generator=generator)
        tensors = {"lora_down": down.half(), "lora_up": up.half()}
        if dora_base:
            norms = dora_base.read(layer).float().norm(dim=0, keepdim=True)
            tensors["dora_scale"] = norms * (1 + 0.02 * torch.randn(1, inputs, generator=generator))
        modules[layer] = Module("lora", tensors, float(RANK))
    write_adapter(to_tensors(Adapter(modules, {}, "sdxl")), {"ss_base_model_version": "sdxl_base_v1-0"}, path)


def draw_base(known: dict[str, torch.Size], path: Path, whole: bool) -> None:
    """Stream an fp16 checkpoint with LDM names to disk: the whole model, or only the UNet's middle block."""
    adapted = layers(known)
    named = {}
    for name, shape in known.items():
        stem = name.removesuffix(".weight")
        if whole or name.startswith("mid_block"):
            theirs = sgm_path(stem) + ".weight" if ModulePath("unet", stem) in adapted else name
            named[f"model.diffusion_model.{theirs}"] = shape
    entries, position = {}, 0
    for name, shape in (named | (other_shapes() if whole else {})).items():
        entries[name] = Entry("F16", tuple(shape), position, position + 2 * shape.numel()).to_json()
        position += 2 * shape.numel()
    noise = (0.02 * torch.randn(8 * 2**20, generator=torch.Generator().manual_seed(0))).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(header_bytes(entries, {"format": "pt"}))
        while position:
            file.write(noise[: min(len(noise), position)])
            position -= min(len(noise), position)


def run_task(task: str, folder: Path, base: Path) -> None:
    """Run one tool from file to file in this process, and print its seconds and peak memory in MiB as JSON."""
    start = time.perf_counter()
    out = folder / "out.safetensors"
    tool, _, how = task.partition("-")
    file = folder / ("dora.safetensors" if how == "dora" else "a.safetensors")
    if tool == "inspect":
        inspect(file)
    else:
        adapter = read_adapter(file)
    weights = find_weights(base) if how == "dora" else None
    if tool == "bake":
        is_reduced = base.name == "reduced.safetensors"
        fitting = {p: m for p, m in adapter.modules.items() if not is_reduced or p.block == "mid_block"}
        bake(base, out, [BakedAdapter("a", Adapter(fitting, {}, "sdxl"), 0.8)])
    elif tool == "verify":
        checks = list(checked_by_layer(detect_base(Model(base=str(base))), find_weights(base), adapter, file))
        assert len(checks) == len(adapter.modules) and all(check.agrees for check in checks)
    elif tool == "resize":
        result = resize(adapter, Rule(energy=0.9) if how == "energy" else Rule(16), "a", weights)
    elif tool == "merge":
        inputs = [Input("a", adapter, 0.7), Input("b", read_adapter(folder / "b.safetensors"), 0.5)]
        result = merge(inputs, Recipe("svd", RANK) if how == "dora" else Recipe(how), weights)
    if tool in ("resize", "merge"):
        write_result(result, [adapter], out, "benchmark", force=True)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mib(), "out_mib": size_mib(out) if out.exists() else 0}))


def peak_mib() -> int:
    """Peak memory of this process (Linux). getrusage would include the peak of the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def size_mib(path: Path) -> int:
    return path.stat().st_size // 2**20


def svd_rows(known: dict[str, torch.Size]) -> list[str]:
    """For one layer of each shape: seconds of both SVDs, their ratio, and the difference of the singular values."""
    rows, counts = [], {}
    for shape in layers(known).values():
        counts[shape] = counts.get(shape, 0) + 1
    for (out, inputs), count in sorted(counts.items(), key=lambda item: item[0].numel()):
        generator = torch.Generator().manual_seed(0)
        up, down = torch.randn(out, RANK, generator=generator), torch.randn(RANK, inputs, generator=generator)
        svd_of_factors(up, down)
        start = time.perf_counter()
        factored = svd_of_factors(up, down).s
        middle = time.perf_counter()
        dense = torch.linalg.svd(up @ down, full_matrices=False).S
        end = time.perf_counter()
        difference = float((factored - dense[:RANK]).abs().max() / dense[0])
        rows.append(
            f"| {out} x {inputs} | {count} | {middle - start:.3f} | {end - middle:.2f} "
            f"| {(end - middle) / (middle - start):.0f} | {difference:.0e} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bake", choices=["whole", "reduced"], default="whole")
    parser.add_argument("--base", type=Path, help="bake into this SDXL checkpoint")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.task:
        run_task(options.task, options.folder, options.base)
        return
    known = shapes()
    assert len(layers(known)) == 722
    with TemporaryDirectory() as name:
        folder = Path(name)
        whole = options.bake == "whole" and shutil.disk_usage(folder).free > 20 * 2**30
        base = options.base or folder / ("whole.safetensors" if whole else "reduced.safetensors")
        label = options.base.name if options.base else "a full checkpoint, fp16" if whole else "the middle block, fp16"
        for seed, letter in enumerate("ab"):
            draw_adapter(known, folder / f"{letter}.safetensors", seed)
        if not options.base:
            draw_base(known, base, whole)
        if base.name != "reduced.safetensors":
            draw_adapter(known, folder / "dora.safetensors", 2, find_weights(base))
        lines = [
            f"LoRA of rank {RANK} for {len(layers(known))} layers of SDXL's UNet, fp16, "
            f"{size_mib(folder / 'a.safetensors')} MiB; one thread of a shared CPU.",
            "",
            "| task, including file I/O | seconds | peak memory, MiB | result, MiB |",
            "|---|---|---|---|",
        ]
        for task, text in TASKS.items():
            if base.name == "reduced.safetensors" and (task == "verify" or task.endswith("-dora")):
                continue  # they need the whole UNet
            command = [sys.executable, __file__, "--task", task, "--folder", folder, "--base", base]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            (folder / "out.safetensors").unlink(missing_ok=True)
            title = text.format(base=f"{label} ({size_mib(base):,} MiB)")
            lines.append(f"| {title} | {result['seconds']:.1f} | {result['peak_mib']:,} | {result['out_mib']:,} |")
            print(lines[-1], flush=True)
    lines += [
        "",
        f"SVD of one layer's product of rank {RANK} in fp32: through the factors, and dense.",
        "",
        "| layer | number of layers | by factors, s | dense, s | ratio | difference of values |",
        "|---|---|---|---|---|---|",
        *svd_rows(known),
    ]
    report = HERE / "results/adapters.md"
    report.parent.mkdir(exist_ok=True)
    report.write_text("# Adapter tools at the size of SDXL\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
