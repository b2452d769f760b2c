"""Run the CUDA path on a simulated GPU: memory, streams, graphs and the order of calls are real, kernels do nothing.

    python tests/benchmarks/simulated_card/card.py scumble train datasets/samples/clay-style --device cuda --steps 20
    python tests/benchmarks/simulated_card/card.py pytest tests/test_gpu.py -k nothing_waits
    python tests/benchmarks/simulated_card/card.py tests/benchmarks/speed.py --device cuda --layouts sd15 --batches 1
    python tests/benchmarks/simulated_card/card.py check

A library that is preloaded into torch's CUDA build replaces CUDA, cuBLAS and cuDNN. It detects calls that CUDA would
refuse (above all in a captured pass), operations on tensors of two devices, and waits for the GPU; it shows how much
memory torch's own allocator reserves. `SIMULATED_GIB` is the size of the GPU memory. Losses and images are noise, and
times are those of the host only. --optimizer prodigy cannot be simulated, since it divides by noise. `check` reports
whether the simulation can run on this machine, and if not, what to install. Requires Linux, g++, nm, and torch 2.11 for
CUDA 13, the default build on PyPI for Linux. The exit code is 3 if a rule of CUDA was broken.
"""

import ctypes
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

HERE = Path(__file__).parent
COUNTS = "kernels", "captured kernels", "captures", "replays", "waits", "broken rules"
CUDA_SYMBOL = re.compile("(__)?cuda|cublas|cudnn|cu[A-Z]")
REAL = {"cudnnGetVersion"}
TESTED = "2.11."  # other versions may call functions that runtime.cpp does not implement correctly
INSTALL = "make simulated-card VENV=build/simulated TORCH=torch==2.11.0"
BROKEN = 3


def packages() -> Path:
    """The folder in which torch and NVIDIA's libraries are installed."""
    found = find_spec("torch")
    assert found and found.origin
    return Path(found.origin).parent.parent


def unavailable_reason() -> str:
    """The reason why the simulated GPU cannot run on this machine, and what to install; "" if it can."""
    missing = [tool for tool in ("g++", "nm") if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        return f"the simulated GPU needs Linux{''.join(f', {tool}' for tool in missing)}"
    torch = version("torch")
    if not torch.startswith(TESTED) or not (packages() / "nvidia/cu13/include/cuda_runtime_api.h").is_file():
        return f"the simulated GPU needs torch {TESTED}x for CUDA 13, but {torch} is installed; run: {INSTALL}"
    return "" if not Path("/dev/nvidia0").exists() else "the simulated GPU is disabled: this machine has a real GPU"


def names(option: str, *files: Path) -> set[str]:
    """The symbols that object files define or require."""
    command = ["nm", option, *(["-D"] if files[0].suffix == ".so" else []), *map(str, files)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line and not line.endswith(":")}


def build() -> Path:
    """Build the library. Functions that torch may need and runtime.cpp does not define return 0."""
    sources = HERE / "runtime.cpp", HERE / "card.py", packages() / "torch/version.py"
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = Path("/tmp") / f"simulated-gpu-{os.getuid()}-{digest}"  # LD_PRELOAD does not support spaces in paths
    library = folder / "libsimulated.so"
    if library.is_file():
        return library
    folder.mkdir(exist_ok=True)
    includes = [packages() / "nvidia/cu13/include", packages() / "triton/backends/nvidia/include"]
    compiled, stubs, compiled_stubs = folder / "runtime.o", folder / "stubs.c", folder / "stubs.o"
    flags = ["-O1", "-fPIC", "-w", *(f"-I{include}" for include in includes)]
    subprocess.run(["g++", "-std=c++17", *flags, "-c", str(sources[0]), "-o", str(compiled)], check=True)
    required = names("--undefined-only", *sorted((packages() / "torch/lib").glob("libtorch*.so")))
    required |= names("--undefined-only", packages() / "torch/lib/libc10_cuda.so")
    missing = sorted(name for name in required - names("--defined-only", compiled) - REAL if CUDA_SYMBOL.match(name))
    stubs.write_text("".join(f'extern "C" int {name}(void) {{ return 0; }}\n' for name in missing), encoding="utf-8")
    subprocess.run(["g++", "-x", "c++", "-w", "-fPIC", "-c", str(stubs), "-o", str(compiled_stubs)], check=True)
    part = folder / f"{os.getpid()}.part"
    subprocess.run(["g++", "-shared", "-o", str(part), str(compiled), str(compiled_stubs), "-ldl"], check=True)
    with suppress(FileExistsError):
        (folder / "libcuda.so.1").symlink_to(library.name)  # one library with one state, under both names
    return part.replace(library)


def environment() -> dict[str, str]:
    """The environment variables for a process that uses the simulated GPU."""
    library = build()
    return {**os.environ, "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(library.parent)}


def counts() -> dict[str, int]:
    """The current values of `COUNTS`."""
    found = (ctypes.c_long * len(COUNTS)).in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "simulated_counts")
    return dict(zip(COUNTS, found, strict=True))


def launches() -> dict[str, int]:
    """How often each kernel, copy and memset was launched or captured since the last call of this function."""
    with NamedTemporaryFile("r") as file:
        ctypes.CDLL(os.environ["LD_PRELOAD"]).simulated_write_launches(file.name.encode())
        pairs = (line.split(" ", 1) for line in file.read().splitlines())
        return {name: int(count) for count, name in pairs}


def ignore_values() -> None:
    """Let checks of values pass, and let samplers, which index tables by values, return their input."""
    import torch

    from scumble.trainer.previews.sampling import SAMPLERS

    original = torch.Tensor.__bool__

    def is_true(self: torch.Tensor) -> bool:
        value = original(self)
        return value or (self.is_cuda and self.dtype == torch.bool)

    setattr(torch.Tensor, "__bool__", is_true)  # noqa: B010
    torch.backends.cuda.enable_cudnn_sdp(False)
    replaced: dict[str, Callable[..., Any]] = {
        "step": lambda self, noise, timestep, sample, **others: (sample + noise,),
        "scale_model_input": lambda self, sample, *others: sample,
    }
    for sampler in SAMPLERS.values():
        for name, function in replaced.items():
            setattr(sampler, name, function)


def run(command: str) -> int:
    """Run a command with the arguments in sys.argv and return its exit code."""
    if command == "scumble":
        from scumble.trainer.cli import main as scumble

        scumble(sys.argv[1:])
    elif command == "pytest":
        import pytest

        return int(pytest.main(sys.argv[1:]))
    else:
        sys.path[:0] = [str(Path(command).parent), str(HERE.parent)]
        runpy.run_path(command, run_name="__main__")
    return 0


def main() -> int:
    if sys.argv[1:] == ["check"]:
        sys.exit(unavailable_reason() or 0)
    if "libsimulated" not in os.environ.get("LD_PRELOAD", ""):
        if reason := unavailable_reason():
            sys.exit(reason)
        os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:]], environment())
    ignore_values()
    sys.argv = sys.argv[1:]
    try:
        code = run(sys.argv[0])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    print("simulated GPU:", ", ".join(f"{count} {name}" for name, count in counts().items()), flush=True)
    return BROKEN if counts()["broken rules"] else code


if __name__ == "__main__":
    sys.exit(main())
