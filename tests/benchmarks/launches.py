"""How many kernels does a training step launch on CUDA, and of which kind?

At batch 1 the number of kernels limits a GPU's speed: each takes about 2 µs or more, also in a graph. Counted on a
simulated GPU: `python tests/benchmarks/simulated_card/card.py tests/benchmarks/launches.py` writes
results/launches-simulated.md. A call of cuBLAS or cuDNN counts as one kernel here and may be several on a real GPU.
"""

import argparse
import gc
import re
from collections import Counter
from pathlib import Path

import torch
from simulated_card.card import launches
from speed import HERE, LAYOUTS, RANK, Bench, Layout, unet_of

from scumble.trainer.base_model.one_block import place_together
from scumble.trainer.kernels.cuda_graphs import own_stream

KINDS = {  # by what is in a kernel's name; the first that fits
    "products": r"cublas",
    "convolutions": r"cudnn",
    "attention": r"flash|fmha|splitkv",
    "norms": r"[Nn]orm|[Mm]oments|FusedParams|InternalGradients|^_sums|^_gradients",
    "copies": r"direct_copy|CatArray|memcpy|memset|FillFunctor",
    "sums": r"CUDAFunctor_add|CUDAFunctorOnSelf_add|CUDAFunctorOnOther_add",
    "others": r"",
}
VARIANTS = {
    "plain": "plain loop",
    "kernels": "ours with stock kernels",
    "fused": "ours with torch's norms and gates",
    "product": "ours with PEFT's forward",
    "": "ours",
}
GPU = torch.device("cuda")


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel))


def counted(layout: Layout, variant: str) -> Counter[str]:
    """Kernels of a step by kind, the third, when all is there that a first one makes."""
    found: Counter[str] = Counter()
    with own_stream(GPU):
        unet = unet_of(layout, torch.device("cpu"), torch.bfloat16)
        place_together(unet, GPU)
        bench = Bench(layout, 1, GPU, torch.bfloat16, unet)
        step = bench.plain() if variant == "plain" else bench.ours(["captured", variant], unet=unet)
        for number in range(2):
            step(number)
        launches()
        step(2)
        for kernel, count in launches().items():
            found[kind_of(kernel)] += count
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["sd15", "sdxl"], choices=LAYOUTS)
    parser.add_argument("--out", type=Path, default=HERE / "results/launches-simulated.md")
    options = parser.parse_args()
    lines = [
        "# Kernels that a training step launches", "",
        f"simulated GPU, torch {torch.__version__}. UNet LoRA of rank {RANK}, batch 1, bf16, latents and text cached; ",
        "with the update and what brings the batch there.", "",
        f"| layout | variant | {' | '.join(KINDS)} | all |", f"|---|---|{'---|' * (len(KINDS) + 1)}",
    ]  # fmt: skip
    for name in options.layouts:
        layout = LAYOUTS[name]
        for variant, title in VARIANTS.items():
            found = counted(layout, variant)
            gc.collect()
            torch.cuda.empty_cache()
            row = [name, title, *(f"{found[kind]:,}" for kind in KINDS), f"{found.total():,}"]
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
