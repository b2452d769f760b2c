"""The CUDA path on a simulated GPU (card.py): calls that CUDA refuses, waits, devices and memory, but no values."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import CHECKOUT
from runs import SAMPLES
from simulated_card.card import why_not
from tiny import tiny_base

CARD = Path(__file__).with_name("card.py")
REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]


def simulated(*arguments: str, gib: float = 80.0) -> tuple[int, str, dict[str, int]]:
    """Run a command on a simulated GPU with so many GiB; return its exit code, its output and the GPU's counts."""
    command = [sys.executable, str(CARD), *arguments]
    surroundings = {**os.environ, "SIMULATED_GIB": str(gib), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, cwd=CHECKOUT)
    output = done.stdout + done.stderr
    last = re.findall(r"^simulated GPU: (\d+ kernels.*)$", output, re.MULTILINE)
    found = re.findall(r"(\d+) ([a-z ]+)", last[-1]) if last else []
    return done.returncode, output, {what: int(count) for count, what in found}


def trained(folder: Path, *flags: str, gib: float = 80.0) -> tuple[int, str, dict[str, int]]:
    return simulated(
        "scumble", "train", str(SAMPLES), "--device", "cuda", "--steps", "6", "--preview-every", "3", "--output-dir",
        str(folder), "--num-inference-steps", "2", *flags, gib=gib,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["sketch", "sd1", "sdxl"])
def test_passes_and_previews_are_captured_and_break_no_rule(kind: str, precision: str, tmp_path: Path):
    base = kind if kind == "sketch" else str(tiny_base(kind, tmp_path))
    more = (
        ["--gradient-checkpointing", "true", "--text-encoder-rank", "4"]
        if kind == "sdxl"
        else ["--ema-decay", "0.9", "--batch-size", "3"]
    )
    code, output, counts = trained(
        tmp_path, "--base", base, "--mixed-precision", precision, "--resolution", "64", *more
    )
    assert (code, counts["broken rules"]) == (0, 0), output
    assert counts["captured kernels"] > 1000 and counts["replays"] >= 6 + 3 * 2
    assert "CUDA graphs are off" not in output and "Pipelines loaded with" not in output


@pytest.mark.parametrize(
    "kind", ["--algorithm dora", "--base-quantization int8", "--base-quantization nf4", "--optimizer lion"]
)
def test_other_kinds_of_adapters_bases_and_optimisers_break_no_rule(kind: str, tmp_path: Path):
    code, output, counts = trained(tmp_path, "--base", "sketch", *kind.split())
    assert (code, counts["broken rules"]) == (0, 0), output
    assert "CUDA graphs are off" not in output


def test_a_run_on_a_small_gpu_uses_less_memory_at_once_and_previews_are_painted(tmp_path: Path):
    small = ["--base", "sketch", "--batch-size", "8", "--resolution", "512", "--preview-size", "64"]
    code, output, _ = trained(tmp_path, *small, gib=0.6)
    assert code == 0, output
    assert "some activations are recomputed" in output and "left out" not in output
    code, output, _ = trained(tmp_path, *small, "--output-name", "smaller", gib=0.2)
    assert code == 69 and "does not fit into the memory" in output.splitlines()[-1] and "Traceback" not in output


def test_a_preview_that_does_not_fit_is_refused_in_one_line(tmp_path: Path):
    code, output, _ = simulated("scumble", "preview", "--out", str(tmp_path / "grid.png"), gib=0.02)
    assert code == 75 and "Traceback" not in output and "the memory of the cuda device is full" in output


def test_a_step_launches_fewer_kernels_than_a_plain_loops_and_stock_ones(tmp_path: Path):
    table = tmp_path / "table.md"
    code, output, _ = simulated("tests/benchmarks/launches.py", "--layouts", "sketch", "--out", str(table))
    assert code == 0, output
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines() if line.startswith("| sketch")]
    count = {row[1]: int(row[-1].replace(",", "")) for row in rows}
    assert count["ours"] < 0.9 * count["ours with stock kernels"] < 0.7 * count["plain loop"]


def test_tests_that_need_a_gpu_but_no_values_pass():
    wanted = "nothing_waits or second_shape or does_not_fit or fewer_bits"
    code, output, counts = simulated("pytest", "tests/test_gpu.py", "-k", wanted)
    assert (code, counts["broken rules"]) == (0, 0) and "4 passed" in output, output


def test_the_simulated_gpu_refuses_and_reports_what_cuda_refuses():
    """Without this, the other tests could not fail."""
    wanted = "cannot_be_captured"
    code, output, counts = simulated("pytest", "tests/test_gpu.py", "-k", wanted, "-s")
    assert (code, counts["broken rules"]) == (3, 1) and "1 passed" in output, output
    assert "simulated GPU: cudaStreamSynchronize for what is captured" in output
