"""Device, precision and memory of the machine."""

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

WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as in accelerate
OUT_OF_MEMORY_MESSAGES = (  # of the CPU allocator, CUDA libraries and Metal, which raise plain RuntimeErrors
    "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED", "CUDA error: out of memory",
    "MPS backend out of memory", "Invalid buffer size",
)  # fmt: skip
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def make_accelerator(machine: Machine) -> tuple[Accelerator, torch.dtype]:
    """Create the accelerator, and return it with the dtype of the frozen base. The adapter is always fp32.

    Automatic precision is bf16 on CUDA devices that support it, fp16 on older ones, bf16 on CPUs with fast bf16
    products, and fp32 elsewhere. Raises `Refused` if the device is not available or does not support the precision.
    """
    if machine.device not in ("auto", *available_devices()):
        raise Refused(f"--device {machine.device}: torch finds no such device on this machine; use auto")
    device = best_device() if machine.device == "auto" else machine.device
    precision = machine.mixed_precision
    if precision == "auto":
        precision = auto_precision(device)
    if precision == "fp16" and device != "cuda":
        raise Refused(f"--mixed-precision fp16: not supported on the {device} device; use bf16 or fp32")
    if precision == "bf16" and device == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise Refused("--mixed-precision bf16: requires macOS 14 on the mps device; use fp32")
    mixed = "no" if precision == "fp32" else precision
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run may have used another device
    return Accelerator(cpu=device == "cpu", mixed_precision=mixed), DTYPES[precision]


def available_devices() -> list[str]:
    """The device types that torch can use on this machine, fastest first."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind, is_usable in usable.items() if is_usable]


def best_device() -> str:
    """The fastest available device type."""
    return available_devices()[0]


def auto_precision(device: str) -> str:
    """The fastest precision that is safe on the device: bf16, fp16 or fp32."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device == "cpu":
        return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    return "fp32"


def check_single_process() -> None:
    """Raises `Refused` if a launcher (accelerate, torchrun, MPI) started several processes."""
    for name in WORLD_SIZE_VARIABLES:
        if (size := os.environ.get(name, "1")) not in ("", "0", "1"):
            raise Refused(
                f"{name}={size}: a run uses one process on one device; start it without a launcher or with "
                "--num_processes 1"
            )


def check_attention(attention: str, device: str) -> None:
    """Raises `Refused` if xformers is requested on a device other than CUDA, and (69) if it is not installed."""
    if attention == "xformers" and device != "cuda":
        raise Refused(
            f"--attention xformers: supports only cuda devices, and this run uses {device}; use --attention sdpa"
        )
    if attention == "xformers" and find_spec("xformers") is None:
        raise Refused('--attention xformers: not installed; pip install "scumble[xformers]"', UNAVAILABLE)


def memory_mb(device: torch.device) -> int:
    """Peak memory since `reset_peak_memory`, of the CUDA device or of this process; on MPS, what torch holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() // 2**20
    return _peak_of_process_mb()


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak to the current memory use, if supported. Mapping the files of a base raises the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def total_memory_mb(device: torch.device) -> int:
    """Total memory of the CUDA device or of the machine; on MPS, the limit that Metal recommends for a process."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2**20
    if device.type == "mps":
        return torch.mps.recommended_max_memory() // 2**20
    return psutil.virtual_memory().total // 2**20


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to the device. Copies to CUDA use pinned memory and are asynchronous."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class AsyncValue:
    """Numbers that are being copied from a device. `values` waits for them, but not for work queued later."""

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
    """Seed the generators of the CPU and the device. torch.manual_seed checks all device types, which takes 1 ms."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def free_unused() -> None:
    """Collect reference cycles, and release the memory that torch caches on the device."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that the device or the machine is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES)


def _peak_of_process_mb() -> int:
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8")):
            return int(found[1]) // 2**10
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset // 2**20
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20  # bytes on macOS


@contextmanager
def device_may_fail(device: torch.device) -> Generator[None]:
    """Raises `Refused` (75, resumable) if a device is lost, hangs or runs out of memory within the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            message = f"the {device.type} device is out of memory; close other programs that use it"
            raise Refused(message, RESUMABLE) from None
        if not str(error).startswith("CUDA error"):
            raise
        line = str(error).splitlines()[0]
        raise Refused(f"the {device.type} device failed ({line}); check its driver and cooling", RESUMABLE) from None
