"""Speed of training steps and whole runs, compared with a plain diffusers and PEFT loop and with fewer optimizations.

`python tests/benchmarks/speed.py` times optimizer steps with cached latents and text: scumble, the plain loop (PEFT's
layers under autocast, torch's AdamW and clipping, as in the diffusers examples), and scumble without each optimization.
All run in turns in one process. Weights are random, since speed does not depend on them. `--whole` adds runs from the
command to the finished file, `--demo` the time of the phases of `make demo`. `--guard` is a short version that fails if
the ratio to the plain loop falls below 75 % of the recorded one. Writes results/speed-DEVICE.md and .json; on a
simulated GPU (simulated_card/), times are those of the host only.

On CUDA the variants run one after the other, with their peak memory, and also with gradient checkpointing:
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
from scumble.trainer.training.checkpointing import enable_unet_checkpointing
from scumble.trainer.training.flat_parameters import FlatParameters
from scumble.trainer.training.forward_backward import Passes
from scumble.trainer.training.lora import ADAPTER, attach, memory_order
from scumble.trainer.training.objective import Objectives
from scumble.trainer.training.optimizer_step import OptimizerStep
from scumble.trainer.training.optimizers import make_optimizer, param_groups

HERE = Path(__file__).parent
SAMPLES = HERE.parent.parent / "datasets/samples/clay-style"
RANK, NUM_IMAGES, MAX_SLOWDOWN = 16, 16, 0.25
WARM_UPS = 4  # until a CPU's passes are recorded and verified, even if the first one is slow
TECHNIQUES = {
    "product": "PEFT's forward under autocast",
    "packing": "torch's own convolutions",
    "flat": "optimizer over separate tensors",
    "kernels": "stock kernels",
    "fused": "torch's norms and GEGLU",
    "captured": "eager passes, not captured",
    "ahead": "loss read before the next step is queued",
}
ONLY_ON = {"packing": "cpu", "fused": "cuda", "ahead": "cuda"}
CHECKPOINTING = {"gradient checkpointing, shallow blocks": True, "gradient checkpointing, all blocks": False}
PHASES = {
    "plan": "start Python, import packages, read the images",
    "checkup": "check images and captions",
    "encoded": "load the base, encode the images",
    "measured": "attach the adapter, measure a step",
    "step": "training steps",
    "preview": "previews",
    "saved": "save and verify adapters, save states",
    "done": "save and verify adapters, save states",
}
Step = Callable[[int], None]


@dataclass(frozen=True)
class Layout:
    """The config of a UNet, its family, and its native image size."""

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
class StepTimes:
    """Seconds per step of a variant in each turn, empty if it does not fit into memory; peak memory on CUDA."""

    seconds: list[float]
    peak_mb: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan


class Bench:
    """One layout at one batch size on one device. All variants start from the same frozen UNet, `unet` or a new one."""

    def __init__(
        self,
        layout: Layout,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        unet: UNet2DConditionModel | None = None,
    ):
        self.layout, self.batch, self.device, self.dtype = layout, batch, device, dtype
        self.unet = unet or make_unet(layout, device, dtype)
        self.scheduler: Any = DDIMScheduler.from_pretrained(BASES / layout.config / "scheduler")
        width, xl = self.unet.config["cross_attention_dim"], layout.family == "sdxl"
        side = layout.side_px // layout.latent_px
        generator = torch.Generator().manual_seed(1)
        self.mean = [[torch.randn(4, side, side, generator=generator).to(device)] for _ in range(NUM_IMAGES)]
        self.std = [[torch.full((4, side, side), 0.1, device=device)] for _ in range(NUM_IMAGES)]
        self.text = Conditioning(
            torch.randn(1, 77, width, generator=generator).to(device, dtype),
            torch.randn(1, 1280, generator=generator).to(device, dtype) if xl else None,
        )

    def batch_indices(self, step: int) -> list[int]:
        return [(step * self.batch + position) % NUM_IMAGES for position in range(self.batch)]

    def ours(
        self,
        without: Sequence[str] = (),
        only_shallow: bool | None = None,
        unet: UNet2DConditionModel | None = None,
        optimizer: str = "adamw",
    ) -> Step:
        """One optimizer step of scumble, `without` some of its optimizations.

        With gradient checkpointing if `only_shallow` is not None, in shallow blocks only or in all blocks. Uses `unet`
        itself if given, otherwise a copy of the benchmark's UNet.
        """
        reset_torch_flags()
        unet, size = unet or copy.deepcopy(self.unet), Size(self.layout.side_px, self.layout.side_px)
        source = DetectedBase(
            "benchmark", "", False, FAMILIES[self.layout.family], "epsilon", False, size.width, 64, 64,
            self.layout.latent_px,
        )  # fmt: skip
        encoders: Any = [None, None] if self.text.pooled is not None else [None]
        unused: Any = None
        base = Base(source, unused, unet, unused, encoders, [], self.scheduler.alphas_cumprod, 1, self.device)
        trained = attach(base, Network(), [Part("unet", RANK, RANK)], seed=0)
        if only_shallow is not None:
            enable_unet_checkpointing(unet, only_shallow)
        if "kernels" not in without:
            use_packing, use_fused_norms = "packing" not in without, "fused" not in without
            choose_kernels(unet, "sdpa", size, self.layout.latent_px, use_packing, use_fused_norms, print)
        named = {f"{one.key}.{slot}": p for one in trained for slot, p in one.tensors.items()}
        groups = param_groups([(1e-4, memory_order(trained))])
        flat = FlatParameters([group["params"] for group in groups], self.dtype)
        fast = "product" not in without and use_fast_lora([one.layer for one in trained], ADAPTER, flat.lowered)
        crop = Crop(size, size, 0, 0, size)
        examples = [Example(Path(f"{index}.png"), "a", 1) for index in range(NUM_IMAGES)]
        objectives = Objectives(
            base, examples, [[crop]] * NUM_IMAGES, Latents(self.mean, self.std, 0.18), Data(caption_dropout=0.0),
            Objective(loss_weighting="none"), 0, text_is_trained=False,
        )  # fmt: skip
        objectives.encodings["a"] = self.text
        accelerator = accelerator_for(self.device, self.dtype)
        capture = None if "captured" in without else capture_for(self.device, flat.gradients, [*flat.low, *flat.values])
        passes = Passes(
            objectives, flat, accelerator.backward, nullcontext if fast else accelerator.autocast, capture, print
        )
        torch_optimizer = make_optimizer(optimizer, groups, 0.01, None if "flat" in without else flat)
        optimizer_step = OptimizerStep(
            accelerator, passes, named, flat, torch_optimizer, 1.0, 0.0, report=print, samples_per_step=self.batch
        )
        if "ahead" in without:
            optimizer_step.max_queued = 0

        def step(number: int) -> None:
            optimizer_step.take(number, [self.batch_indices(number)], 1.0, self.batch_indices(number + 1))
            list(optimizer_step.outcomes(wait=False))
            if optimizer_step.fallback.micro_batch:
                raise torch.OutOfMemoryError("smaller passes would be another batch size")

        return step

    def plain(self) -> Step:
        """One optimizer step as in the diffusers examples, with cached latents and text."""
        reset_torch_flags()
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
            indices = self.batch_indices(number)
            mean, std = (torch.stack([one[index][0] for index in indices]) for one in (self.mean, self.std))
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
            loss.detach().item()  # for the progress bar

        return step

    def flops(self) -> float:
        """FLOP of a plain step: the forward pass and the gradients of inputs, the minimum for any loop."""
        step = self.plain()
        with FlopCounterMode(display=False) as counter:
            step(0)
        return float(counter.get_total_flops())


def make_unet(layout: Layout, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """A frozen UNet with random weights."""
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


def reset_torch_flags() -> None:
    """Restore torch's defaults, which another variant may have changed for the whole process."""
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")


def cpu_name() -> str:
    """The name of the CPU (on Linux) and its instruction sets for matrix products."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    has_amx = any("amx_bf16" in line for line in lines if line.startswith("flags"))
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()} ({capability}, {'with' if has_amx else 'without'} AMX)"


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """The median FLOP/s of square matrix products."""
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: one @ other, device) for _ in range(12)][2:]
    return 2 * side**3 / statistics.median(seconds)


def timed(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def time_in_turns(
    variants: dict[str, Step], turns: int, steps: int, device: torch.device, until: float = math.inf
) -> dict[str, StepTimes]:
    """Time steps of all variants in turns, after a warm-up. Only the first turn may begin after `until` (monotonic)."""
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
    return {name: StepTimes(spent) for name, spent in seconds.items()}


def time_one_by_one(
    makers: dict[str, Callable[[], Step]], turns: int, steps: int, device: torch.device, until: float = math.inf
) -> dict[str, StepTimes]:
    """Like `time_in_turns`, for variants that do not fit into memory together.

    Each one is created, timed with its peak memory, and deleted. All get the same share of the time.
    """
    times: dict[str, StepTimes] = {}
    for number, (name, make) in enumerate(makers.items()):
        now = time.monotonic()
        share = (until - now) / (len(makers) - number)
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()  # the UNet that is copied
        seconds: list[float] = []
        with suppress(torch.OutOfMemoryError, TooLarge), own_stream(device):
            seconds = time_in_turns({name: make()}, turns, steps, device, now + share)[name].seconds
        times[name] = StepTimes(seconds, (torch.cuda.max_memory_allocated() - others) // 2**20)
        gc.collect()
        torch.cuda.empty_cache()
    return times


def compare(
    bench: Bench, techniques: Sequence[str], turns: int, steps: int, until: float = math.inf
) -> dict[str, StepTimes]:
    """Time the plain loop, scumble, and scumble without each technique; on CUDA also with gradient checkpointing."""
    makers: dict[str, Callable[[], Step]] = {"plain": bench.plain, "ours": bench.ours}
    here = [name for name in techniques if ONLY_ON.get(name, bench.device.type) == bench.device.type]
    makers |= {f"without {name}": lambda name=name: bench.ours([name]) for name in here}
    if bench.device.type == "cuda":
        makers |= {name: lambda shallow=shallow: bench.ours("", shallow) for name, shallow in CHECKPOINTING.items()}
        return time_one_by_one(makers, turns, steps, bench.device, until)
    return time_in_turns({name: make() for name, make in makers.items()}, turns, steps, bench.device, until)


def ratios(times: dict[str, StepTimes], name: str) -> list[float]:
    """The time per step of a variant divided by scumble's, in each turn."""
    return [a / b for a, b in zip(times[name].seconds, times["ours"].seconds, strict=False)]


def ratio(times: dict[str, StepTimes], name: str) -> float:
    """The median of `ratios`."""
    return statistics.median(ratios(times, name) or [math.nan])


def format_ratio(values: Sequence[float]) -> str:
    """`1.94 × (1.76 to 2.31)`: the median and, if it is not empty, the range; "" without values."""
    if not values:
        return ""
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:.2f} ×" + (f" ({least:.2f} to {most:.2f})" if least < most else "")


LAUNCHER = "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--mixed_precision=bf16"
WHOLE = {
    "plain": "plain loop",
    "launched": "plain loop, started with `accelerate launch` as in the diffusers documentation",
}


@dataclass(frozen=True)
class Command:
    """Start and end of a command (Unix seconds), and its peak memory."""

    began: float
    ended: float
    peak_mb: int

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def run_command(*arguments: str) -> Command:
    """Run this Python with arguments."""
    began, peak_mb = time.time(), 0
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:  # getrusage would include the peak of this process, from which it is forked
        with suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            peak_mb = max(peak_mb, *(int(kib) // 2**10 for kib in re.findall(r"VmHWM:\s+(\d+)", status)), 0)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
    if process.returncode:
        raise RuntimeError(f"{arguments}: exit code {process.returncode}")
    return Command(began, time.time(), peak_mb)


def run_scumble(flags: Sequence[str]) -> tuple[Command, dict[str, float]]:
    """Train on the sample style without a latent cache. Returns the command and the seconds of its phases."""
    with TemporaryDirectory() as folder:
        done = run_command(
            "-m", "scumble.trainer.cli", "train", str(SAMPLES), "--base", "sketch", *flags, "--device", "cpu",
            "--latent-cache", "off", "--output-dir", folder, "--output-name", "clay",
        )  # fmt: skip
        lines = (Path(folder) / "clay/events.jsonl").read_text(encoding="utf-8").splitlines()
    return done, phases_of([json.loads(line) for line in lines], done.began, done.ended)


def time_whole_runs(turns: int) -> dict[str, Any]:
    """Time from the command to the finished file and peak memory of both loops in turns, and scumble's phases."""
    flags = [
        "--resolution", "64", "--rank", "16", "--text-encoder-rank", "0", "--steps", "160",
        "--batch-size", "4", "--learning-rate", "2e-3",
        "--mixed-precision", "bf16", "--preview-every", "0", "--save-every", "0",
    ]  # fmt: skip
    runs: dict[str, list[Command]] = {"ours": [], **{name: [] for name in WHOLE}}
    phases: list[dict[str, float]] = []
    threads = str(torch.get_num_threads())
    launcher = *LAUNCHER, f"--num_cpu_threads_per_process={threads}"
    for _ in range(turns):
        done, parts = run_scumble(flags)
        runs["ours"].append(done)
        phases.append(parts)
        for name in WHOLE:
            with TemporaryDirectory() as folder:
                loop = str(HERE / "plain_loop.py"), str(EMBEDDED), str(SAMPLES), folder, threads
                runs[name].append(run_command(*(launcher if name == "launched" else ()), *loop))
    return {
        "seconds": {name: statistics.median(one.seconds for one in done) for name, done in runs.items()},
        "of_ours": {
            name: [a.seconds / b.seconds for a, b in zip(runs[name], runs["ours"], strict=True)] for name in WHOLE
        },
        "peak_mb": {name: max(one.peak_mb for one in runs[name]) for name in ("ours", "plain")},
        "phases": medians(phases),
    }  # fmt: skip


def phases_of(events: list[dict[str, Any]], began: float, ended: float) -> dict[str, float]:
    """Seconds of the phases of a run. The time before an event belongs to the phase that the event reports."""
    seconds = dict.fromkeys(PHASES.values(), 0.0)
    before, phase = began, ""
    for event in events:
        if event["kind"] in PHASES:
            phase = PHASES[event["kind"]]
            seconds[phase] += event["t"] - before
            before = event["t"]
    seconds[phase] += ended - before
    return {name: spent for name, spent in seconds.items() if spent}


def time_demo(turns: int) -> dict[str, float]:
    """Median seconds of the phases of the run in `make demo`."""
    return medians([run_scumble(["--preset", "sketch-demo"])[1] for _ in range(turns)])


def medians(phases: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(one[name] for one in phases), 2) for name in phases[0]}


def table(name: str, bench: Bench, times: dict[str, StepTimes], flops: float, peak: float) -> list[str]:
    names = {"plain": "plain loop", "ours": "scumble"} | {f"without {key}": text for key, text in TECHNIQUES.items()}
    lines = [
        f"## {name}, {bench.layout.side_px} px, batch {bench.batch}, {str(bench.dtype).removeprefix('torch.')}",
        "",
        "| | steps/s | images/s | matmul utilization | relative time (range) | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for key, one in times.items():
        row = f"| {names.get(key, key)} | does not fit | | | |"
        if one.seconds:
            row = (
                f"| {names.get(key, key)} | {1 / one.median:.3g} | {bench.batch / one.median:.3g} "
                f"| {flops / one.median / peak:.0%} | {format_ratio(ratios(times, key))} |"
            )
        lines.append(f"{row} {one.peak_mb or '-'} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["sketch"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="steps in each turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="time limit for all steps; slow variants get fewer turns"
    )
    parser.add_argument("--side", type=int, help="image size in px, instead of the layout's own")
    parser.add_argument(
        "--whole", type=int, default=0, metavar="RUNS", help="number of whole runs to time of each loop"
    )
    parser.add_argument(
        "--demo", type=int, default=0, metavar="RUNS", help="number of runs of `make demo` to time by phase"
    )
    parser.add_argument("--guard", action="store_true", help="only compare the ratio with the recorded one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.precision]
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_name()}, {args.threads} threads"
    record = HERE / "results" / f"speed-{'simulated' if 'simulated' in card else device.type}.json"
    if args.guard:
        raise SystemExit(guard(record, device, dtype, args.turns, args.steps))
    peak = matmul_rate(device, dtype, 8192 if device.type == "cuda" else 1024)
    lines = [
        "# Speed of a training step", "",
        f"{card}; torch {torch.__version__}; {peak / 1e12:.2f} TFLOP/s in matrix products.",
        f"Medians of {args.turns} turns of {args.steps} steps each; the variants take turns in one process.", "",
        "Relative time is the time per step divided by that of scumble. Matmul utilization is the FLOP/s of a step",
        "divided by that of matrix products.", "",
    ]  # fmt: skip
    found: dict[str, Any] = {"machine": card, "torch": torch.__version__, "product_flops": peak, "steps": {}}
    ends, cases = time.monotonic() + 60 * args.minutes, [(n, b) for n in args.layouts for b in args.batches]
    unet: UNet2DConditionModel | None = None
    flops_of_one = 0.0
    for number, (name, batch) in enumerate(cases):
        layout = LAYOUTS[name]
        if args.side:
            layout = Layout(layout.config, layout.family, args.side, layout.latent_px)
        if unet is None or cases[number - 1][0] != name:
            unet = make_unet(layout, device, dtype)
            flops_of_one = Bench(layout, 1, device, dtype, unet).flops()
        bench, flops = Bench(layout, batch, device, dtype, unet), batch * flops_of_one
        now = time.monotonic()
        until = now + (ends - now) / (len(cases) - number)
        times = compare(bench, [*TECHNIQUES], args.turns, args.steps, until)
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
    if args.whole:
        found["whole"] = time_whole_runs(args.whole)
        seconds, of_ours, peak_mb = (found["whole"][name] for name in ("seconds", "of_ours", "peak_mb"))
        lines += [
            "## From the command to the finished file", "",
            f"`clay-style` on `sketch`, 160 steps at batch size 4; medians of {args.whole} runs each, in turns. "
            f"Peak memory: {peak_mb['ours']:,} MB, plain loop {peak_mb['plain']:,} MB.", "",
            "| | seconds | relative time (range) |", "|---|---|---|", f"| scumble | {seconds['ours']:.1f} | 1.00 × |",
            *(f"| {text} | {seconds[name]:.1f} | {format_ratio(of_ours[name])} |" for name, text in WHOLE.items()), "",
            "Phases of the scumble run:",
            "", "| phase | seconds |", "|---|---|",
            *(f"| {name} | {spent:.2f} |" for name, spent in found["whole"]["phases"].items()), "",
        ]  # fmt: skip
    if args.demo:
        found["demo"] = time_demo(args.demo)
        total = sum(found["demo"].values())
        lines += [
            "## Phases of `make demo`", "", "| phase | seconds | share |", "|---|---|---|",
            *(f"| {name} | {spent:.1f} | {spent / total:.0%} |" for name, spent in found["demo"].items()),
            f"| total (medians of {args.demo} runs) | {total:.1f} | |", "",
        ]  # fmt: skip
    write(record, lines, found)
    print("\n".join(lines))


def write(record: Path, lines: Sequence[str], found: dict[str, Any]) -> None:
    """Write the results so far."""
    record.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def guard(record: Path, device: torch.device, dtype: torch.dtype, turns: int, steps: int) -> int:
    """Returns 0 if the plain loop's relative time is at least 75 % of the recorded one, else 1."""
    before = json.loads(record.read_text(encoding="utf-8"))["steps"]["sketch 4"]["plain"]["of_ours"]
    now = ratio(compare(Bench(LAYOUTS["sketch"], 4, device, dtype), [], turns, steps), "plain")
    print(f"a step of the plain loop takes {now:.2f} times as long as one of scumble; recorded: {before:.2f}")
    return int(now < (1 - MAX_SLOWDOWN) * before)


if __name__ == "__main__":
    main()
