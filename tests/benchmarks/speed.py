"""How fast is a step, and a whole run, beside a plain loop of diffusers and PEFT, and beside itself with less?

`python tests/benchmarks/speed.py` times, in turn in one process and with medians, optimiser steps with latents and text
cached on both sides: ours, the plain loop's (PEFT's layers under autocast, torch's AdamW and clipping, as the public
examples do it), and ours without each technique. Real layouts have random weights: speed does not depend on them.
`--whole` adds runs from the command to the finished file, `--demo` where the time of `make demo` goes. `--guard` is a
short form that fails where the ratio to the plain loop falls by more than a quarter below the one on record. Writes
results/speed-DEVICE.md and .json; on a simulated GPU (simulated_card/) seconds are those of the host only.

On CUDA, where a variant is timed after the other and with its memory, also with activations recomputed:
`python tests/benchmarks/speed.py --device cuda --layouts sd15 sdxl --batches 1 4 8 --minutes 8`.
"""

import argparse
import copy
import gc
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from scumble.configs.options import Data, Network, Objective
from scumble.datasets.reading.folder import Example
from scumble.datasets.reading.images import Crop, Size
from scumble.trainer.adapters.targets import Part
from scumble.trainer.base_model.detect import EMBEDDED, FAMILIES, DetectedBase
from scumble.trainer.base_model.latents import Latents
from scumble.trainer.base_model.load import BASES, Base
from scumble.trainer.base_model.text_encoding import Conditioning
from scumble.trainer.kernels.attention import choose_kernels
from scumble.trainer.kernels.capture import capture_for
from scumble.trainer.kernels.cuda_graphs import own_stream
from scumble.trainer.kernels.lora_matmul import use_fast_lora
from scumble.trainer.system.out_of_memory import TooLarge
from scumble.trainer.training.checkpointing import recompute_unet
from scumble.trainer.training.flat_parameters import Flat
from scumble.trainer.training.forward_backward import Passes
from scumble.trainer.training.lora import ADAPTER, attach, memory_order
from scumble.trainer.training.objective import Objectives
from scumble.trainer.training.optimizer_step import Update
from scumble.trainer.training.optimizers import grouped, make_optimizer

HERE = Path(__file__).parent
SAMPLES = HERE.parent.parent / "datasets/samples/clay-style"
RANK, NUM_PICTURES, ALLOWED_FALL = 16, 16, 0.25
WARM_UPS = 4  # until a CPU's passes are recorded and proved, also where the first takes long
TECHNIQUES = {
    "product": "PEFT's forward under autocast",
    "packing": "torch's own convolutions",
    "flat": "an update of each tensor",
    "kernels": "stock kernels",
    "fused": "torch's norms and gates",
    "captured": "passes not captured",
    "ahead": "the loss read before the next step",
}
ONLY_ON = {"packing": "cpu", "fused": "cuda", "ahead": "cuda"}
RECOMPUTED = {"some recomputed": True, "all recomputed": False}
PHASES = {
    "plan": "start: Python, torch, diffusers, transformers, peft; read the pictures",
    "checkup": "check pictures and captions",
    "encoded": "load the base, encode the pictures",
    "measured": "put the adapter on, try a step",
    "step": "steps",
    "preview": "previews",
    "saved": "adapters: written, read back, compared; states",
    "done": "adapters: written, read back, compared; states",
}
Step = Callable[[int], None]


@dataclass(frozen=True)
class Layout:
    """A UNet's config, its family, and the pictures that it is made for."""

    config: str
    family: str
    side_px: int
    latent_px: int


LAYOUTS = {
    "sketch": Layout("sketch", "sd1", 64, 4),
    "sd15": Layout("sd15", "sd1", 512, 8),
    "sdxl": Layout("sdxl", "sdxl", 1024, 8),
}


@dataclass(frozen=True)
class Timed:
    """One variant: seconds a step in each turn, none where it does not fit into memory; peak memory on CUDA."""

    seconds: list[float]
    peak_mb: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan


class Bench:
    """One layout at one batch size on one device; every variant starts from the same frozen UNet, which is `unet` or
    a new one."""

    def __init__(
        self,
        layout: Layout,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        unet: UNet2DConditionModel | None = None,
    ):
        self.layout, self.batch, self.device, self.dtype = layout, batch, device, dtype
        self.unet = unet or unet_of(layout, device, dtype)
        self.scheduler: Any = DDIMScheduler.from_pretrained(BASES / layout.config / "scheduler")
        width, xl = self.unet.config["cross_attention_dim"], layout.family == "sdxl"
        side = layout.side_px // layout.latent_px
        generator = torch.Generator().manual_seed(1)
        self.mean = [[torch.randn(4, side, side, generator=generator).to(device)] for _ in range(NUM_PICTURES)]
        self.std = [[torch.full((4, side, side), 0.1, device=device)] for _ in range(NUM_PICTURES)]
        self.text = Conditioning(
            torch.randn(1, 77, width, generator=generator).to(device, dtype),
            torch.randn(1, 1280, generator=generator).to(device, dtype) if xl else None,
        )

    def chosen(self, step: int) -> list[int]:
        return [(step * self.batch + slot) % NUM_PICTURES for slot in range(self.batch)]

    def ours(
        self,
        without: Sequence[str] = (),
        only_shallow: bool | None = None,
        unet: UNet2DConditionModel | None = None,
        optimizer: str = "adamw",
    ) -> Step:
        """One optimiser step of scumble, `without` some of its techniques; with activations recomputed where
        `only_shallow` is not None, in shallow blocks or in all. `unet` is taken as it is, else a copy is."""
        as_torch_has_it()
        unet, size = unet or copy.deepcopy(self.unet), Size(self.layout.side_px, self.layout.side_px)
        source = DetectedBase(
            "benchmark", "", False, FAMILIES[self.layout.family], "epsilon", False, size.width, 64, 64,
            self.layout.latent_px,
        )  # fmt: skip
        encoders: Any = [None, None] if self.text.pooled is not None else [None]
        nothing: Any = None
        base = Base(source, nothing, unet, nothing, encoders, [], self.scheduler.alphas_cumprod, 1, self.device)
        trained = attach(base, Network(), [Part("unet", RANK, RANK)], seed=0)
        if only_shallow is not None:
            recompute_unet(unet, only_shallow)
        if "kernels" not in without:
            packs, fuses = "packing" not in without, "fused" not in without
            choose_kernels(unet, "sdpa", size, self.layout.latent_px, packs, fuses, print)
        named = {f"{one.key}.{slot}": p for one in trained for slot, p in one.tensors.items()}
        groups = grouped([(1e-4, memory_order(trained))])
        flat = Flat([group["params"] for group in groups], self.dtype)
        fast = "product" not in without and use_fast_lora([one.layer for one in trained], ADAPTER, flat.lowered)
        crop = Crop(size, size, 0, 0, size)
        examples = [Example(Path(f"{index}.png"), "a", 1) for index in range(NUM_PICTURES)]
        objectives = Objectives(
            base, examples, [[crop]] * NUM_PICTURES, Latents(self.mean, self.std, 0.18), Data(caption_dropout=0.0),
            Objective(loss_weighting="none"), 0, text_is_trained=False,
        )  # fmt: skip
        objectives.encodings["a"] = self.text
        accelerator = accelerator_for(self.device, self.dtype)
        capture = None if "captured" in without else capture_for(self.device, flat.gradients, [*flat.low, *flat.values])
        passes = Passes(
            objectives, flat, accelerator.backward, nullcontext if fast else accelerator.autocast, capture, print
        )
        moves = make_optimizer(optimizer, groups, 0.01, None if "flat" in without else flat)
        update = Update(accelerator, passes, named, flat, moves, 1.0, 0.0, print, looks_per_step=self.batch)
        if "ahead" in without:
            update.ahead = 0

        def step(number: int) -> None:
            update.take(number, [self.chosen(number)], 1.0, self.chosen(number + 1))
            list(update.outcomes(of_all=False))
            if update.micro_batch:
                raise torch.OutOfMemoryError("smaller passes are another batch size")

        return step

    def plain(self) -> Step:
        """One optimiser step as the public examples have it, with latents and text cached."""
        as_torch_has_it()
        unet = copy.deepcopy(self.unet)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
        parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
        accelerator = accelerator_for(self.device, self.dtype)
        side = float(self.layout.side_px)
        numbers = torch.tensor([[side, side, 0, 0, side, side]] * self.batch, device=self.device)

        def step(number: int) -> None:
            chosen = self.chosen(number)
            mean, std = (torch.stack([one[index][0] for index in chosen]) for one in (self.mean, self.std))
            latents = (mean + std * torch.randn_like(std)) * 0.18
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (self.batch,), device=self.device)
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            hidden = self.text.hidden.expand(self.batch, -1, -1)
            added = None
            if self.text.pooled is not None:
                added = {"text_embeds": self.text.pooled.expand(self.batch, -1), "time_ids": numbers}
            with accelerator.autocast():
                prediction = unet(noisy.to(self.dtype), timesteps, hidden, added_cond_kwargs=added).sample
                loss = torch.nn.functional.mse_loss(prediction.float(), noise.float())
            accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.detach().item()  # its progress bar shows it

        return step

    def flops(self) -> float:
        """Of one step: forward and the gradients of inputs, the floor that no loop goes below."""
        step = self.plain()
        with FlopCounterMode(display=False) as counter:
            step(0)
        return float(counter.get_total_flops())


def unet_of(layout: Layout, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """A frozen one with random weights."""
    torch.manual_seed(0)
    config = json.loads((BASES / layout.config / "unet/config.json").read_text(encoding="utf-8"))
    with torch.device(device):
        torch.set_default_dtype(dtype)
        unet = UNet2DConditionModel(**{name: value for name, value in config.items() if not name.startswith("_")})
        torch.set_default_dtype(torch.float32)
    return unet.requires_grad_(False).train()


def accelerator_for(device: torch.device, dtype: torch.dtype) -> Accelerator:
    mixed = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}[dtype]
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)


def as_torch_has_it() -> None:
    """Whatever another variant chose for the whole process."""
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")


def processor() -> str:
    """Its name where Linux tells it, and what counts for products."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    has_amx = any("amx_bf16" in line for line in lines if line.startswith("flags"))
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()} ({capability}, {'with' if has_amx else 'without'} AMX)"


def rate_of_products(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP a second of plain matrix products of a side, the median of some."""
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: one @ other, device) for _ in range(12)][2:]
    return 2 * side**3 / statistics.median(seconds)


def timed(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def rounds(
    variants: dict[str, Step], turns: int, steps: int, device: torch.device, until: float = math.inf
) -> dict[str, Timed]:
    """Steps of every variant in turn, after a warm-up; seconds a step in each turn. No turn but the first begins after
    `until` (monotonic seconds)."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for step in variants.values():
        for number in range(WARM_UPS):
            step(number)
    for turn in range(turns):
        if turn and time.monotonic() > until:
            break
        for name, step in variants.items():
            first = WARM_UPS + turn * steps
            spent = timed(lambda step=step, first=first: [step(first + number) for number in range(steps)], device)
            seconds[name].append(spent / steps)
    return {name: Timed(spent) for name, spent in seconds.items()}


def one_by_one(
    makers: dict[str, Callable[[], Step]], turns: int, steps: int, device: torch.device, until: float = math.inf
) -> dict[str, Timed]:
    """As `rounds`, for what is too large to be there side by side: each is made, timed with its memory, and let go.
    All have an equal share of the time."""
    found: dict[str, Timed] = {}
    for number, (name, make) in enumerate(makers.items()):
        now = time.monotonic()
        share = (until - now) / (len(makers) - number)
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()  # the UNet that it is a copy of
        seconds: list[float] = []
        with suppress(torch.OutOfMemoryError, TooLarge), own_stream(device):
            seconds = rounds({name: make()}, turns, steps, device, now + share)[name].seconds
        found[name] = Timed(seconds, (torch.cuda.max_memory_allocated() - others) // 2**20)
        gc.collect()
        torch.cuda.empty_cache()
    return found


def compared(
    bench: Bench, techniques: Sequence[str], turns: int, steps: int, until: float = math.inf
) -> dict[str, Timed]:
    """The plain loop, ours, and ours without each of the techniques; on CUDA also with activations recomputed."""
    makers: dict[str, Callable[[], Step]] = {"plain": bench.plain, "ours": bench.ours}
    here = [name for name in techniques if ONLY_ON.get(name, bench.device.type) == bench.device.type]
    makers |= {f"without {name}": lambda name=name: bench.ours([name]) for name in here}
    if bench.device.type == "cuda":
        makers |= {name: lambda shallow=shallow: bench.ours("", shallow) for name, shallow in RECOMPUTED.items()}
        return one_by_one(makers, turns, steps, bench.device, until)
    return rounds({name: make() for name, make in makers.items()}, turns, steps, bench.device, until)


def ratios(times: dict[str, Timed], name: str) -> list[float]:
    """How many times as long a variant's steps take as ours, in each turn."""
    return [a / b for a, b in zip(times[name].seconds, times["ours"].seconds, strict=False)]


def ratio(times: dict[str, Timed], name: str) -> float:
    """The median over the turns."""
    return statistics.median(ratios(times, name) or [math.nan])


def told_ratio(values: Sequence[float]) -> str:
    """`1.94 × (1.76 to 2.31)`: the median, and the range where there is one; nothing where nothing was timed."""
    if not values:
        return ""
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:.2f} ×" + (f" ({least:.2f} to {most:.2f})" if least < most else "")


LAUNCHER = "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--mixed_precision=bf16"
WHOLE = {
    "plain": "the plain loop",
    "launched": "the same by `accelerate launch`, as diffusers' documentation starts its scripts",
}


@dataclass(frozen=True)
class Command:
    """When a command began and ended (Unix seconds), and the most memory that it had."""

    began: float
    ended: float
    peak_mb: int

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def commanded(*arguments: str) -> Command:
    """This Python with arguments."""
    began, peak_mb = time.time(), 0
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:  # getrusage would tell the peak of this process too, from which that one was forked
        with suppress(OSError):
            told = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            peak_mb = max(peak_mb, *(int(kilobytes) // 2**10 for kilobytes in re.findall(r"VmHWM:\s+(\d+)", told)), 0)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
    if process.returncode:
        raise RuntimeError(f"{arguments}: exit code {process.returncode}")
    return Command(began, time.time(), peak_mb)


def run_of_ours(flags: Sequence[str]) -> tuple[Command, dict[str, float]]:
    """From the command to the finished file on the sample style, latents not cached; and seconds of its phases."""
    with TemporaryDirectory() as folder:
        done = commanded(
            "-m", "scumble.trainer.cli", "train", str(SAMPLES), "--base", "sketch", *flags, "--device", "cpu",
            "--latent-cache", "off", "--output-dir", folder, "--output-name", "it",
        )  # fmt: skip
        lines = (Path(folder) / "it/events.jsonl").read_text(encoding="utf-8").splitlines()
    return done, phases_of([json.loads(line) for line in lines], done.began, done.ended)


def whole(turns: int) -> dict[str, Any]:
    """Seconds from the command to the finished file and memory, of both loops in turn, and where ours go."""
    flags = [
        "--resolution", "64", "--rank", "16", "--text-encoder-rank", "0", "--steps", "160",
        "--batch-size", "4", "--learning-rate", "2e-3",
        "--precision", "bf16", "--preview-every", "0", "--save-every", "0",
    ]  # fmt: skip
    runs: dict[str, list[Command]] = {"ours": [], **{name: [] for name in WHOLE}}
    phases: list[dict[str, float]] = []
    threads = str(torch.get_num_threads())
    launcher = *LAUNCHER, f"--num_cpu_threads_per_process={threads}"
    for _ in range(turns):
        done, parts = run_of_ours(flags)
        runs["ours"].append(done)
        phases.append(parts)
        for name in WHOLE:
            with TemporaryDirectory() as folder:
                loop = str(HERE / "plain_loop.py"), str(EMBEDDED), str(SAMPLES), folder, threads
                runs[name].append(commanded(*(launcher if name == "launched" else ()), *loop))
    return {
        "seconds": {name: statistics.median(one.seconds for one in done) for name, done in runs.items()},
        "of_ours": {
            name: [a.seconds / b.seconds for a, b in zip(runs[name], runs["ours"], strict=True)] for name in WHOLE
        },
        "peak_mb": {name: max(one.peak_mb for one in runs[name]) for name in ("ours", "plain")},
        "phases": medians(phases),
    }  # fmt: skip


def phases_of(events: list[dict[str, Any]], began: float, ended: float) -> dict[str, float]:
    """Seconds of a run's phases: the time up to each event is that of what the event tells."""
    seconds = dict.fromkeys(PHASES.values(), 0.0)
    before, phase = began, ""
    for event in events:
        if event["kind"] in PHASES:
            phase = PHASES[event["kind"]]
            seconds[phase] += event["t"] - before
            before = event["t"]
    seconds[phase] += ended - before
    return {name: spent for name, spent in seconds.items() if spent}


def demo(turns: int) -> dict[str, float]:
    """Seconds of the phases of what `make demo` runs, medians."""
    return medians([run_of_ours(["--preset", "sketch-demo"])[1] for _ in range(turns)])


def medians(phases: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(one[name] for one in phases), 2) for name in phases[0]}


def table(name: str, bench: Bench, times: dict[str, Timed], flops: float, peak: float) -> list[str]:
    what = {"plain": "plain loop", "ours": "scumble"} | {f"without {key}": text for key, text in TECHNIQUES.items()}
    lines = [
        f"## {name}, {bench.layout.side_px} px, batch {bench.batch}, {str(bench.dtype).removeprefix('torch.')}",
        "",
        "| | steps/s | images/s | share of the matrix rate | time, of ours (range of turns) | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for key, one in times.items():
        told = f"| {what.get(key, key)} | does not fit | | | |"
        if one.seconds:
            told = (
                f"| {what.get(key, key)} | {1 / one.median:.3g} | {bench.batch / one.median:.3g} "
                f"| {flops / one.median / peak:.0%} | {told_ratio(ratios(times, key))} |"
            )
        lines.append(f"{told} {one.peak_mb or '-'} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["sketch"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="in each turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="for all steps; fewer turns where they are slow"
    )
    parser.add_argument("--side", type=int, help="of the pictures, instead of the layout's own, px")
    parser.add_argument("--whole", type=int, default=0, metavar="RUNS", help="time so many whole runs of each")
    parser.add_argument(
        "--demo", type=int, default=0, metavar="RUNS", help="tell where so many of `make demo` spend time"
    )
    parser.add_argument("--guard", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[chosen.precision]
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {chosen.threads} threads"
    record = HERE / "results" / f"speed-{'simulated' if 'simulated' in card else device.type}.json"
    if chosen.guard:
        raise SystemExit(guard(record, device, dtype, chosen.turns, chosen.steps))
    peak = rate_of_products(device, dtype, 8192 if device.type == "cuda" else 1024)
    lines = [
        "# Speed of a step", "", f"{card}; torch {torch.__version__}; {peak / 1e12:.2f} TFLOP/s in matrix products.",
        f"Medians of {chosen.turns} turns of {chosen.steps} steps each, all in turn in one process.", "",
    ]  # fmt: skip
    found: dict[str, Any] = {"machine": card, "torch": torch.__version__, "product_flops": peak, "steps": {}}
    ends, cases = time.monotonic() + 60 * chosen.minutes, [(n, b) for n in chosen.layouts for b in chosen.batches]
    unet: UNet2DConditionModel | None = None
    flops_of_one = 0.0
    for number, (name, batch) in enumerate(cases):
        layout = LAYOUTS[name]
        if chosen.side:
            layout = Layout(layout.config, layout.family, chosen.side, layout.latent_px)
        if unet is None or cases[number - 1][0] != name:
            unet = unet_of(layout, device, dtype)
            flops_of_one = Bench(layout, 1, device, dtype, unet).flops()
        bench, flops = Bench(layout, batch, device, dtype, unet), batch * flops_of_one
        now = time.monotonic()
        until = now + (ends - now) / (len(cases) - number)
        times = compared(bench, [*TECHNIQUES], chosen.turns, chosen.steps, until)
        lines += table(name, bench, times, flops, peak)
        found["steps"][f"{name} {batch}"] = {
            key: {"seconds": one.median, "of_ours": ratio(times, key), "peak_mb": one.peak_mb}
            for key, one in times.items()
            if one.seconds and times["ours"].seconds
        } | {"flops": flops}
        print("\n".join(lines[-len(times) - 5 :]), flush=True)
        write(record, lines, found)
        del bench, times
        gc.collect()
    if chosen.whole:
        found["whole"] = whole(chosen.whole)
        seconds, of_ours, peak_mb = (found["whole"][name] for name in ("seconds", "of_ours", "peak_mb"))
        lines += [
            "## From the command to the finished file", "",
            f"`clay-style` on `sketch`, 160 steps of 4; medians of {chosen.whole} runs of each, in turn. At most "
            f"{peak_mb['ours']:,} MB of memory, the plain loop {peak_mb['plain']:,} MB.", "",
            "| | seconds | of ours (range) |", "|---|---|---|", f"| scumble | {seconds['ours']:.1f} | 1.00 × |",
            *(f"| {what} | {seconds[name]:.1f} | {told_ratio(of_ours[name])} |" for name, what in WHOLE.items()), "",
            "Where ours go:",
            "", "| phase | seconds |", "|---|---|",
            *(f"| {name} | {spent:.2f} |" for name, spent in found["whole"]["phases"].items()), "",
        ]  # fmt: skip
    if chosen.demo:
        found["demo"] = demo(chosen.demo)
        total = sum(found["demo"].values())
        lines += [
            "## Where the time of `make demo` goes", "", "| phase | seconds | share |", "|---|---|---|",
            *(f"| {name} | {spent:.1f} | {spent / total:.0%} |" for name, spent in found["demo"].items()),
            f"| in all (medians of {chosen.demo}) | {total:.1f} | |", "",
        ]  # fmt: skip
    write(record, lines, found)
    print("\n".join(lines))


def write(record: Path, lines: Sequence[str], found: dict[str, Any]) -> None:
    """What was found until now."""
    record.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def guard(record: Path, device: torch.device, dtype: torch.dtype, turns: int, steps: int) -> int:
    """0 where the plain loop takes at least 75 % as many times as long as ours as it did on record, else 1."""
    before = json.loads(record.read_text(encoding="utf-8"))["steps"]["sketch 4"]["plain"]["of_ours"]
    now = ratio(compared(Bench(LAYOUTS["sketch"], 4, device, dtype), [], turns, steps), "plain")
    print(f"a plain loop's step takes {now:.2f} times as long as ours; on record {before:.2f}")
    return int(now < (1 - ALLOWED_FALL) * before)


if __name__ == "__main__":
    main()
