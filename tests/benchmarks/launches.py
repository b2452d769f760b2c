"""The number of CUDA kernels that a training step launches, by kind.

At batch 1 the number of kernels limits the speed of a GPU: each takes at least about 2 µs, even in a graph. Counted on
a simulated GPU: `python tests/benchmarks/simulated_card/card.py tests/benchmarks/launches.py` writes
results/launches-simulated.md. A call to cuBLAS or cuDNN is counted as one kernel, but may be several on a real GPU.
"""

import argparse
import gc
import re
from collections import Counter
from pathlib import Path

import torch
from simulated_card.card import launches
from speed import HERE, LAYOUTS, RANK, Bench, Layout, make_unet

from scumble.trainer.base_model.one_block import place_together
from scumble.trainer.kernels.cuda_graphs import own_stream

KINDS = {  # patterns for the name of a kernel; the first match decides
    "matrix products": r"cublas",
    "convolutions": r"cudnn",
    "attention": r"flash|fmha|splitkv",
    "norms": r"[Nn]orm|[Mm]oments|FusedParams|InternalGradients|^_sums|^_gradients",
    "copies": r"direct_copy|CatArray|memcpy|memset|FillFunctor",
    "additions": r"CUDAFunctor_add|CUDAFunctorOnSelf_add|CUDAFunctorOnOther_add",
    "other": r"",
}
VARIANTS = {
    "plain": "plain loop",
    "kernels": "scumble with stock kernels",
    "fused": "scumble with torch's norms and GEGLU",
    "product": "scumble with PEFT's forward",
    "": "scumble",
}
GPU = torch.device("cuda")


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel))


def count(layout: Layout, variant: str) -> Counter[str]:
    """The kernels of the third step by kind; the first step also initializes."""
    counts: Counter[str] = Counter()
    with own_stream(GPU):
        unet = make_unet(layout, torch.device("cpu"), torch.bfloat16)
        place_together(unet, GPU)
        bench = Bench(layout, 1, GPU, torch.bfloat16, unet)
        step = bench.plain() if variant == "plain" else bench.ours(["captured", variant], unet=unet)
        for number in range(2):
            step(number)
        launches()
        step(2)
        for kernel, times in launches().items():
            counts[kind_of(kernel)] += times
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["sd15", "sdxl"], choices=LAYOUTS)
    parser.add_argument("--out", type=Path, default=HERE / "results/launches-simulated.md")
    args = parser.parse_args()
    lines = [
        "# Kernels that a training step launches", "",
        f"simulated GPU, torch {torch.__version__}. UNet LoRA of rank {RANK}, batch 1, bf16, cached latents and text.",
        "With the optimizer step and the copies of the batch to the GPU.", "",
        f"| layout | variant | {' | '.join(KINDS)} | total |", f"|---|---|{'---|' * (len(KINDS) + 1)}",
    ]  # fmt: skip
    for name in args.layouts:
        layout = LAYOUTS[name]
        for variant, title in VARIANTS.items():
            counts = count(layout, variant)
            gc.collect()
            torch.cuda.empty_cache()
            row = [name, title, *(f"{counts[kind]:,}" for kind in KINDS), f"{counts.total():,}"]
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
