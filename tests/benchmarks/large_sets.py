"""Time and memory of sets of any size: check-up, plan, latents encoded, kept and streamed (Markdown).

    python tests/benchmarks/large_sets.py 50 10000 [--base sketch] [--steps 40] [--kept FOLDER]

The pictures are variants of the sample sets: 96 to 256 px on the longer side, any aspect up to 2:1, turned in hue,
as JPEG, PNG or WebP, each with a caption. Each row is a process of its own: its processor time, its time by the clock
and the most memory that it held (`ru_maxrss`). "streamed" reads latents from the cache in each step, which a run does
by itself from 2 GiB of them on, here from the first byte on.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from scumble.datasets.reading.images import read_rgb

SAMPLES = Path(__file__).parent.parent.parent / "datasets/samples"
SUFFIXES = ("jpg", "jpg", "png", "webp")
RUN = "from scumble.trainer.cli import main; main()"
STREAM = (
    "from functools import partial; from scumble.trainer import train; "
    "train.encode_set = partial(train.encode_set, max_resident_bytes=0); "
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="+", type=int, metavar="N")
    parser.add_argument("--base", default="sketch")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kept", type=Path, help="Folder in which the pictures are made once and stay")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print("| pictures | what | processor time | by the clock | memory at most |\n|---|---|---|---|---|")
        for count in asked.counts:
            folder, place = (asked.kept or Path(scratch)) / f"{count}-pictures", Path(scratch) / f"work-{count}"
            place.mkdir()
            make(folder, count)
            base, cache = ["--base", asked.base], ["--latent-cache", str(place / "cache")]
            short = ["--steps", str(asked.steps), "--preview-every", "0", "--save-every", "0"]
            train = ["train", str(folder), *base, *cache, *short]
            for what, code, words in (
                ("check, with page and contact sheet", RUN, ["check", str(folder), *base]),
                ("train --dry-run", RUN, [*train, "--dry-run"]),
                (f"train {asked.steps} steps, nothing in the cache", RUN, train),
                (f"train {asked.steps} steps, all in the cache", RUN, train),
                (f"train {asked.steps} steps, streamed", STREAM + RUN, train),
            ):
                cpu_s, clock_s, peak_mb = measured(code, words, place)
                print(f"| {count:,} | {what} | {cpu_s:.1f} s | {clock_s:.1f} s | {peak_mb:,.0f} MB |", flush=True)


def measured(code: str, words: Sequence[str], folder: Path) -> tuple[float, float, float]:
    """Processor seconds, seconds by the clock, and MB at most of one process; what it prints is kept for troubles."""
    clock = time.monotonic()
    with (folder / "output.txt").open("w+") as output:
        child = subprocess.Popen([sys.executable, "-c", code, *words], cwd=folder, stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode not in (0, 65):  # 65: the check-up found something serious
            output.seek(0)
            raise SystemExit(output.read()[-2000:])
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, KiB here
    return usage.ru_utime + usage.ru_stime, time.monotonic() - clock, usage.ru_maxrss / unit


def make(folder: Path, count: int) -> None:
    """So many pictures with captions, the same each time; those that are there stay."""
    samples = [path for path in sorted(SAMPLES.glob("*/*.webp")) if path.with_suffix(".txt").is_file()]
    pictures = [read_rgb(path) for path in samples]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        draw = random.Random(number)
        which, suffix = draw.randrange(len(samples)), draw.choice(SUFFIXES)
        path = folder / f"{number:05}.{suffix}"
        if path.with_suffix(".txt").is_file():
            continue
        longer, aspect = draw.randint(96, 256), draw.uniform(1, 2)
        sides = longer, max(64, round(longer / aspect))
        size = sides if draw.random() < 0.5 else sides[::-1]
        variant(pictures[which], size, draw.randrange(256)).save(path)
        path.with_suffix(".txt").write_text(samples[which].with_suffix(".txt").read_text() + f", number {number}")


def variant(picture: Image.Image, size: tuple[int, int], hue: int) -> Image.Image:
    colours = np.asarray(picture.resize(size).convert("HSV")).copy()
    colours[..., 0] += np.uint8(hue)
    return Image.fromarray(colours, "HSV").convert("RGB")


if __name__ == "__main__":
    main()
