"""The CUDA path without a card: memory, streams, graphs and the order of all calls are real, only kernels do nothing.

    python tests/played_card/card.py scumble train datasets/samples/clay-style --device cuda --steps 20
    python tests/played_card/card.py pytest tests/test_gpu.py -k nothing_waits
    python tests/played_card/card.py tests/benchmarks/speed.py --device cuda --layouts sd15 sdxl --batches 1

It finds what CUDA would refuse (in a captured pass above all), tensors on two devices, waits, and how much memory is
taken, by torch's own allocator; `PLAYED_GIB` is the size of the card. Losses and pictures are noise, times are those of
the host alone; --optimizer prodigy, which divides by noise, cannot be played. Needs Linux, g++, nm, and torch's build
for CUDA 13, which `pip install torch` takes there. Exit code 3 where a rule of CUDA was broken.
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
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

HERE = Path(__file__).parent
COUNTS = "kernels", "captured kernels", "captures", "replays", "waits", "broken rules"
OF_A_CARD = re.compile("(__)?cuda|cublas|cudnn|cu[A-Z]")
REAL = {"cudnnGetVersion"}
BROKEN = 3


def packages() -> Path:
    """Where torch and NVIDIA's libraries are installed."""
    found = find_spec("torch")
    assert found and found.origin
    return Path(found.origin).parent.parent


def why_not() -> str:
    """Why a card cannot be played here; "" where it can."""
    missing = [tool for tool in ("g++", "nm") if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        return f"a played card needs Linux{''.join(f', {tool}' for tool in missing)}"
    if not (packages() / "nvidia/cu13/include/cuda_runtime_api.h").is_file():
        return "a played card needs torch's build for CUDA 13"
    return "" if not Path("/dev/nvidia0").exists() else "there is a real card"


def names(option: str, *files: Path) -> set[str]:
    """Symbols that object files define or lack."""
    command = ["nm", option, *(["-D"] if files[0].suffix == ".so" else []), *map(str, files)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line and not line.endswith(":")}


def build() -> Path:
    """The played runtime, with a function that returns 0 for each that torch may ask for besides."""
    sources = HERE / "runtime.cpp", HERE / "card.py", packages() / "torch/version.py"
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = Path("/tmp") / f"played-card-{os.getuid()}-{digest}"  # the loader wants no spaces in it
    library = folder / "libplayed.so"
    if library.is_file():
        return library
    folder.mkdir(exist_ok=True)
    includes = [packages() / "nvidia/cu13/include", packages() / "triton/backends/nvidia/include"]
    compiled, rest, others = folder / "runtime.o", folder / "rest.c", folder / "rest.o"
    flags = ["-O1", "-fPIC", "-w", *(f"-I{include}" for include in includes)]
    subprocess.run(["g++", "-std=c++17", *flags, "-c", str(sources[0]), "-o", str(compiled)], check=True)
    asked = names("--undefined-only", *sorted((packages() / "torch/lib").glob("libtorch*.so")))
    asked |= names("--undefined-only", packages() / "torch/lib/libc10_cuda.so")
    missing = sorted(name for name in asked - names("--defined-only", compiled) - REAL if OF_A_CARD.match(name))
    rest.write_text("".join(f'extern "C" int {name}(void) {{ return 0; }}\n' for name in missing), encoding="utf-8")
    subprocess.run(["g++", "-x", "c++", "-w", "-fPIC", "-c", str(rest), "-o", str(others)], check=True)
    part = folder / f"{os.getpid()}.part"
    subprocess.run(["g++", "-shared", "-o", str(part), str(compiled), str(others), "-ldl"], check=True)
    with suppress(FileExistsError):
        (folder / "libcuda.so.1").symlink_to(library.name)  # one library by both names, with one memory of what happens
    return part.replace(library)


def surroundings() -> dict[str, str]:
    """The environment in which a process finds the card."""
    library = build()
    return {**os.environ, "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(library.parent)}


def counts() -> dict[str, int]:
    """What happened until now."""
    found = (ctypes.c_long * len(COUNTS)).in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "played_counts")
    return dict(zip(COUNTS, found, strict=True))


def launches() -> dict[str, int]:
    """How often each kernel was launched, or captured, since this was last asked; copies and memsets, too."""
    with NamedTemporaryFile("r") as file:
        ctypes.CDLL(os.environ["LD_PRELOAD"]).played_write_launches(file.name.encode())
        pairs = (line.split(" ", 1) for line in file.read().splitlines())
        return {name: int(count) for count, name in pairs}


def go_past_numbers() -> None:
    """What looks at numbers finds them good, and samplers, which look into tables by them, keep the picture."""
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
    """A command with its arguments in sys.argv; its exit code."""
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
    if "libplayed" not in os.environ.get("LD_PRELOAD", ""):
        if reason := why_not():
            sys.exit(reason)
        os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:]], surroundings())
    go_past_numbers()
    sys.argv = sys.argv[1:]
    try:
        code = run(sys.argv[0])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    print("played card:", ", ".join(f"{count} {what}" for what, count in counts().items()), flush=True)
    return BROKEN if counts()["broken rules"] else code


if __name__ == "__main__":
    sys.exit(main())
