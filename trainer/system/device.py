"""The machine a run is on: device, precision, memory, and the signal to stop."""

import gc
import os
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import RESUMABLE, UNAVAILABLE
from scumble.configs.options import Machine

SIZES_OF_LAUNCHES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as in accelerate
SIGNS = (  # in errors that have no type of their own: of the CPU, of CUDA's libraries, of Metal
    "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED", "CUDA error: out of memory",
    "MPS backend out of memory", "Invalid buffer size",
)  # fmt: skip
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def make_accelerator(machine: Machine) -> tuple[Accelerator, torch.dtype]:
    """accelerate's device handling, and the dtype of the frozen base; the adapter is always fp32.

    auto precision: bf16 where a CUDA device has it, fp16 on older ones, bf16 on CPUs that multiply it fast, else fp32.
    Raises `Refused` for a device that is not there, or a precision that it has not.
    """
    if machine.device not in ("auto", *available_devices()):
        raise Refused(f"--device {machine.device}: this machine has none that torch can use")
    device = best_device() if machine.device == "auto" else machine.device
    precision = machine.mixed_precision
    if precision == "auto":
        precision = auto_precision(device)
    if precision == "fp16" and device != "cuda":
        raise Refused(f"--mixed-precision fp16: the {device} device trains in bf16 or fp32")
    if precision == "bf16" and device == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise Refused("--mixed-precision bf16: the mps device has it since macOS 14; take fp32")
    mixed = "no" if precision == "fp32" else precision
    AcceleratorState._reset_state(reset_partial_state=True)  # a second run may differ
    return Accelerator(cpu=device == "cpu", mixed_precision=mixed), DTYPES[precision]


def available_devices() -> list[str]:
    """The kinds of device that torch can use here, the fastest first."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind, is_usable in usable.items() if is_usable]


def best_device() -> str:
    """The fastest that there is."""
    return available_devices()[0]


def auto_precision(device: str) -> str:
    """What the device does well."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device == "cpu":
        return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    return "fp32"


def check_single_process() -> None:
    """Raises `Refused` where a launcher (accelerate, torchrun, MPI) started several processes for one run."""
    for name in SIZES_OF_LAUNCHES:
        if (size := os.environ.get(name, "1")) not in ("", "0", "1"):
            raise Refused(
                f"{size} processes ({name}): a run is one process on one device; start it without a launcher, or with "
                "--num_processes 1"
            )


def check_attention(attention: str, device: str) -> None:
    """Raises `Refused` where xformers is asked for on another device than CUDA, or (69) is not installed."""
    if attention == "xformers" and device != "cuda":
        raise Refused(f"--attention xformers: computes on cuda devices only, and this run is on {device}; leave it out")
    if attention == "xformers" and find_spec("xformers") is None:
        raise Refused('--attention xformers: not installed; pip install "scumble[xformers]"', UNAVAILABLE)


def memory_mb(device: torch.device) -> int:
    """Peak memory since `reset_peak_memory`: of the CUDA device, else of this process; on MPS what torch holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() // 2**20
    return _peak_of_process_mb()


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak be what is held now, where the system can: loading a base reads files through mapped memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def total_memory_mb(device: torch.device) -> int:
    """Of the CUDA device, else of the machine; on MPS what Metal lets a process have of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2**20
    if device.type == "mps":
        return torch.mps.recommended_max_memory() // 2**20
    return psutil.virtual_memory().total // 2**20


def synchronize(device: torch.device) -> None:
    """Until the device has done all that was queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; from pinned memory, so that the copy to CUDA is queued like all else and nothing waits for it."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class AsyncValue:
    """Numbers on their way from a device. `values` waits for them, but not for what was queued after them."""

    def __init__(self, numbers: torch.Tensor):
        self.numbers, self.arrived = numbers, None
        if numbers.is_cuda:
            self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(numbers.device))

    def values(self) -> list[float]:
        """The numbers (n,)."""
        if self.arrived:
            self.arrived.synchronize()
        return self.numbers.tolist()


def set_seed(seed: int, device: torch.device) -> None:
    """Of chance on the CPU and on the device; torch.manual_seed asks after every kind of device, for 1 ms a call."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def free_unused() -> None:
    """Give back the memory that torch keeps for later on whatever device there is, and what only cycles hold."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error tells of too little memory, of a device or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return any(sign in said for sign in SIGNS)


def _peak_of_process_mb() -> int:
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8")):
            return int(found[1]) // 2**10
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset // 2**20
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20  # bytes on macOS


@contextmanager
def device_may_fail(device: torch.device) -> Generator[None]:
    """Within the block a device that is lost, hangs or is full stops the run, which can go on: `Refused` (75)."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            full = f"the memory of the {device.type} device is full; close other programs that use it"
            raise Refused(full, RESUMABLE) from None
        if not str(error).startswith("CUDA error"):
            raise
        line = str(error).splitlines()[0]
        raise Refused(f"the {device.type} device fails ({line}); look at its driver and cooling", RESUMABLE) from None
