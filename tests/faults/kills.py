"""Kill a run repeatedly, at random instants and during writes, and compare its result with an uninterrupted run.

`python tests/faults/kills.py --kills 20` tests every optimizer, with gradient accumulation, EMA, dropout, shuffled tags
and regularization images, and prints a table. After each kill, all existing adapters and images must be intact. At the
end, the adapter must equal that of the uninterrupted run bit for bit.
"""

import argparse
import multiprocessing
import random
import shutil
import signal
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

SAMPLES = Path(__file__).parent.parent.parent / "datasets/samples"
OPTIMIZERS = ["adamw", "adamw8bit", "lion", "prodigy", "adafactor", "schedule_free"]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["scumble.trainer.train"])
HALF_WRITTEN = ("*.part", "*/*.part", "state/.staged-*/*", "state/.staged-*")
TIMEOUT_S = 600


@dataclass(frozen=True)
class KillTestResult:
    """All kills, kills during a write, and the names of tensors that differ at the end."""

    kills: int
    while_writing: int
    differing: list[str]


def tables_of(optimizer: str, runs: Path, steps: int) -> dict[str, Any]:
    """Options of a run that uses everything that a state must contain."""
    return {
        "data": {
            "images": str(SAMPLES / "clay-cat"), "regularization_images": str(SAMPLES / "clay-style"),
            "shuffle_tags": True,
            "caption_dropout": 0.2, "random_flip": True,
        },
        "network": {"rank": 4, "text_encoder_rank": 2, "lora_dropout": 0.1},
        "optimization": {
            "optimizer": optimizer, "steps": steps, "batch_size": 2, "gradient_accumulation_steps": 2,
            "ema_decay": 0.0 if optimizer == "schedule_free" else 0.9,
        },
        "machine": {"device": "cpu", "mixed_precision": "fp32"},
        "previews": {"prompts": ("cat, clay style",), "num_inference_steps": 2},
        "output": {
            "output_dir": str(runs), "output_name": "it", "preview_every": 2, "save_every": 2, "save_precision": "fp32",
        },
    }  # fmt: skip


def attempt(tables: dict[str, Any]) -> None:
    """Start or resume the run (in a process of its own)."""
    import torch

    from scumble.configs import files
    from scumble.trainer.train import train

    torch.set_num_threads(1)
    output = tables["output"]
    train(files.resolve(flags=tables), [], resume=Path(output["output_dir"]) / output["output_name"])


def start_process(tables: dict[str, Any]) -> BaseProcess:
    process = PROCESSES.Process(target=attempt, args=(tables,))
    process.start()
    return process


def run_to_end(tables: dict[str, Any]) -> float:
    """Run until the end. Returns the duration in seconds."""
    started_s = time.monotonic()
    process = start_process(tables)
    process.join(TIMEOUT_S)
    assert process.exitcode == 0, f"the run exited with {process.exitcode}"
    return time.monotonic() - started_s


def kill_once(tables: dict[str, Any], run: Path, within_s: float, while_writing: bool, rng: random.Random) -> str:
    """Start the run and kill it at a random instant or, if `while_writing`, during the next write after it.

    Returns "killed", "killed while writing", or "ended" if the run finished before the kill.
    """
    process = start_process(tables)
    instant = time.monotonic() + rng.uniform(0, within_s)
    while process.is_alive() and time.monotonic() < instant:
        time.sleep(0.001)
    is_writing = False
    while process.is_alive() and while_writing and not is_writing:
        is_writing = any(next(run.glob(pattern), None) for pattern in HALF_WRITTEN)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"the run exited with {process.exitcode} before it was killed"
    check_files(run)
    if process.exitcode == 0:
        return "ended"
    return "killed while writing" if is_writing else "killed"


def check_files(run: Path) -> None:
    """Check that all adapters and images with their final name can be read."""
    from scumble.trainer.adapters.files import read_tensors

    for path in run.rglob("*.safetensors"):
        if ".staged" not in path.parent.name:
            read_tensors(path)
    for path in run.rglob("*.png"):
        Image.open(path).load()


def run_kill_test(optimizer: str, kills: int, folder: Path, steps: int = 8, seed: int = 0) -> KillTestResult:
    """Kill a run `kills` times, every other time during a write, and compare its result with an uninterrupted run.

    If the run finishes before it is killed, for example because the machine is less busy, it is deleted and started
    again. That kill does not count.
    """
    import torch

    from scumble.trainer.adapters.files import read_tensors

    rng = random.Random(f"{optimizer}/{seed}")
    expected, killed = (tables_of(optimizer, folder / name, steps) for name in ("expected", "killed"))
    run, within_s = folder / "killed" / "it", 0.9 * run_to_end(expected)
    ends: list[str] = []
    while len(ends) < kills:
        end = kill_once(killed, run, within_s, len(ends) % 2 == 1, rng)
        if end == "ended":
            shutil.rmtree(run)
            within_s *= 0.8
        else:
            ends.append(end)
    run_to_end(killed)
    ours, theirs = (read_tensors(folder / one / "it" / "it.safetensors")[0] for one in ("killed", "expected"))
    names = ours.keys() | theirs.keys()
    differing = [n for n in names if n not in ours or n not in theirs or not torch.equal(ours[n], theirs[n])]
    return KillTestResult(len(ends), ends.count("killed while writing"), differing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills per optimizer")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--optimizer", choices=[*OPTIMIZERS, "all"], default="all")
    chosen = parser.parse_args()
    print("| optimizer | kills | during a write | tensors that differ from an uninterrupted run |")
    print("|---|---|---|---|")
    for optimizer in OPTIMIZERS if chosen.optimizer == "all" else [chosen.optimizer]:
        with TemporaryDirectory() as folder:
            result = run_kill_test(optimizer, chosen.kills, Path(folder), chosen.steps)
        print(f"| {optimizer} | {result.kills} | {result.while_writing} | {len(result.differing)} |", flush=True)


if __name__ == "__main__":
    main()
