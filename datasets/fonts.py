"""Text in pictures: Pillow's own font, or one of the system's where a text has letters that this one lacks.

Pillow's own knows little more than ASCII; captions and names of files are in any script.
"""

import unicodedata
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

SYSTEM = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "segoeui.ttf", "arial.ttf", "Arial.ttf",
    "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "msgothic.ttc", "msyh.ttc", "malgun.ttf", "PingFang.ttc",
    "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "wqy-microhei.ttc",
)  # fmt: skip
PLAIN = str.maketrans("–—‘’“”„…", '--\'\'""".')
NO_LETTER = "\uffff"  # Unicode keeps it free of a letter for ever, so every font draws its sign for a missing one


def lettered(text: str, size: int) -> tuple[str, Font]:
    """The text and a font of so many pixels that draws all of it, else most of it.

    Letters that it lacks lose their accents, and those that are still not drawn become `?`.
    """
    fonts = [(name, font) for name in ("", *SYSTEM) if (font := _font(name, size))]
    for name, font in fonts:
        if all(_draws(name, letter) for letter in set(text)):
            return text, font
    name, font = max(fonts, key=lambda one: sum(_draws(one[0], letter) for letter in text))
    return "".join(letter if _draws(name, letter) else _simpler(name, letter) for letter in text), font


def _simpler(name: str, letter: str) -> str:
    decomposed = unicodedata.normalize("NFKD", letter.translate(PLAIN))
    plain = "".join(part for part in decomposed if not unicodedata.combining(part))
    return plain if all(_draws(name, part) for part in plain) else "?"


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> Font | None:
    """A font by the name of its file, wherever the system keeps it; Pillow's own by no name."""
    if not name:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache(maxsize=65536)
def _draws(name: str, letter: str) -> bool:
    font = _font(name, 16)
    return font is not None and (letter.isspace() or drawn(letter, font) != drawn(NO_LETTER, font))


def drawn(letter: str, font: Font) -> bytes:
    """A letter's pixels, by which one that is missing is told."""
    picture = Image.new("L", (32, 32))
    ImageDraw.Draw(picture).text((4, 4), letter, 255, font)
    return picture.tobytes()
