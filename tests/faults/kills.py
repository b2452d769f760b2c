"""Kill a run again and again, at random instants and in the midst of writing, and compare its end with an unbroken one.

`python tests/faults/kills.py --kills 20` does it for every optimiser, with accumulation, moving average, dropout,
shuffled tags and regularisation pictures, and prints a table. After each kill every adapter and picture that is there
must be whole; at the end the adapter must be the unbroken run's, bit for bit.
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
OPTIMISERS = ["adamw", "adamw8bit", "lion", "prodigy", "adafactor", "schedule_free"]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["scumble.trainer.train"])
HALF_WRITTEN = ("*.part", "*/*.part", "state/.staged-*/*", "state/.staged-*")
PATIENCE_S = 600


@dataclass(frozen=True)
class Survived:
    """Kills while nothing and while something was half written; names of tensors that differ in the end."""

    kills: int
    while_writing: int
    differing: list[str]


def tables_of(optimizer: str, runs: Path, steps: int) -> dict[str, Any]:
    """Options of a run with all that a state must hold."""
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
    """One process's try: begin the run, or go on with it."""
    import torch

    from scumble.configs import files
    from scumble.trainer.train import train

    torch.set_num_threads(1)
    output = tables["output"]
    train(files.resolve(flags=tables), [], go_on=Path(output["output_dir"]) / output["output_name"])


def started(tables: dict[str, Any]) -> BaseProcess:
    process = PROCESSES.Process(target=attempt, args=(tables,))
    process.start()
    return process


def finished(tables: dict[str, Any]) -> float:
    """Let the run go to its end; seconds that it took."""
    before = time.monotonic()
    process = started(tables)
    process.join(PATIENCE_S)
    assert process.exitcode == 0, f"the run ended with {process.exitcode}"
    return time.monotonic() - before


def kill_once(tables: dict[str, Any], run: Path, within_s: float, while_writing: bool, draw: random.Random) -> str:
    """Start, and kill at a random instant or, `while_writing`, as soon as something is half written after it.

    Returns "killed", "killed while writing", or "ended" where the run came to its end before the kill did.
    """
    process = started(tables)
    instant = time.monotonic() + draw.uniform(0, within_s)
    while process.is_alive() and time.monotonic() < instant:
        time.sleep(0.001)
    seen = False
    while process.is_alive() and while_writing and not seen:
        seen = any(next(run.glob(pattern), None) for pattern in HALF_WRITTEN)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"the run ended by itself with {process.exitcode}"
    check_whole(run)
    if process.exitcode == 0:
        return "ended"
    return "killed while writing" if seen else "killed"


def check_whole(run: Path) -> None:
    """Every adapter and every picture that has its final name can be read."""
    from scumble.trainer.adapters.files import read_tensors

    for path in run.rglob("*.safetensors"):
        if ".staged" not in path.parent.name:
            read_tensors(path)
    for path in run.rglob("*.png"):
        Image.open(path).load()


def survive(optimizer: str, kills: int, folder: Path, steps: int = 8, seed: int = 0) -> Survived:
    """Kill a run `kills` times, every other time while it writes, and compare its end with an unbroken run's.

    A run that ends before its kill, as it can on a machine whose load falls, is thrown away and begun again, and that
    kill is not counted.
    """
    import torch

    from scumble.trainer.adapters.files import read_tensors

    draw = random.Random(f"{optimizer}/{seed}")
    whole, cut = tables_of(optimizer, folder / "whole", steps), tables_of(optimizer, folder / "cut", steps)
    whole_s = finished(whole)
    run, within_s = folder / "cut" / "it", 0.9 * whole_s
    ends: list[str] = []
    while len(ends) < kills:
        end = kill_once(cut, run, within_s, len(ends) % 2 == 1, draw)
        if end == "ended":
            shutil.rmtree(run)
            within_s *= 0.8
        else:
            ends.append(end)
    finished(cut)
    ours, theirs = (read_tensors(folder / one / "it" / "it.safetensors")[0] for one in ("cut", "whole"))
    names = ours.keys() | theirs.keys()
    differing = [n for n in names if n not in ours or n not in theirs or not torch.equal(ours[n], theirs[n])]
    return Survived(len(ends), ends.count("killed while writing"), differing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each run")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--optimizer", choices=[*OPTIMISERS, "all"], default="all")
    chosen = parser.parse_args()
    print("| optimiser | kills survived | of them while writing | tensors that differ from an unbroken run |")
    print("|---|---|---|---|")
    for optimizer in OPTIMISERS if chosen.optimizer == "all" else [chosen.optimizer]:
        with TemporaryDirectory() as folder:
            survived = survive(optimizer, chosen.kills, Path(folder), chosen.steps)
        print(f"| {optimizer} | {survived.kills} | {survived.while_writing} | {len(survived.differing)} |", flush=True)


if __name__ == "__main__":
    main()
