"""Plot the loss of a run."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from scumble.datasets.fonts import lettered

WIDTH, HEIGHT, LEFT, BELOW, ABOVE = 720, 360, 64, 40, 28
INK, FAINT, CURVE, POINTS, VALIDATION = (40, 40, 40), (226, 226, 226), (200, 70, 40), (236, 200, 186), (30, 100, 180)


def loss_curve(losses: Sequence[float], title: str, validated: Mapping[int, float] | None = None) -> Image.Image:
    """Plot the loss of each step as faint points, and its moving average over 5% of the run as a line.

    `validated` maps steps to validation losses, which are drawn as a second line.
    """
    measured = sorted((validated or {}).items())
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    window = max(1, len(losses) // 20)
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    smooth = [
        (sums[i + 1] - sums[max(0, i + 1 - window)]) / (i + 1 - max(0, i + 1 - window)) for i in range(len(losses))
    ]
    low, high = 0.0, 1.15 * max([sorted(losses)[int(0.98 * (len(losses) - 1))], *(loss for _, loss in measured)]) or 1.0

    def place(step: int, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 16) * step / max(1, len(losses) - 1)
        return x, HEIGHT - BELOW - (HEIGHT - BELOW - ABOVE) * (min(loss, high) - low) / (high - low)

    for fifth in range(6):
        level = low + (high - low) * fifth / 5
        _, y = place(0, level)
        pen.line([(LEFT, y), (WIDTH - 16, y)], FAINT)
        pen.text((LEFT - 8, y), f"{level:.3f}", INK, font, anchor="rm")
        step = round((len(losses) - 1) * fifth / 5)
        pen.text((place(step, 0)[0], HEIGHT - BELOW + 8), str(step + 1), INK, font, anchor="ma")
    for step, loss in enumerate(losses):
        x, y = place(step, loss)
        pen.ellipse([x - 1, y - 1, x + 1, y + 1], POINTS)
    pen.line([place(step, loss) for step, loss in enumerate(smooth)], CURVE, 2, joint="curve")
    after = [place(max(0, step - 1), loss) for step, loss in measured]
    pen.line(after, VALIDATION, 2)
    for x, y in after:
        pen.ellipse([x - 3, y - 3, x + 3, y + 3], VALIDATION)
    if measured:
        pen.text((WIDTH - 16, 8), "validation", VALIDATION, font, anchor="ra")
        pen.text((WIDTH - 16 - font.getlength("validation  "), 8), "training", CURVE, font, anchor="ra")
    shown, title_font = lettered(title, 13)
    pen.text((LEFT, 8), shown, INK, title_font)
    pen.text((WIDTH - 16, HEIGHT - 6), "step", INK, font, anchor="rb")
    return sheet
