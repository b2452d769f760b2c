"""How much memory does a training step take on a device, with fewer activations kept, and fewer bits?

`python tests/benchmarks/memory.py` counts it without a device, on fake tensors, which have shapes and no numbers: our
UNet, adapter and products run forward and backward, and the storages alive at once are added up, each in blocks of
512 bytes as CUDA's allocator has them. Workspaces of libraries, fragmentation and the context of CUDA itself come on
top, 0.5 to 1 GB together. Writes results/memory.md.

`--device cuda` measures the same on a GPU, with steps captured and optimised as in a run: the memory that torch's
allocator handed out, and the memory that it took from the GPU. Writes results/memory-cuda.md; on a simulated GPU
(tests/benchmarks/simulated_card), where cuDNN has no workspaces, results/memory-simulated.md.
"""

import argparse
import gc
import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from speed import LAYOUTS, RANK, Bench, Layout
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from scumble.trainer.adapters.targets import ATTENTION
from scumble.trainer.base_model.detect import BASES
from scumble.trainer.base_model.one_block import place_together
from scumble.trainer.base_model.quantize import PACKINGS, quantize
from scumble.trainer.kernels.cuda_graphs import own_stream
from scumble.trainer.kernels.lora_matmul import use_fast_lora
from scumble.trainer.training.checkpointing import recompute_unet
from scumble.trainer.training.flat_parameters import Flat
from scumble.trainer.training.lora import ADAPTER

BLOCK, STEPS = 512, 4
CPU = torch.device("cpu")
RECOMPUTED = {"kept": (), "some recomputed": (True,), "all recomputed": (False,)}
MOMENT_BYTES = {"AdamW": 8, "8-bit AdamW": 2 + 8 / 256}  # of a parameter; 8 bits have a scale for each 256


class Alive(TorchDispatchMode):
    """Adds up the storages of tensors that operators give, while they are alive; the most at once is `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)
        return tensor

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(torch.Tensor, self.add, func(*args, **(kwargs or {})))


def as_large_as_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Two weights a byte and a byte of scale for each 64, without numbers, which bitsandbytes would look at."""
    return torch.empty(weight.numel() // 2 + weight.numel() // 64, dtype=torch.uint8), weight.shape


@dataclass(frozen=True)
class Counted:
    """Bytes of all weights and of the most that is there at once, trained parameters, FLOP where they were counted."""

    weights: int
    peak: int
    trained: int
    flops: float


def step(layout: Layout, recompute: tuple[bool, ...], bits: int, counts_flops: bool = False) -> Counted:
    """A pass at batch 1, forward and backward."""
    config = json.loads((BASES / layout.config / "unet/config.json").read_text(encoding="utf-8"))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{name: value for name, value in config.items() if not name.startswith("_")})
        unet.requires_grad_(False).train()
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION), unet, ADAPTER)
    torch.set_default_dtype(torch.float32)
    alive = Alive()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in unet.modules():
            for name, weight in module.named_parameters(recurse=False):
                trained = "lora_" in name or weight.requires_grad
                dtype = torch.float32 if trained else torch.bfloat16
                module.register_parameter(name, torch.nn.Parameter(torch.empty(weight.shape, dtype=dtype), trained))
        if bits < 16:
            with patch.dict(
                PACKINGS, {4: (as_large_as_nf4, lambda packed, shape, dtype: torch.empty(shape, dtype=dtype))}
            ):
                quantize(unet, bits, CPU, unet)
        for only_shallow in recompute:
            recompute_unet(unet, only_shallow)
        side, width = layout.side_px // layout.latent_px, config["cross_attention_dim"]
        parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        with alive:
            for tensor in [*unet.parameters(), *unet.buffers()]:
                alive.add(tensor)
            flat = Flat([parameters], torch.bfloat16)
            use_fast_lora([module for module in unet.modules() if hasattr(module, "lora_A")], ADAPTER, flat.lowered)
            weights = alive.now
            added = {"text_embeds": torch.empty(1, 1280, dtype=torch.bfloat16), "time_ids": torch.empty(1, 6)}
            noisy = torch.empty(1, 4, side, side, dtype=torch.bfloat16)
            hidden = torch.empty(1, 77, width, dtype=torch.bfloat16)
            timesteps = torch.zeros(1, dtype=torch.long)
            counter = FlopCounterMode(display=False)  # holds on to tensors, so memory is counted without it
            if counts_flops:
                counter.__enter__()
            loss = unet(noisy, timesteps, hidden, added_cond_kwargs=added).sample.float().square().mean()
            loss.backward()
            if counts_flops:
                counter.__exit__(None, None, None)
    trained = sum(parameter.numel() for parameter in parameters)
    return Counted(weights, alive.peak, trained, float(counter.get_total_flops()))


@dataclass(frozen=True)
class Measured:
    """The most MiB that torch's allocator handed out, and took from the GPU, in some steps."""

    allocated: int
    reserved: int


def measured(layout: Layout, recompute: tuple[bool, ...], bits: int, optimizer: str) -> Measured:
    """Of a run that has only UNet, adapter and the benchmark's latents on the GPU."""
    device = torch.device("cuda")
    config = json.loads((BASES / layout.config / "unet/config.json").read_text(encoding="utf-8"))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{name: value for name, value in config.items() if not name.startswith("_")})
    torch.set_default_dtype(torch.float32)
    unet.to_empty(device="cpu").requires_grad_(False)
    with own_stream(device):
        if bits < 16:
            quantize(unet, bits, device, unet)
        place_together(unet, device)
        bench = Bench(layout, 1, device, torch.bfloat16, unet)
        take = bench.ours("", recompute[0] if recompute else None, unet, optimizer)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for number in range(STEPS):
            take(number)
    return Measured(torch.cuda.max_memory_allocated() // 2**20, torch.cuda.max_memory_reserved() // 2**20)


def measure(layouts: Sequence[str]) -> None:
    """A table of what is measured."""
    gpu = torch.cuda.get_device_name()
    lines = [
        "# Memory of a training step, measured", "",
        f"{gpu}, torch {torch.__version__}. UNet LoRA of rank {RANK}, batch 1, bf16, frozen text encoders and VAE",
        f"waiting: the most in {STEPS} steps, the first of them captured. Taken is what torch's allocator has of it.",
        "CUDA's own context comes on top, and on a simulated GPU cuDNN's workspaces.", "",
        "| layout | activations | base, bits | optimiser | given away, MiB | taken, MiB |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    has_bitsandbytes = find_spec("bitsandbytes") is not None
    for name in layouts:
        for bits, optimizer in ((16, "adamw"), (16, "adamw8bit"), (8, "adamw"), (4, "adamw")):
            if (bits == 4 or optimizer == "adamw8bit") and not has_bitsandbytes:
                continue
            for label, recompute in RECOMPUTED.items():
                found = measured(LAYOUTS[name], recompute, bits, optimizer)
                lines.append(
                    f"| {name}, {LAYOUTS[name].side_px} px | {label} | {bits} | {optimizer} | {found.allocated:,} "
                    f"| {found.reserved:,} |"
                )
                print(lines[-1], flush=True)
                gc.collect()
                torch.cuda.empty_cache()
    file = "memory-simulated.md" if "simulated" in gpu else "memory-cuda.md"
    (Path(__file__).parent / "results" / file).write_text("\n".join([*lines, ""]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["sd15", "sdxl"])
    parser.add_argument("--device", choices=["fake", "cuda"], default="fake")
    chosen = parser.parse_args()
    if chosen.device == "cuda":
        measure(chosen.layouts)
        return
    lines = [
        "# Memory of a training step", "",
        f"UNet LoRA of rank {RANK}, batch 1, bf16, frozen text encoders and VAE waiting; counted on fake tensors by",
        "`tests/benchmarks/memory.py`, so without workspaces, fragmentation and CUDA's own 0.5 to 1 GiB.", "",
        "| layout | activations | base, bits | weights, MiB | with AdamW, MiB | with 8-bit AdamW, MiB | TFLOP a step |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in chosen.layouts:
        layout = LAYOUTS[name]
        for bits in (16, 8, 4):
            for label, recompute in RECOMPUTED.items():
                counted = step(layout, recompute, bits)
                flops = f"{step(layout, recompute, bits, True).flops / 1e12:.2f}" if bits == 16 else "as above"
                totals = [f"{(counted.peak + counted.trained * each) / 2**20:,.0f}" for each in MOMENT_BYTES.values()]
                lines.append(
                    f"| {name}, {layout.side_px} px | {label} | {bits} | {counted.weights / 2**20:,.0f} "
                    f"| {' | '.join(totals)} | {flops} |"
                )
                print(lines[-1], flush=True)
    (Path(__file__).parent / "results/memory.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
