"""What a caption should say, and what it should not: templates for models that take words, filters for all others.

What captions name, training learns as that word and a prompt can change it; what they leave unsaid goes into the
adapter. So for a style captions tell what is in the picture and nothing of how it is painted; for a character they
tell all that changes from picture to picture (pose, clothes, place, and the painting) and nothing of who it is.
"""

import re

from scumble.datasets.captions import tags_of

from ..edits import tidy
from .request import Detail, SubjectKind

LENGTHS: dict[Detail, str] = {
    "short": "one phrase of at most 12 words",
    "medium": "one or two plain sentences, at most 40 words in all",
    "long": "a few plain sentences, at most 100 words in all",
}
MAX_TOKENS: dict[Detail, int] = {"short": 32, "medium": 96, "long": 224}

TEMPLATES: dict[SubjectKind, str] = {
    "style": (
        "Write a caption that tells what is in this picture: the subject, what it does, what it wears or carries, "
        "what is around it, the framing and the point of view. Say nothing of how the picture is made: no word on "
        "medium, technique, art style, rendering, lighting style, artist, quality or mood, and do not call it a "
        "picture, painting, photo or illustration. Do not begin with 'The image shows'. "
        "Answer with {length} and nothing else."
    ),
    "character": (
        "Write a caption of this picture in which the character is called {name}. Tell all that could be different "
        "in another picture of {name}: pose, action, expression, clothes and things carried, other people, the "
        "place, the light, the framing, the point of view, and whether it is a photo, a drawing or a painting. Say "
        "nothing of what always belongs to {name}: no word on species, face, hair, eyes, skin, age or build. Do not "
        "begin with 'The image shows'. Answer with {length} and nothing else."
    ),
}

MEDIUM = (
    r"(?:oil |digital |watercolou?r |pencil |ink |pixel art |anime |comic |black and white |3d |cgi )?"
    r"(?:painting|paintings|drawing|illustration|sketch|cartoon|artwork|art|render|rendering|print|engraving|"
    r"watercolou?r|photo|photograph|picture|image|animation|figurine|poster|clip ?art|icon|emoji)"
)
ADJECTIVES = r"(?:(?!(?:with|of|in|on|at|by|and|an?|the|is|has|to|from|near|under|who|that)\b)[\w-]+\s+){0,4}?"
OPENINGS = (
    r"^(?:the|this)\s+(?:image|picture|photo|photograph|scene)\s+"
    r"(?:shows|depicts|features|portrays|displays|captures|presents|contains|is of)\s+",
    r"^in (?:the|this) (?:image|picture|photo)\s*,?\s*(?:there (?:is|are)|(?:we|i|you)(?: can)? see)\s+",
    r"^(?:caption|answer|description)\s*:\s*",
    r"^(?:here is|here's) [^:]{0,60}:\s*",
)
STYLE_OPENINGS = (
    rf"^(?:(?:the|this) (?:image|picture) is )?(?:an?|the)\s+{ADJECTIVES}{MEDIUM}\s+"
    r"(?:of|showing|depicting|featuring|with)\s+",
    r"^(?:the|this) (?:image|picture|photo|photograph) is (?:of )?",
)
CLOSE_UP = re.compile(rf"^(an?\s+)?(close[- ]?up(?: view)? of)\s+(?:an?|the)\s+{ADJECTIVES}{MEDIUM}\s+of\s+", re.I)
STYLE_ENDINGS = (
    r",?\s*(?:painted|drawn|rendered|made|done|created)?\s*\bin (?:the |an? )?(?:[\w-]+\s+){0,4}?style"
    r"(?:\s+of(?:\s+[\w.'-]+){1,4})?(?=\s*[,.]|$)",
    r",?\s*\b(?:painted|drawn|rendered) (?:in|with) [\w\s-]{3,40}(?=\s*[,.]|$)",
)
QUOTES = " \"'“”"
BLIP_NONSENSE = r"\b(?:an?\s+)?ara(?:f|ff|ffe|ffed|fed|ffes|ffy|ffey)\w*\s*(?:image of\s+)?"  # a quirk of BLIP large

STYLE_TAG = re.compile(
    r".*\((?:medium|style|texture)\)|.*\bart ?style|.*\bstyle|traditional media|.*sketch|line ?art|monochrome|"
    r"gr[ea]yscale|.*painting|.*watercolou?r|(?:photo)?realistic|photorealism|3d|chibi|flat colors?|.*colou?ring|"
    r"cel shading|pixel art|digital art|vector art|concept art|fan ?art|official art|.*illustration|ukiyo-e|"
    r"impressionism|art nouveau|no lineart|spot color|halftone|film grain|chromatic aberration|render|4k|8k|"
    r"masterpiece|(?:best|high|low|worst) quality|highres|absurdres|trending on \w+",
    re.IGNORECASE,
)
COLOURS = r"(?:aqua|black|blonde?|blue|brown|gr[ea]y|green|orange|pink|purple|red|silver|white|yellow|multicolou?red)"
IDENTITY_TAG = re.compile(
    rf"(?:(?:very )?(?:long|short|medium|big)|{COLOURS}|two-tone|gradient|streaked|colored inner|light \w+|dark \w+) "
    r"(?:hair|skin|fur|eyelashes|eyebrows|sclera|pupils|ears?|tail|horns?|wings)|"
    rf"(?:{COLOURS}|heterochromatic|light \w+|dark \w+) eyes|heterochromia|bangs|blunt bangs|ahoge|"
    r"hair between eyes|sidelocks|freckles|mole(?: .*)?|scar(?: .*)?|fangs?|pointy ears|animal ears?|"
    r"(?:cat|dog|fox|wolf|rabbit|bear|horse|mouse) (?:ears|tail|girl|boy)|tail|horns?|wings|halo|"
    r"(?:dark|pale|colored|tan)[- ]?(?:skinned (?:fe)?male|skin)|dark skin|pale skin|"
    r"(?:flat chest|(?:small|medium|large|huge) breasts|breasts)|slit pupils|whiskers|facial mark|beard|mustache",
    re.IGNORECASE,
)


def asked(subject: SubjectKind, detail: Detail, name: str) -> str:
    """The words for a model that takes some."""
    return TEMPLATES[subject].format(length=LENGTHS[detail], name=f"'{name}'" if name else "'the character'")


def cleaned(answer: str, subject: SubjectKind) -> str:
    """A model's sentence without what no caption needs, and for a style without words on how it is painted."""
    text = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
    text = re.sub(r"[*_#`]{1,3}(?=\S)|(?<=\S)[*_#`]{1,3}", "", " ".join(text.split())).strip(QUOTES)
    text = re.sub(BLIP_NONSENSE, "", text, flags=re.IGNORECASE)
    for opening in OPENINGS:
        text = re.sub(opening, "", text, flags=re.IGNORECASE)
    if subject == "style":
        text = CLOSE_UP.sub(lambda found: f"{found[1] or ''}{found[2]} ", text)
        for words in (*STYLE_OPENINGS, *STYLE_ENDINGS):
            text = re.sub(words, "", text, flags=re.IGNORECASE)
        tags = tags_of(text)
        if len(tags) > 1:
            text = ", ".join(tag for tag in tags if not STYLE_TAG.fullmatch(tag.rstrip(".")))
    return tidy(text).strip(QUOTES)


def belongs(tag: str, subject: SubjectKind) -> bool:
    """Whether a tagger's tag should be said: none on the painting for a style, none on who it is for a character."""
    return not (STYLE_TAG if subject == "style" else IDENTITY_TAG).fullmatch(tag)
