"""Run the CUDA path on a simulated GPU: memory, streams, graphs and call order are real, kernels do nothing.

    python tests/benchmarks/simulated_card/card.py scumble train datasets/samples/clay-style --device cuda --steps 20
    python tests/benchmarks/simulated_card/card.py pytest tests/test_gpu.py -k nothing_waits
    python tests/benchmarks/simulated_card/card.py tests/benchmarks/speed.py --device cuda --layouts sd15 --batches 1
    python tests/benchmarks/simulated_card/card.py check

A runtime that is preloaded under torch's CUDA build stands in for CUDA, cuBLAS and cuDNN. It finds calls that CUDA
would refuse (above all in a captured pass), tensors on two devices, waits, and how much memory torch's own allocator
takes. `SIMULATED_GIB` is the size of the GPU's memory. Losses and pictures are noise; times are those of the host only.
--optimizer prodigy cannot be simulated: it divides by noise. `check` says whether the simulation can run here, and what
to install if not. Needs Linux, g++, nm, and torch 2.11 for CUDA 13, the default build on PyPI for Linux. The exit code
is 3 if a rule of CUDA was broken.
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
TESTED = "2.11."  # another torch may call functions that the runtime answers wrongly
INSTALL = "make simulated-card VENV=build/simulated TORCH=torch==2.11.0"
BROKEN = 3


def packages() -> Path:
    """Where torch and NVIDIA's libraries are installed."""
    found = find_spec("torch")
    assert found and found.origin
    return Path(found.origin).parent.parent


def why_not() -> str:
    """Why the simulated GPU cannot run here, and what to install; "" if it can."""
    missing = [tool for tool in ("g++", "nm") if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        return f"the simulated GPU needs Linux{''.join(f', {tool}' for tool in missing)}"
    torch = version("torch")
    if not torch.startswith(TESTED) or not (packages() / "nvidia/cu13/include/cuda_runtime_api.h").is_file():
        return f"the simulated GPU needs torch {TESTED}x for CUDA 13, and {torch} is installed; run: {INSTALL}"
    return "" if not Path("/dev/nvidia0").exists() else "the simulated GPU is off: this machine has a real one"


def names(option: str, *files: Path) -> set[str]:
    """Symbols that object files define or need."""
    command = ["nm", option, *(["-D"] if files[0].suffix == ".so" else []), *map(str, files)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line and not line.endswith(":")}


def build() -> Path:
    """The runtime; functions that torch may need and runtime.cpp lacks return 0."""
    sources = HERE / "runtime.cpp", HERE / "card.py", packages() / "torch/version.py"
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = Path("/tmp") / f"simulated-gpu-{os.getuid()}-{digest}"  # LD_PRELOAD takes no path with spaces
    library = folder / "libsimulated.so"
    if library.is_file():
        return library
    folder.mkdir(exist_ok=True)
    includes = [packages() / "nvidia/cu13/include", packages() / "triton/backends/nvidia/include"]
    compiled, rest, others = folder / "runtime.o", folder / "rest.c", folder / "rest.o"
    flags = ["-O1", "-fPIC", "-w", *(f"-I{include}" for include in includes)]
    subprocess.run(["g++", "-std=c++17", *flags, "-c", str(sources[0]), "-o", str(compiled)], check=True)
    asked = names("--undefined-only", *sorted((packages() / "torch/lib").glob("libtorch*.so")))
    asked |= names("--undefined-only", packages() / "torch/lib/libc10_cuda.so")
    missing = sorted(name for name in asked - names("--defined-only", compiled) - REAL if CUDA_SYMBOL.match(name))
    rest.write_text("".join(f'extern "C" int {name}(void) {{ return 0; }}\n' for name in missing), encoding="utf-8")
    subprocess.run(["g++", "-x", "c++", "-w", "-fPIC", "-c", str(rest), "-o", str(others)], check=True)
    part = folder / f"{os.getpid()}.part"
    subprocess.run(["g++", "-shared", "-o", str(part), str(compiled), str(others), "-ldl"], check=True)
    with suppress(FileExistsError):
        (folder / "libcuda.so.1").symlink_to(library.name)  # one library under both names, with one state
    return part.replace(library)


def surroundings() -> dict[str, str]:
    """The environment in which a process finds the simulated GPU."""
    library = build()
    return {**os.environ, "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(library.parent)}


def counts() -> dict[str, int]:
    """How often each of COUNTS happened so far."""
    found = (ctypes.c_long * len(COUNTS)).in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "simulated_counts")
    return dict(zip(COUNTS, found, strict=True))


def launches() -> dict[str, int]:
    """How often each kernel, copy and memset was launched or captured since the last call of this function."""
    with NamedTemporaryFile("r") as file:
        ctypes.CDLL(os.environ["LD_PRELOAD"]).simulated_write_launches(file.name.encode())
        pairs = (line.split(" ", 1) for line in file.read().splitlines())
        return {name: int(count) for count, name in pairs}


def ignore_values() -> None:
    """Let checks of values pass, and let samplers, which index tables by values, keep the picture."""
    import torch

    from scumble.trainer.previews.sampling import SAMPLERS

    is_true = torch.Tensor.__bool__

    def good(self: torch.Tensor) -> bool:
        found = is_true(self)
        return found or (self.is_cuda and self.dtype == torch.bool)

    setattr(torch.Tensor, "__bool__", good)  # noqa: B010
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
        sys.exit(why_not() or 0)
    if "libsimulated" not in os.environ.get("LD_PRELOAD", ""):
        if reason := why_not():
            sys.exit(reason)
        os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:]], surroundings())
    ignore_values()
    sys.argv = sys.argv[1:]
    try:
        code = run(sys.argv[0])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    print("simulated GPU:", ", ".join(f"{count} {what}" for what, count in counts().items()), flush=True)
    return BROKEN if counts()["broken rules"] else code


if __name__ == "__main__":
    sys.exit(main())
