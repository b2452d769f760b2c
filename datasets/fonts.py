"""Chooses fonts for drawing text: Pillow's default font, or a system font for characters that it lacks.

The default font covers little more than ASCII, but captions and file names can be in any script.
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
MISSING = "\uffff"  # a Unicode noncharacter, which every font draws as its missing glyph


def lettered(text: str, size: int) -> tuple[str, Font]:
    """Return the text and a font of `size` pixels that can draw it, or else the font that can draw most of it.

    Characters that the font lacks lose their accents, or become `?` if they still cannot be drawn.
    """
    fonts = [(name, font) for name in ("", *SYSTEM) if (font := _font(name, size))]
    for name, font in fonts:
        if all(_draws(name, character) for character in set(text)):
            return text, font
    name, font = max(fonts, key=lambda one: sum(_draws(one[0], character) for character in text))
    return "".join(character if _draws(name, character) else _simpler(name, character) for character in text), font


def _simpler(name: str, character: str) -> str:
    decomposed = unicodedata.normalize("NFKD", character.translate(PLAIN))
    plain = "".join(part for part in decomposed if not unicodedata.combining(part))
    return plain if all(_draws(name, part) for part in plain) else "?"


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> Font | None:
    """Load a font by file name from the system's font folders, or Pillow's default font for an empty name."""
    if not name:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache(maxsize=65536)
def _draws(name: str, character: str) -> bool:
    font = _font(name, 16)
    return font is not None and (character.isspace() or drawn(character, font) != drawn(MISSING, font))


def drawn(character: str, font: Font) -> bytes:
    """Return the pixels of a character, to compare them with those of the missing glyph."""
    image = Image.new("L", (32, 32))
    ImageDraw.Draw(image).text((4, 4), character, 255, font)
    return image.tobytes()
