"""Time and memory for sets of any size: check, plan, encode latents, train from memory or from disk. Prints Markdown.

    python tests/benchmarks/large_sets.py 50 10000 [--base sketch] [--steps 40] [--kept FOLDER]

The images are variants of the sample sets: 96 to 256 px on the longer side, aspect ratios up to 2:1, shifted hue, as
JPEG, PNG or WebP, each with a caption. Each row is a separate process, with its CPU time, elapsed time and peak memory
(`ru_maxrss`). "streamed" reads latents from the cache in each step, which a run does only if they take 2 GiB or more.
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
    parser.add_argument("--kept", type=Path, help="folder for the images; existing ones are reused")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print("| images | command | CPU time | elapsed time | peak memory |\n|---|---|---|---|---|")
        for count in args.counts:
            folder, work = (args.kept or Path(scratch)) / f"{count}-images", Path(scratch) / f"work-{count}"
            work.mkdir()
            make_images(folder, count)
            base, cache = ["--base", args.base], ["--latent-cache", str(work / "cache")]
            short = ["--steps", str(args.steps), "--preview-every", "0", "--save-every", "0"]
            train = ["train", str(folder), *base, *cache, *short]
            for title, code, arguments in (
                ("check, with page and contact sheet", RUN, ["check", str(folder), *base]),
                ("train --dry-run", RUN, [*train, "--dry-run"]),
                (f"train {args.steps} steps, empty cache", RUN, train),
                (f"train {args.steps} steps, full cache", RUN, train),
                (f"train {args.steps} steps, streamed", STREAM + RUN, train),
            ):
                cpu_s, clock_s, peak_mb = measure(code, arguments, work)
                print(f"| {count:,} | {title} | {cpu_s:.1f} s | {clock_s:.1f} s | {peak_mb:,.0f} MB |", flush=True)


def measure(code: str, arguments: Sequence[str], folder: Path) -> tuple[float, float, float]:
    """CPU seconds, elapsed seconds and peak MB of a process. Exits with its output if it fails."""
    started = time.monotonic()
    with (folder / "output.txt").open("w+") as output:
        child = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=folder, stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode not in (0, 65):  # 65: `check` found serious problems
            output.seek(0)
            raise SystemExit(output.read()[-2000:])
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes on macOS, KiB on Linux
    return usage.ru_utime + usage.ru_stime, time.monotonic() - started, usage.ru_maxrss / unit


def make_images(folder: Path, count: int) -> None:
    """Write `count` images with captions, the same each time. Existing ones are not written again."""
    samples = [path for path in sorted(SAMPLES.glob("*/*.webp")) if path.with_suffix(".txt").is_file()]
    originals = [read_rgb(path) for path in samples]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        generator = random.Random(number)
        which, suffix = generator.randrange(len(samples)), generator.choice(SUFFIXES)
        path = folder / f"{number:05}.{suffix}"
        if path.with_suffix(".txt").is_file():
            continue
        longer, aspect = generator.randint(96, 256), generator.uniform(1, 2)
        sides = longer, max(64, round(longer / aspect))
        size = sides if generator.random() < 0.5 else sides[::-1]
        variant(originals[which], size, generator.randrange(256)).save(path)
        path.with_suffix(".txt").write_text(samples[which].with_suffix(".txt").read_text() + f", number {number}")


def variant(image: Image.Image, size: tuple[int, int], hue: int) -> Image.Image:
    hsv = np.asarray(image.resize(size).convert("HSV")).copy()
    hsv[..., 0] += np.uint8(hue)
    return Image.fromarray(hsv, "HSV").convert("RGB")


if __name__ == "__main__":
    main()
