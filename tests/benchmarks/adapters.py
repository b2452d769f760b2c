"""How long do inspecting, resizing, merging, baking and verifying take at SDXL's real size, and in how much memory?

`python tests/benchmarks/adapters.py` draws LoRAs of rank 64 in fp16 for all 722 attention, feed-forward and projection
layers of SDXL's UNet, and a checkpoint in fp16 to bake into (UNet, text encoders and VAE, 6.9 GB of random weights; the
middle block alone with `--bake reduced`, or where the disk is too full), runs each tool in a process of its own, and
times the SVD through the factors against the dense one on one layer of each shape. Writes results/adapters.md.
`--base FILE` bakes into that checkpoint instead.
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
    "read": "only read it",
    "inspect": "inspect it",
    "resize-rank": "resize to rank 16",
    "resize-energy": "resize, 90 % of the energy",
    "merge-linear": "merge two, exact (rank 128)",
    "merge-svd": "merge two, svd to rank 64",
    "bake": "bake into {base}",
    "verify": "verify it on that checkpoint, layer by layer",
    "resize-dora": "resize a DoRA to a LoRA of rank 16",
    "merge-dora": "merge a DoRA with a LoRA, svd to rank 64",
    "bake-dora": "bake a DoRA into that checkpoint",
}


def config(part: str) -> dict[str, Any]:
    return json.loads((CONFIGS / part / "config.json").read_text())


def shapes() -> dict[str, torch.Size]:
    """Shapes of all weights of SDXL's UNet; nothing is allocated."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config("unet"))
    return {name: tensor.shape for name, tensor in unet.state_dict().items()}


def other_shapes() -> dict[str, torch.Size]:
    """Shapes of the weights of SDXL's text encoders and its VAE, which are copied, under prefixes of a checkpoint."""
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
    """A LoRA whose singular values fall like those of a trained one, by a factor e^-3 over its ranks.

    With a base it is a DoRA, whose magnitudes are about 2 % off the lengths of the base's columns.
    """
    generator = torch.Generator().manual_seed(seed)
    fall = torch.linspace(0, -3, RANK).exp()[:, None]
    modules = {}
    for place, (out, inputs) in layers(known).items():
        down = torch.randn(RANK, inputs, generator=generator) * fall
        up = 0.01 * torch.randn(out, RANK, generator=generator)
        tensors = {"lora_down": down.half(), "lora_up": up.half()}
        if dora_base:
            lengths = dora_base.read(place).float().norm(dim=0, keepdim=True)
            tensors["dora_scale"] = lengths * (1 + 0.02 * torch.randn(1, inputs, generator=generator))
        modules[place] = Module("lora", tensors, float(RANK))
    write_adapter(to_tensors(Adapter(modules, {}, "sdxl")), {"ss_base_model_version": "sdxl_base_v1-0"}, path)


def draw_base(known: dict[str, torch.Size], path: Path, whole: bool) -> None:
    """A checkpoint in fp16 under LDM's names, streamed; where it is not `whole`, the UNet's middle block alone."""
    wanted = layers(known)
    named = {}
    for name, shape in known.items():
        stem = name.removesuffix(".weight")
        if whole or name.startswith("mid_block"):
            theirs = sgm_path(stem) + ".weight" if ModulePath("unet", stem) in wanted else name
            named[f"model.diffusion_model.{theirs}"] = shape
    entries, position = {}, 0
    for name, shape in (named | (other_shapes() if whole else {})).items():
        entries[name] = Entry("F16", tuple(shape), position, position + 2 * shape.numel()).told()
        position += 2 * shape.numel()
    noise = (0.02 * torch.randn(8 * 2**20, generator=torch.Generator().manual_seed(0))).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(header_bytes(entries, {"format": "pt"}))
        while position:
            file.write(noise[: min(len(noise), position)])
            position -= min(len(noise), position)


def run_task(task: str, folder: Path, base: Path) -> None:
    """One tool from file to file, in this process; prints seconds and the peak of its memory in MiB."""
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
        in_it = {
            p: m for p, m in adapter.modules.items() if base.name != "reduced.safetensors" or p.block == "mid_block"
        }
        bake(base, out, [BakedAdapter("a", Adapter(in_it, {}, "sdxl"), 0.8)])
    elif tool == "verify":
        trials = list(checked_by_layer(detect_base(Model(base=str(base))), find_weights(base), adapter, file))
        assert len(trials) == len(adapter.modules) and all(trial.agrees for trial in trials)
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
    """The most memory this process had (Linux); getrusage would begin with the peak of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def size_mib(path: Path) -> int:
    return path.stat().st_size // 2**20


def svd_rows(known: dict[str, torch.Size]) -> list[str]:
    """For one layer of each shape: seconds of either SVD, their ratio, and how far the singular values are apart."""
    rows, counts = [], {}
    for shape in layers(known).values():
        counts[shape] = counts.get(shape, 0) + 1
    for (out, inputs), count in sorted(counts.items(), key=lambda item: item[0].numel()):
        generator = torch.Generator().manual_seed(0)
        up, down = torch.randn(out, RANK, generator=generator), torch.randn(RANK, inputs, generator=generator)
        svd_of_factors(up, down)
        start = time.perf_counter()
        quick = svd_of_factors(up, down).s
        middle = time.perf_counter()
        dense = torch.linalg.svd(up @ down, full_matrices=False).S
        end = time.perf_counter()
        apart = float((quick - dense[:RANK]).abs().max() / dense[0])
        rows.append(
            f"| {out} x {inputs} | {count} | {middle - start:.3f} | {end - middle:.2f} "
            f"| {(end - middle) / (middle - start):.0f} | {apart:.0e} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bake", choices=["whole", "reduced"], default="whole")
    parser.add_argument("--base", type=Path, help="bake into this checkpoint of SDXL")
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
        told = options.base.name if options.base else "a whole checkpoint, fp16" if whole else "the middle block, fp16"
        for seed, letter in enumerate("ab"):
            draw_adapter(known, folder / f"{letter}.safetensors", seed)
        if not options.base:
            draw_base(known, base, whole)
        if base.name != "reduced.safetensors":
            draw_adapter(known, folder / "dora.safetensors", 2, find_weights(base))
        lines = [
            f"LoRA of rank {RANK} for {len(layers(known))} layers of SDXL's UNet, fp16, "
            f"{size_mib(folder / 'a.safetensors')} MiB; one thread of a CPU that other work shares.",
            "",
            "| from file to file | seconds | peak memory, MiB | result, MiB |",
            "|---|---|---|---|",
        ]
        for task, words in TASKS.items():
            if base.name == "reduced.safetensors" and (task == "verify" or task.endswith("-dora")):
                continue  # they need the whole UNet
            command = [sys.executable, __file__, "--task", task, "--folder", folder, "--base", base]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            (folder / "out.safetensors").unlink(missing_ok=True)
            what = words.format(base=f"{told} ({size_mib(base):,} MiB)")
            lines.append(f"| {what} | {found['seconds']:.1f} | {found['peak_mib']:,} | {found['out_mib']:,} |")
            print(lines[-1], flush=True)
    lines += [
        "",
        f"SVD of one layer's product of rank {RANK}, fp32: through the factors, and dense.",
        "",
        "| layer | such layers | by factors, s | dense, s | ratio | values apart |",
        "|---|---|---|---|---|---|",
        *svd_rows(known),
    ]
    report = HERE / "results/adapters.md"
    report.parent.mkdir(exist_ok=True)
    report.write_text("# Tools for adapters at SDXL's size\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
