"""Previews: a run's gallery, and grids with a label at each picture."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from scumble.configs.errors import Refused
from scumble.configs.options import Model, Previews
from scumble.datasets.lettering import Font, lettered

from .events import Events
from .machine import DTYPES, auto_precision, best_device, device_may_fail
from .models import Base, load, recognise
from .painting import paint
from .prompts import SHOWN_PROMPTS, Shot, shots_of

GAP_PX = 8
LABEL_LINES = 3  # of a prompt over its picture, at most
CELL_PX = range(128, 385)  # longer side of a picture on a grid
INK, PAPER = (40, 40, 40), (255, 255, 255)


def default_cfg(base_name: str) -> float:
    """Guidance that suits the base: the embedded one is small and paints cleaner with less."""
    return 5.0 if base_name == "sketch" else 7.0


def preview_base(model: Model, previews: Previews, out: Path) -> None:
    """Paint the shots of `previews` with a base and write one labelled grid."""
    source = recognise(model)
    shots = shots_of(previews, None, SHOWN_PROMPTS, default_cfg(model.base))
    device = torch.device(best_device())
    with device_may_fail(device):
        base = load(model, source, device, dtype_to_paint(device))
        pictures = [cell(picture) for picture in paint(base, shots, previews.sampler)]
    columns = min(6, len(pictures))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    labels = [shot.prompt for shot in shots]
    write_picture(grid(rows, [labels[start : start + columns] for start in range(0, len(labels), columns)]), out)


def dtype_to_paint(device: torch.device) -> torch.dtype:
    """16 bits on a CUDA device, as UIs paint there; elsewhere 32."""
    return DTYPES[auto_precision("cuda")] if device.type == "cuda" else torch.float32


class Gallery:
    """The previews of a run: each picture with its settings, and one grid that grows a row each time."""

    def __init__(self, base: Base, shots: Sequence[Shot], sampler: str, folder: Path, events: Events):
        self.base, self.shots, self.sampler, self.folder, self.events = base, shots, sampler, folder, events
        self.rows: list[tuple[str, int, int]] = []  # label, epoch, step
        self.cells: list[list[Image.Image]] = []
        self.cover: Image.Image | None = None

    def add(self, label: str, epoch: int, step: int) -> None:
        """Paint every shot as the adapter is now, into `folder`; `label` stands before the new row of the grid."""
        pictures = paint(
            self.base, self.shots, self.sampler, say=lambda line: self.events.emit("note", text=f"  {line}")
        )
        for index, (shot, picture) in enumerate(zip(self.shots, pictures, strict=True)):
            write_picture(picture, self._file(step, index), settings_of(shot, self.sampler, self.base.source.name))
        self._append((label, epoch, step), pictures)
        sheet = self.folder / "grid.png"
        above = [[shot.prompt for shot in self.shots], *([] for _ in self.cells[1:])]
        write_picture(grid(self.cells, above, [label for label, _, _ in self.rows]), sheet)
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


def cell(picture: Image.Image) -> Image.Image:
    """The picture at a size that can be looked at on a grid: small ones doubled, large ones reduced."""
    side = longer = max(picture.size)
    while side < CELL_PX[0]:
        side *= 2
    side = min(side, CELL_PX[-1])
    if side == longer:
        return picture
    size = (max(1, picture.width * side // longer), max(1, picture.height * side // longer))
    return picture.resize(size, Image.Resampling.LANCZOS)


def grid(
    rows: Sequence[Sequence[Image.Image]], above: Sequence[Sequence[str]], left: Sequence[str] = ()
) -> Image.Image:
    """Rows of pictures, a label over each (none where `above` has an empty row) and one at the left of each row."""
    width = max(picture.width for row in rows for picture in row)
    height = max(picture.height for row in rows for picture in row)
    text_px = max(11, width // 18)
    line_px = int(text_px * 1.7)
    names = [lettered(label, text_px) for label in left]
    margin = int(max((font.getlength(label) for label, font in names), default=0)) + (GAP_PX if left else 0)
    texts = [[wrapped(label, text_px, width) for label in labels] for labels in above]
    tops, end = [], GAP_PX
    for labels in texts:
        tops.append(end + line_px * max((len(lines) for lines, _ in labels), default=0))
        end = tops[-1] + height + GAP_PX
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (margin + columns * (width + GAP_PX) + GAP_PX, end), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (row, labels, top) in enumerate(zip(rows, texts, tops, strict=True)):
        if left:
            name, font = names[number]
            pen.text((GAP_PX, top + height / 2), name, INK, font, anchor="lm")
        for column, picture in enumerate(row):
            x = margin + GAP_PX + column * (width + GAP_PX)
            sheet.paste(picture, (x + (width - picture.width) // 2, top + (height - picture.height) // 2))
            if labels:
                lines, font = labels[column]
                for line, shown in enumerate(reversed(lines)):
                    pen.text((x + width / 2, top - line_px * (line + 0.5)), shown, INK, font, anchor="mm")
    return sheet


def wrapped(label: str, text_px: int, width_px: int) -> tuple[list[str], Font]:
    """The label in as many lines as it needs, at most LABEL_LINES, the last of them cut with …; and their font."""
    shown, font = lettered(label, text_px)
    lines, words = [""], shown.split()
    for number, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width_px:
            lines[-1] = longer
        elif len(lines) < LABEL_LINES:
            lines.append(word)
        else:
            lines[-1] = " ".join([lines[-1], *words[number:]])
            break
    return [shortened(line, font, width_px) for line in lines], font


def shortened(label: str, font: Font, width_px: int) -> str:
    """The label, cut with … to fit."""
    shown = label
    while len(shown) > 1 and font.getlength(shown) > width_px:
        shown = shown[:-2].rstrip() + "…"
    return shown


def settings_of(shot: Shot, sampler: str, base_name: str) -> PngInfo:
    """How a picture was made, as A1111 writes it into PNG files (`parameters`)."""
    info = PngInfo()
    negative = f"\nNegative prompt: {shot.negative}" if shot.negative else ""
    info.add_text(
        "parameters",
        f"{shot.prompt}{negative}\nSteps: {shot.steps}, Sampler: {sampler}, CFG scale: {shot.cfg}, "
        f"Seed: {shot.seed}, Model: {Path(base_name).stem}",
    )
    return info


def write_picture(picture: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Write a PNG whole or not at all; raises `Refused` (73) where the place cannot be written."""
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(temporary, format="PNG", pnginfo=info)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise Refused(f"{path}: cannot be written ({error.strerror or error})", 73) from None
