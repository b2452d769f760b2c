"""Previews: a run's gallery, and grids with a label at each picture."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from scumble.configs.options import Model, Previews

from ..base_model.detect import detect_base
from ..base_model.load import Base, load
from ..run.events import Events
from ..system.device import DTYPES, auto_precision, best_device, device_may_fail
from .grid import cell, grid, write_png
from .prompts import SHOWN_PROMPTS, PreviewPrompt, default_guidance_scale, preview_prompts
from .sampling import render


def preview_base(model: Model, previews: Previews, out: Path) -> None:
    """Paint the shots of `previews` with a base and write one labelled grid."""
    source = detect_base(model)
    shots = preview_prompts(previews, None, SHOWN_PROMPTS, default_guidance_scale(model.base))
    device = torch.device(best_device())
    with device_may_fail(device):
        base = load(model, source, device, render_dtype(device))
        pictures = [cell(picture) for picture in render(base, shots, previews.sampler)]
    columns = min(6, len(pictures))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    labels = [shot.prompt for shot in shots]
    write_png(grid(rows, [labels[start : start + columns] for start in range(0, len(labels), columns)]), out)


def render_dtype(device: torch.device) -> torch.dtype:
    """16 bits on a CUDA device, as UIs paint there; elsewhere 32."""
    return DTYPES[auto_precision("cuda")] if device.type == "cuda" else torch.float32


class Gallery:
    """The previews of a run: each picture with its settings, and one grid that grows a row each time."""

    def __init__(self, base: Base, shots: Sequence[PreviewPrompt], sampler: str, folder: Path, events: Events):
        self.base, self.shots, self.sampler, self.folder, self.events = base, shots, sampler, folder, events
        self.rows: list[tuple[str, int, int]] = []  # label, epoch, step
        self.cells: list[list[Image.Image]] = []
        self.cover: Image.Image | None = None

    def add(self, label: str, epoch: int, step: int) -> None:
        """Paint every shot as the adapter is now, into `folder`; `label` stands before the new row of the grid."""
        pictures = render(
            self.base, self.shots, self.sampler, say=lambda line: self.events.emit("note", text=f"  {line}")
        )
        for index, (shot, picture) in enumerate(zip(self.shots, pictures, strict=True)):
            write_png(picture, self._file(step, index), settings_of(shot, self.sampler, self.base.source.name))
        self._append((label, epoch, step), pictures)
        sheet = self.folder / "grid.png"
        above = [[shot.prompt for shot in self.shots], *([] for _ in self.cells[1:])]
        write_png(grid(self.cells, above, [label for label, _, _ in self.rows]), sheet)
        for index, (shot, picture) in enumerate(zip(self.shots, pictures, strict=True)):
            file = self._file(step, index)
            self.events.emit(
                "preview", step=step, epoch=epoch, label=label, prompt_index=index, prompt=shot.prompt, seed=shot.seed,
                width=picture.width, height=picture.height, file=f"{self.folder.name}/{file.name}", grid=str(sheet),
            )  # fmt: skip

    def restore(self, rows: Sequence[tuple[str, int, int]]) -> None:
        """The rows that were there when a state was saved, from their pictures; a row that lacks one is left out."""
        for row in rows:
            files = [self._file(row[2], index) for index in range(len(self.shots))]
            if all(file.is_file() for file in files):
                pictures = [Image.open(file).convert("RGB") for file in files]
                self._append(row, pictures)

    def has(self, step: int) -> bool:
        """Whether there is a row of that step."""
        return any(at == step for _, _, at in self.rows)

    def _append(self, row: tuple[str, int, int], pictures: Sequence[Image.Image]) -> None:
        self.rows.append(row)
        self.cells.append([cell(picture) for picture in pictures])
        self.cover = pictures[0]

    def _file(self, step: int, index: int) -> Path:
        return self.folder / f"step{step:06}-{index:02}.png"


def settings_of(shot: PreviewPrompt, sampler: str, base_name: str) -> PngInfo:
    """How a picture was made, as A1111 writes it into PNG files (`parameters`)."""
    info = PngInfo()
    negative = f"\nNegative prompt: {shot.negative_prompt}" if shot.negative_prompt else ""
    info.add_text(
        "parameters",
        f"{shot.prompt}{negative}\nSteps: {shot.num_inference_steps}, Sampler: {sampler}, CFG scale: {shot.guidance_scale}, "
        f"Seed: {shot.seed}, Model: {Path(base_name).stem}",
    )
    return info
