"""Previews: the gallery of a run, and labeled grids of base model images."""

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
from .prompts import DEFAULT_PROMPTS, PreviewPrompt, default_guidance_scale, preview_prompts
from .sampling import render


def preview_base(model: Model, previews: Previews, out: Path) -> None:
    """Render the prompts of `previews` with a base and write one labeled grid."""
    source = detect_base(model)
    prompts = preview_prompts(previews, None, DEFAULT_PROMPTS, default_guidance_scale(model.base))
    device = torch.device(best_device())
    with device_may_fail(device):
        base = load(model, source, device, render_dtype(device))
        cells = [cell(image) for image in render(base, prompts, previews.sampler)]
    columns = min(6, len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    labels = [prompt.prompt for prompt in prompts]
    write_png(grid(rows, [labels[start : start + columns] for start in range(0, len(labels), columns)]), out)


def render_dtype(device: torch.device) -> torch.dtype:
    """Return a 16-bit dtype on CUDA devices, as UIs use there, else fp32."""
    return DTYPES[auto_precision("cuda")] if device.type == "cuda" else torch.float32


class Gallery:
    """The previews of a run: one file per image with its settings, and a grid with one row per preview step."""

    def __init__(self, base: Base, prompts: Sequence[PreviewPrompt], sampler: str, folder: Path, events: Events):
        self.base, self.prompts, self.sampler, self.folder, self.events = base, prompts, sampler, folder, events
        self.rows: list[tuple[str, int, int]] = []  # label, epoch, step
        self.cells: list[list[Image.Image]] = []
        self.cover: Image.Image | None = None

    def add(self, label: str, epoch: int, step: int) -> None:
        """Render all prompts with the current adapter into `folder`, and add a grid row labeled `label`."""
        images = render(
            self.base, self.prompts, self.sampler, report=lambda line: self.events.emit("note", text=f"  {line}")
        )
        for index, (prompt, image) in enumerate(zip(self.prompts, images, strict=True)):
            write_png(image, self._file(step, index), settings_of(prompt, self.sampler, self.base.source.name))
        self._append((label, epoch, step), images)
        sheet = self.folder / "grid.png"
        above = [[prompt.prompt for prompt in self.prompts], *([] for _ in self.cells[1:])]
        write_png(grid(self.cells, above, [label for label, _, _ in self.rows]), sheet)
        for index, (prompt, image) in enumerate(zip(self.prompts, images, strict=True)):
            file = self._file(step, index)
            self.events.emit(
                "preview", step=step, epoch=epoch, label=label, prompt_index=index, prompt=prompt.prompt,
                seed=prompt.seed, width=image.width, height=image.height, file=f"{self.folder.name}/{file.name}",
                grid=str(sheet),
            )  # fmt: skip

    def restore(self, rows: Sequence[tuple[str, int, int]]) -> None:
        """Restore the rows of a saved state from their image files. Rows with a missing file are skipped."""
        for row in rows:
            files = [self._file(row[2], index) for index in range(len(self.prompts))]
            if all(file.is_file() for file in files):
                self._append(row, [Image.open(file).convert("RGB") for file in files])

    def has(self, step: int) -> bool:
        """Return whether there is a row for a step."""
        return any(at == step for _, _, at in self.rows)

    def _append(self, row: tuple[str, int, int], images: Sequence[Image.Image]) -> None:
        self.rows.append(row)
        self.cells.append([cell(image) for image in images])
        self.cover = images[0]

    def _file(self, step: int, index: int) -> Path:
        return self.folder / f"step{step:06}-{index:02}.png"


def settings_of(prompt: PreviewPrompt, sampler: str, base_name: str) -> PngInfo:
    """Return the settings of an image as PNG text, in the format of A1111 (`parameters`)."""
    info = PngInfo()
    negative = f"\nNegative prompt: {prompt.negative_prompt}" if prompt.negative_prompt else ""
    info.add_text(
        "parameters",
        f"{prompt.prompt}{negative}\nSteps: {prompt.num_inference_steps}, Sampler: {sampler}, "
        f"CFG scale: {prompt.guidance_scale}, Seed: {prompt.seed}, Model: {Path(base_name).stem}",
    )
    return info
