"""The CUDA path on a simulated GPU (card.py): refused calls, waits, devices and memory, but no values."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import CHECKOUT
from runs import SAMPLES
from simulated_card.card import unavailable_reason
from tiny import tiny_base

CARD = Path(__file__).with_name("card.py")
REASON = unavailable_reason()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]


def simulated(*arguments: str, gib: float = 80.0) -> tuple[int, str, dict[str, int]]:
    """Run a command on a simulated GPU with `gib` GiB. Returns its exit code, its output and the GPU's counts."""
    command = [sys.executable, str(CARD), *arguments]
    environment = {**os.environ, "SIMULATED_GIB": str(gib), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CHECKOUT)
    output = done.stdout + done.stderr
    lines = re.findall(r"^simulated GPU: (\d+ kernels.*)$", output, re.MULTILINE)
    pairs = re.findall(r"(\d+) ([a-z ]+)", lines[-1]) if lines else []
    return done.returncode, output, {name: int(count) for count, name in pairs}


def train(folder: Path, *flags: str, gib: float = 80.0) -> tuple[int, str, dict[str, int]]:
    return simulated(
        "scumble", "train", str(SAMPLES), "--device", "cuda", "--steps", "6", "--preview-every", "3", "--output-dir",
        str(folder), "--num-inference-steps", "2", *flags, gib=gib,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["sketch", "sd1", "sdxl"])
def test_passes_and_previews_are_captured_and_break_no_rules(kind: str, precision: str, tmp_path: Path):
    base = kind if kind == "sketch" else str(tiny_base(kind, tmp_path))
    options = (
        ["--gradient-checkpointing", "true", "--text-encoder-rank", "4"]
        if kind == "sdxl"
        else ["--ema-decay", "0.9", "--batch-size", "3"]
    )
    code, output, counts = train(
        tmp_path, "--base", base, "--mixed-precision", precision, "--resolution", "64", *options
    )
    assert (code, counts["broken rules"]) == (0, 0), output
    assert counts["captured kernels"] > 1000 and counts["replays"] >= 6 + 3 * 2
    assert "CUDA graphs are off" not in output and "Pipelines loaded with" not in output


@pytest.mark.parametrize(
    "option", ["--algorithm dora", "--base-quantization int8", "--base-quantization nf4", "--optimizer lion"]
)
def test_other_adapters_bases_and_optimizers_break_no_rules(option: str, tmp_path: Path):
    code, output, counts = train(tmp_path, "--base", "sketch", *option.split())
    assert (code, counts["broken rules"]) == (0, 0), output
    assert "CUDA graphs are off" not in output


def test_a_run_on_a_small_gpu_reduces_its_memory_and_renders_previews(tmp_path: Path):
    small = ["--base", "sketch", "--batch-size", "8", "--resolution", "512", "--preview-size", "64"]
    code, output, _ = train(tmp_path, *small, gib=0.6)
    assert code == 0, output
    assert "gradient checkpointing for some blocks" in output and "is skipped" not in output
    code, output, _ = train(tmp_path, *small, "--output-name", "smaller", gib=0.2)
    assert code == 69 and "does not fit into the memory" in output.splitlines()[-1] and "Traceback" not in output


def test_a_preview_that_does_not_fit_is_refused_in_one_line(tmp_path: Path):
    code, output, _ = simulated("scumble", "preview", "--out", str(tmp_path / "grid.png"), gib=0.02)
    assert code == 75 and "Traceback" not in output and "the cuda device is out of memory" in output


def test_a_step_launches_fewer_kernels_than_the_plain_loop_and_stock_kernels(tmp_path: Path):
    table = tmp_path / "table.md"
    code, output, _ = simulated("tests/benchmarks/launches.py", "--layouts", "sketch", "--out", str(table))
    assert code == 0, output
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines() if line.startswith("| sketch")]
    counts = {row[1]: int(row[-1].replace(",", "")) for row in rows}
    assert counts["scumble"] < 0.9 * counts["scumble with stock kernels"] < 0.7 * counts["plain loop"]


def test_tests_that_need_a_gpu_but_no_values_pass():
    selected = "nothing_waits or second_shape or does_not_fit or fewer_bits"
    code, output, counts = simulated("pytest", "tests/test_gpu.py", "-k", selected)
    assert (code, counts["broken rules"]) == (0, 0) and "4 passed" in output, output


def test_the_simulated_gpu_refuses_and_reports_what_cuda_refuses():
    """Otherwise the other tests could not fail."""
    selected = "cannot_be_captured"
    code, output, counts = simulated("pytest", "tests/test_gpu.py", "-k", selected, "-s")
    assert (code, counts["broken rules"]) == (3, 1) and "1 passed" in output, output
    assert "simulated GPU: cudaStreamSynchronize on a capturing stream or event" in output
