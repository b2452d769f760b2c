"""Memory of a training step, with gradient checkpointing and with a quantized base.

`python tests/benchmarks/memory.py` computes it without a GPU, on fake tensors, which have shapes but no values: the
UNet and the adapter with scumble's LoRA products run forward and backward, and the sizes of all live storages are added
up, each rounded up to 512 bytes as in torch's CUDA allocator. Library workspaces, fragmentation and the CUDA context
are not included; they add 0.5 to 1 GB. Writes results/memory.md.

`--device cuda` measures it on a GPU, with the captures and optimizations of a run: the memory that torch's allocator
has allocated to tensors, and the memory that it has reserved on the GPU. Writes results/memory-cuda.md, or on a
simulated GPU (tests/benchmarks/simulated_card), where cuDNN has no workspaces, results/memory-simulated.md.
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
from scumble.trainer.training.checkpointing import enable_unet_checkpointing
from scumble.trainer.training.flat_parameters import FlatParameters
from scumble.trainer.training.lora import ADAPTER

BLOCK, STEPS = 512, 4
CPU = torch.device("cpu")
CHECKPOINTING = {"off": (), "shallow blocks": (True,), "all blocks": (False,)}
MOMENT_BYTES = {"AdamW": 8, "8-bit AdamW": 2 + 8 / 256}  # per parameter; 8 bits have a scale per 256 values


class LiveStorages(TorchDispatchMode):
    """Adds up the sizes of the live storages that operators return; `peak` is the maximum."""

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


def pack_like_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """A tensor of the size of nf4: two weights per byte and a scale byte per 64. bitsandbytes would read values."""
    return torch.empty(weight.numel() // 2 + weight.numel() // 64, dtype=torch.uint8), weight.shape


@dataclass(frozen=True)
class Counted:
    """Bytes of all weights, peak bytes, number of trained parameters, and FLOP if they were counted."""

    weights: int
    peak: int
    num_trained: int
    flops: float


def count_step(layout: Layout, recompute: tuple[bool, ...], bits: int, counts_flops: bool = False) -> Counted:
    """One forward and backward pass at batch 1."""
    config = json.loads((BASES / layout.config / "unet/config.json").read_text(encoding="utf-8"))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{name: value for name, value in config.items() if not name.startswith("_")})
        unet.requires_grad_(False).train()
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION), unet, ADAPTER)
    torch.set_default_dtype(torch.float32)
    live = LiveStorages()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in unet.modules():
            for name, weight in module.named_parameters(recurse=False):
                is_trained = "lora_" in name or weight.requires_grad
                dtype = torch.float32 if is_trained else torch.bfloat16
                module.register_parameter(name, torch.nn.Parameter(torch.empty(weight.shape, dtype=dtype), is_trained))
        if bits < 16:
            with patch.dict(
                PACKINGS, {4: (pack_like_nf4, lambda packed, shape, dtype: torch.empty(shape, dtype=dtype))}
            ):
                quantize(unet, bits, CPU, unet)
        for only_shallow in recompute:
            enable_unet_checkpointing(unet, only_shallow)
        side, width = layout.side_px // layout.latent_px, config["cross_attention_dim"]
        parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        with live:
            for tensor in [*unet.parameters(), *unet.buffers()]:
                live.add(tensor)
            flat = FlatParameters([parameters], torch.bfloat16)
            use_fast_lora([module for module in unet.modules() if hasattr(module, "lora_A")], ADAPTER, flat.lowered)
            weights = live.now
            added = {"text_embeds": torch.empty(1, 1280, dtype=torch.bfloat16), "time_ids": torch.empty(1, 6)}
            noisy = torch.empty(1, 4, side, side, dtype=torch.bfloat16)
            hidden = torch.empty(1, 77, width, dtype=torch.bfloat16)
            timesteps = torch.zeros(1, dtype=torch.long)
            counter = FlopCounterMode(display=False)  # keeps tensors alive, so memory is counted without it
            if counts_flops:
                counter.__enter__()
            loss = unet(noisy, timesteps, hidden, added_cond_kwargs=added).sample.float().square().mean()
            loss.backward()
            if counts_flops:
                counter.__exit__(None, None, None)
    num_trained = sum(parameter.numel() for parameter in parameters)
    return Counted(weights, live.peak, num_trained, float(counter.get_total_flops()))


@dataclass(frozen=True)
class Measured:
    """Peak MiB that torch's allocator allocated to tensors, and reserved on the GPU."""

    allocated: int
    reserved: int


def measure_step(layout: Layout, recompute: tuple[bool, ...], bits: int, optimizer: str) -> Measured:
    """Measure `STEPS` steps with only the UNet, the adapter and the benchmark's latents on the GPU."""
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
    """Measure all variants and write the table."""
    gpu = torch.cuda.get_device_name()
    lines = [
        "# Memory of a training step, measured", "",
        f"{gpu}, torch {torch.__version__}. UNet LoRA of rank {RANK}, batch 1, bf16; text encoders and VAE are in CPU",
        f"memory. Peak of {STEPS} steps, the first of which is captured: allocated to tensors, and reserved by torch's",
        "allocator. The CUDA context is not included, nor are cuDNN's workspaces on a simulated GPU.", "",
        "| layout | gradient checkpointing | base, bits | optimizer | allocated, MiB | reserved, MiB |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    has_bitsandbytes = find_spec("bitsandbytes") is not None
    for name in layouts:
        for bits, optimizer in ((16, "adamw"), (16, "adamw8bit"), (8, "adamw"), (4, "adamw")):
            if (bits == 4 or optimizer == "adamw8bit") and not has_bitsandbytes:
                continue
            for label, recompute in CHECKPOINTING.items():
                memory = measure_step(LAYOUTS[name], recompute, bits, optimizer)
                lines.append(
                    f"| {name}, {LAYOUTS[name].side_px} px | {label} | {bits} | {optimizer} | {memory.allocated:,} "
                    f"| {memory.reserved:,} |"
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
    args = parser.parse_args()
    if args.device == "cuda":
        measure(args.layouts)
        return
    lines = [
        "# Memory of a training step", "",
        f"UNet LoRA of rank {RANK}, batch 1, bf16; text encoders and VAE are in CPU memory. Counted on fake tensors by",
        "`tests/benchmarks/memory.py`, without scumble's fused norm and GEGLU kernels, and without library workspaces,",
        "fragmentation and the CUDA context, which add 0.5 to 1 GB.", "",
        "| layout | gradient checkpointing | base, bits | weights, MiB | with AdamW, MiB | with 8-bit AdamW, MiB "
        "| TFLOP per step |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in args.layouts:
        layout = LAYOUTS[name]
        for bits in (16, 8, 4):
            for label, recompute in CHECKPOINTING.items():
                counted = count_step(layout, recompute, bits)
                flops = f"{count_step(layout, recompute, bits, True).flops / 1e12:.2f}" if bits == 16 else "as above"
                totals = [
                    f"{(counted.peak + counted.num_trained * each) / 2**20:,.0f}" for each in MOMENT_BYTES.values()
                ]
                lines.append(
                    f"| {name}, {layout.side_px} px | {label} | {bits} | {counted.weights / 2**20:,.0f} "
                    f"| {' | '.join(totals)} | {flops} |"
                )
                print(lines[-1], flush=True)
    (Path(__file__).parent / "results/memory.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
