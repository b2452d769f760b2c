"""Fused Triton kernels: correct in Triton's interpreter, compiled for other GPUs, and not used where they fail."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import CHECKOUT
from small_parts import unet

from scumble.trainer.kernels import fused_norms

COMPILED = """
import json, sys
from itertools import product
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from scumble.trainer.kernels import triton_kernels as kernels

KINDS = {"partial": "*fp32", "moments": "*fp32", "eps": "fp32", **dict.fromkeys((*kernels.SIZES, "width"), "i32")}
sizes = {}
VARIANTS = [{"SHIFTED": True, "SILU": True}, {"SHIFTED": False, "SILU": True}, {"SHIFTED": False, "SILU": False}]
for capability, variant in product(map(int, sys.argv[1:]), VARIANTS):
    for name in ("_moments", "_normalized", "_sums", "_gradients", "_geglu", "_geglu_gradients"):
        function = getattr(kernels, name)
        constants = {one: variant.get(one, getattr(kernels, one, None)) for one in function.arg_names if one.isupper()}
        kinds = {one: "constexpr" if one in constants else KINDS.get(one, "*bf16") for one in function.arg_names}
        kernel = triton.compile(ASTSource(function, kinds, constants), target=GPUTarget("cuda", capability, 32))
        sizes[f"{name} {capability} {list(constants.values())}"] = len(kernel.asm["cubin"])
print(json.dumps(sizes))
"""


@pytest.mark.slow
def test_in_tritons_interpreter_the_kernels_match_torch_and_diffusers():
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(CHECKOUT / "tests/trainer/kernels/interpreted_kernels.py"),
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CHECKOUT)
    assert done.returncode == 0 and re.search(r"\d{2,} passed", done.stdout), done.stdout[-4000:]


@pytest.mark.slow
def test_kernels_compile_for_gpus_that_this_machine_does_not_have(tmp_path: Path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED, "80", "90"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    sizes = json.loads(done.stdout)
    assert len(sizes) == 2 * 13 and min(sizes.values()) > 1000


@pytest.mark.parametrize("error", [ImportError("no"), RuntimeError("Failed to find C compiler.\nmore")])
def test_if_the_kernels_cannot_be_used_the_unet_does_not_change_and_the_reason_is_returned(
    error: Exception, monkeypatch: pytest.MonkeyPatch
):
    def failing(name: str) -> None:
        raise error

    monkeypatch.setattr(fused_norms, "import_module", failing)
    fused_norms.why_not.cache_clear()
    try:
        reason = fused_norms.fuse(model := unet())
    finally:
        fused_norms.why_not.cache_clear()
    assert reason == (
        "Triton is not installed" if isinstance(error, ImportError) else "RuntimeError: Failed to find C compiler."
    )
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.isfinite(model(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 7, 24)).sample).all()
