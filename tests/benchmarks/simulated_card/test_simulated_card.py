"""The CUDA path on a played card, see played_card/card.py: what CUDA refuses, waits, devices, memory; no numbers."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from paths import CHECKOUT
from runs import SAMPLES
from simulated_card.card import why_not
from tiny import tiny_base

HERE, TRIED = Path(__file__).parent, "2.11."  # another torch may ask the card for more
REASON = why_not() or ("" if version("torch").startswith(TRIED) else f"the card is tried with torch {TRIED}x alone")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]


def played(*arguments: str, gib: float = 80.0) -> tuple[int, str, dict[str, int]]:
    """Exit code, output, and what the card counted, of a command on a card of so many GiB."""
    command = [sys.executable, str(HERE / "card.py"), *arguments]
    surroundings = {**os.environ, "PLAYED_GIB": str(gib), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, cwd=CHECKOUT / "tests")
    output = done.stdout + done.stderr
    last = re.findall(r"^played card: (\d+ kernels.*)$", output, re.MULTILINE)
    found = re.findall(r"(\d+) ([a-z ]+)", last[-1]) if last else []
    return done.returncode, output, {what: int(count) for count, what in found}


def trained(folder: Path, *flags: str, gib: float = 80.0) -> tuple[int, str, dict[str, int]]:
    return played(
        "scumble", "train", str(SAMPLES), "--device", "cuda", "--steps", "6", "--preview-every", "3", "--runs",
        str(folder), "--preview-steps", "2", *flags, gib=gib,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["sketch", "sd1", "sdxl"])
def test_passes_and_previews_are_captured_and_break_no_rule(kind: str, precision: str, tmp_path: Path):
    base = kind if kind == "sketch" else str(tiny_base(kind, tmp_path))
    more = ["--checkpointing", "true", "--text-rank", "4"] if kind == "sdxl" else ["--ema", "0.9", "--batch", "3"]
    code, output, counts = trained(tmp_path, "--base", base, "--precision", precision, "--resolution", "64", *more)
    assert (code, counts["broken rules"]) == (0, 0), output
    assert counts["captured kernels"] > 1000 and counts["replays"] >= 6 + 3 * 2
    assert "CUDA graphs are off" not in output and "Pipelines loaded with" not in output


@pytest.mark.parametrize("kind", ["--network dora", "--quantize int8", "--quantize nf4", "--optimizer lion"])
def test_other_kinds_of_adapters_bases_and_optimisers_break_no_rule(kind: str, tmp_path: Path):
    code, output, counts = trained(tmp_path, "--base", "sketch", *kind.split())
    assert (code, counts["broken rules"]) == (0, 0), output
    assert "CUDA graphs are off" not in output


def test_a_small_card_is_met_with_less_at_once_and_previews_are_painted(tmp_path: Path):
    small = ["--base", "sketch", "--batch", "8", "--resolution", "512", "--preview-size", "64"]
    code, output, _ = trained(tmp_path, *small, gib=0.6)
    assert code == 0, output
    assert "some activations are recomputed" in output and "left out" not in output
    code, output, _ = trained(tmp_path, *small, "--name", "smaller", gib=0.2)
    assert code == 69 and "does not fit into the memory" in output.splitlines()[-1] and "Traceback" not in output


def test_a_preview_that_does_not_fit_is_refused_in_one_line(tmp_path: Path):
    code, output, _ = played("scumble", "preview", "--out", str(tmp_path / "grid.png"), gib=0.02)
    assert code == 75 and "Traceback" not in output and "the memory of the cuda device is full" in output


def test_a_step_launches_fewer_kernels_than_a_plain_loops_and_stock_ones(tmp_path: Path):
    table = tmp_path / "table.md"
    code, output, _ = played("tests/benchmarks/launches.py", "--layouts", "sketch", "--out", str(table))
    assert code == 0, output
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines() if line.startswith("| sketch")]
    count = {row[1]: int(row[-1].replace(",", "")) for row in rows}
    assert count["ours"] < 0.9 * count["ours with stock kernels"] < 0.7 * count["plain loop"]


def test_what_needs_a_card_but_no_numbers_holds():
    wanted = "nothing_waits or second_shape or does_not_fit or fewer_bits"
    code, output, counts = played("pytest", "tests/test_gpu.py", "-k", wanted)
    assert (code, counts["broken rules"]) == (0, 0) and "4 passed" in output, output


def test_what_cuda_refuses_is_refused_and_told():
    """The card itself: else nothing here could fail."""
    wanted = "cannot_be_captured"
    code, output, counts = played("pytest", "tests/test_gpu.py", "-k", wanted, "-s")
    assert (code, counts["broken rules"]) == (3, 1) and "1 passed" in output, output
    assert "played card: cudaStreamSynchronize for what is captured" in output
