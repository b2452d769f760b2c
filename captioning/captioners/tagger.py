"""WD taggers (by SmilingWolf, for drawings): tags with probabilities, computed with onnxruntime.

A model folder contains `model.onnx` (input: (B, S, S, 3), BGR from 0 to 255, on white; output: (B, tags)
probabilities) and `selected_tags.csv` (tag_id, name, category, count).
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

from .checkpoint import locate_model
from .picture import ImageFile
from .request import Device, SubjectKind
from .wording import is_allowed

FILES = ("model.onnx", "selected_tags.csv")
CATEGORIES = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "5": "meta", "9": "rating"}
KAOMOJI = {
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^",
    "o_o", "u_u", "x_x", "|_|", "||_||", "d_d", "d_b", "t_t", ";_;", "n_n", "\\_/",
}  # fmt: skip


@dataclass(frozen=True)
class Tag:
    """One column of the model output."""

    name: str
    category: str


@dataclass(frozen=True)
class TagRules:
    """Which tags to return. `threshold` is the minimum probability, `character_threshold` that of character names."""

    threshold: float
    character_threshold: float
    categories: tuple[str, ...]
    keep_underscores: bool
    subject: SubjectKind


class Tagger:
    """A loaded WD tagger."""

    def __init__(self, model: str, device: Device, rules: TagRules):
        folder = locate_model(model, FILES)
        for name in FILES:
            if not (folder / name).is_file():
                raise Refused(f"--model {model}: not a WD tagger (no {name} in {folder})")
        self.tags, self.rules = read_tags(folder / "selected_tags.csv"), rules
        try:
            self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=execution_providers(device))
        except Exception as error:  # noqa: BLE001  (onnxruntime's error types share no other base class)
            raise Refused(f"--model {model}: onnxruntime cannot load model.onnx ({_first_line(error)})") from None
        inputs = self.session.get_inputs()[0]
        self.input, shape = inputs.name, inputs.shape
        if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or not isinstance(shape[1], int):
            raise Refused(f"--model {model}: input shape is {shape}; a WD tagger has (batch, side, side, 3)")
        self.side_px, self.fixed_batch = shape[1], shape[0] if isinstance(shape[0], int) else 0

    def captions(self, images: Sequence[ImageFile]) -> list[str]:
        pixels = np.stack([preprocess(image.pixels, self.side_px) for image in images])  # (B, S, S, 3)
        size = self.fixed_batch or len(images)
        results: list[str] = []
        for start in range(0, len(pixels), size):
            batch = pixels[start : start + size]
            num_padding = size - len(batch) if self.fixed_batch else 0
            if num_padding:
                batch = np.concatenate([batch, np.zeros_like(batch[:1]).repeat(num_padding, 0)])
            probabilities = np.asarray(self.session.run(None, {self.input: batch})[0])  # (B, tags)
            if probabilities.shape[1] != len(self.tags):
                raise Refused(
                    f"--model: model.onnx has {probabilities.shape[1]} tags, but selected_tags.csv has {len(self.tags)}"
                )
            rows = probabilities[: size - num_padding]
            results += [", ".join(select_tags(row, self.tags, self.rules)) for row in rows]
        return results


def read_tags(path: Path) -> list[Tag]:
    """The tags in `selected_tags.csv`, in the order of the model output."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"name", "category"} <= rows[0].keys():
        raise Refused(f"{path}: not the tag list of a WD tagger (it has no columns name and category)")
    return [Tag(row["name"], CATEGORIES.get(row["category"], row["category"])) for row in rows]


def preprocess(pixels: Image.Image, side_px: int) -> np.ndarray:
    """The whole image on a white square of `side_px`: (S, S, 3), BGR, float32 from 0 to 255."""
    longest = max(pixels.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(pixels, ((longest - pixels.width) // 2, (longest - pixels.height) // 2))
    if longest != side_px:
        square = square.resize((side_px, side_px), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.float32)[:, :, ::-1]


def select_tags(probabilities: np.ndarray, tags: Sequence[Tag], rules: TagRules) -> list[str]:
    """The tags of one image: character names first, then by probability; only the most probable rating."""
    selected: list[tuple[bool, float, str]] = []
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
        text = replace_underscores(tag.name)
        if is_allowed(text, rules.subject):
            selected.append((is_name, float(probability), tag.name if rules.keep_underscores else text))
    return [name for _, _, name in sorted(selected, key=lambda item: (not item[0], -item[1]))]


def replace_underscores(name: str) -> str:
    """A tag with spaces instead of underscores; emoticons such as `^_^` keep theirs."""
    return name if name.lower() in KAOMOJI else name.replace("_", " ").strip()


def execution_providers(device: Device) -> list[str]:
    """The execution providers of onnxruntime: CUDA if this build supports it, unless the CPU is requested.

    Raises `Refused` (69) for --device cuda without that support.
    """
    available = onnxruntime.get_available_providers()
    selected = ["CPUExecutionProvider"]
    if device in ("auto", "cuda") and "CUDAExecutionProvider" in available:
        selected.insert(0, "CUDAExecutionProvider")
    elif device == "cuda":
        raise Refused(
            "--device cuda: this onnxruntime only supports the CPU; run pip install onnxruntime-gpu", UNAVAILABLE
        )
    return selected


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
