"""How much memory does a training step take on a device, with fewer activations kept, and fewer bits?

`python tests/benchmarks/memory.py` counts it without a device, on fake tensors, which have shapes and no numbers: our
UNet, adapter and products run forward and backward, and the storages alive at once are added up, each in blocks of
512 bytes as CUDA's allocator has them. Workspaces of libraries, fragmentation and the context of CUDA itself come on
top, 0.5 to 1 GB together. `python tests/benchmarks/speed.py --device cuda` measures the same. Writes results/memory.md.
"""

import argparse
import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from speed import LAYOUTS, RANK, Layout
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from scumble.trainer.bases import BASES
from scumble.trainer.flat import Flat
from scumble.trainer.lora import ADAPTER, ATTENTION, recompute_unet
from scumble.trainer.product import speed_up
from scumble.trainer.quantize import PACKINGS, quantize

BLOCK = 512
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
            speed_up([module for module in unet.modules() if hasattr(module, "lora_A")], ADAPTER, flat.lowered)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["sd15", "sdxl"])
    chosen = parser.parse_args()
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
