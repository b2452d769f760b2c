"""WD taggers (SmilingWolf's, for drawings): tags with their probabilities, by onnxruntime.

A folder holds `model.onnx` (input (B, S, S, 3), BGR from 0 to 255, on white; output (B, tags), probabilities) and
`selected_tags.csv` (tag_id, name, category, count).
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from scumble.configs.errors import Refused
from scumble.configs.exit_codes import UNAVAILABLE

from .checkpoint import located
from .picture import Picture
from .request import Device, SubjectKind
from .wording import belongs

FILES = ("model.onnx", "selected_tags.csv")
CATEGORIES = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "5": "meta", "9": "rating"}
KAOMOJI = {
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^",
    "o_o", "u_u", "x_x", "|_|", "||_||", "d_d", "d_b", "t_t", ";_;", "n_n", "\\_/",
}  # fmt: skip


@dataclass(frozen=True)
class Tag:
    """One column of the model's output."""

    name: str
    category: str


@dataclass(frozen=True)
class Rules:
    """Which tags are said. `threshold` is the least probability, `character_threshold` of names of characters."""

    threshold: float
    character_threshold: float
    categories: tuple[str, ...]
    keep_underscores: bool
    subject: SubjectKind


class Tagger:
    """A loaded tagger."""

    def __init__(self, model: str, device: Device, rules: Rules):
        folder = located(model, FILES)
        for name in FILES:
            if not (folder / name).is_file():
                raise Refused(f"--model {model}: no {name} in {folder}, so it is no WD tagger")
        self.tags, self.rules = read_tags(folder / "selected_tags.csv"), rules
        try:
            self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=providers(device))
        except Exception as error:  # noqa: BLE001  (onnxruntime's own types have no common one but this)
            raise Refused(f"--model {model}: onnxruntime cannot load model.onnx ({_first(error)})") from None
        inputs = self.session.get_inputs()[0]
        self.input, shape = inputs.name, inputs.shape
        if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or not isinstance(shape[1], int):
            raise Refused(f"--model {model}: takes {shape}; a WD tagger takes pictures as (batch, side, side, 3)")
        self.side_px, self.fixed_batch = shape[1], shape[0] if isinstance(shape[0], int) else 0

    def captions(self, pictures: Sequence[Picture]) -> list[str]:
        pixels = np.stack([prepared(one.pixels, self.side_px) for one in pictures])  # (B, S, S, 3)
        step = self.fixed_batch or len(pictures)
        said: list[str] = []
        for start in range(0, len(pixels), step):
            part = pixels[start : start + step]
            lacking = step - len(part) if self.fixed_batch else 0
            if lacking:
                part = np.concatenate([part, np.zeros_like(part[:1]).repeat(lacking, 0)])
            probabilities = np.asarray(self.session.run(None, {self.input: part})[0])  # (B, tags)
            if probabilities.shape[1] != len(self.tags):
                raise Refused(
                    f"--model: model.onnx knows {probabilities.shape[1]} tags, selected_tags.csv {len(self.tags)}"
                )
            said += [", ".join(chosen(row, self.tags, self.rules)) for row in probabilities[: step - lacking]]
        return said


def read_tags(path: Path) -> list[Tag]:
    """The tags of `selected_tags.csv`, in the order of the model's output."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"name", "category"} <= rows[0].keys():
        raise Refused(f"{path}: has no columns name and category, so it is not the list of a WD tagger")
    return [Tag(row["name"], CATEGORIES.get(row["category"], row["category"])) for row in rows]


def prepared(pixels: Image.Image, side_px: int) -> np.ndarray:
    """The whole picture on a white square of `side_px`: (S, S, 3), BGR, float32 from 0 to 255."""
    longest = max(pixels.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(pixels, ((longest - pixels.width) // 2, (longest - pixels.height) // 2))
    if longest != side_px:
        square = square.resize((side_px, side_px), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.float32)[:, :, ::-1]


def chosen(probabilities: np.ndarray, tags: Sequence[Tag], rules: Rules) -> list[str]:
    """What is said of one picture: names of characters first, the surest first; of ratings only the likeliest."""
    found: list[tuple[bool, float, str]] = []
    ratings = [(float(p), tag.name) for p, tag in zip(probabilities, tags, strict=True) if tag.category == "rating"]
    for probability, tag in zip(probabilities, tags, strict=True):
        if tag.category not in rules.categories:
            continue
        is_name = tag.category == "character"
        if tag.category == "rating":
            if tag.name != max(ratings)[1]:
                continue
        elif probability < (rules.character_threshold if is_name else rules.threshold):
            continue
        if belongs(spaced(tag.name), rules.subject):
            found.append((is_name, float(probability), tag.name if rules.keep_underscores else spaced(tag.name)))
    return [name for _, _, name in sorted(found, key=lambda one: (not one[0], -one[1]))]


def spaced(name: str) -> str:
    """A tag with spaces for its underscores; faces such as `^_^` keep theirs."""
    return name if name.lower() in KAOMOJI else name.replace("_", " ").strip()


def providers(device: Device) -> list[str]:
    """Where onnxruntime computes: the GPU where it was built for one, unless the CPU is asked for."""
    there = onnxruntime.get_available_providers()
    wanted = ["CPUExecutionProvider"]
    if device in ("auto", "cuda") and "CUDAExecutionProvider" in there:
        wanted.insert(0, "CUDAExecutionProvider")
    elif device == "cuda":
        raise Refused("--device cuda: this onnxruntime computes on the CPU; pip install onnxruntime-gpu", UNAVAILABLE)
    return wanted


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
