"""What a caption should contain: prompt templates for models that follow instructions, text filters for all others.

Training learns whatever the caption names as that word, and a prompt can change it; whatever the caption leaves out
becomes part of the adapter. So captions for a style describe the content of the image but not how it is made. Captions
for a character describe everything that varies between images (pose, clothes, place, medium) but not its identity.
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
        "Write a caption that describes the content of this image: the subject, what it does, what it wears or "
        "carries, the surroundings, the framing and the point of view. Do not describe how the image is made: do not "
        "mention medium, technique, art style, rendering, lighting style, artist, quality or mood, and do not call it "
        "an image, picture, painting, photo or illustration. Do not begin with 'The image shows'. "
        "Answer with {length} and nothing else."
    ),
    "character": (
        "Write a caption for this image in which the character is called {name}. Describe everything that could be "
        "different in another image of {name}: pose, action, expression, clothes and carried objects, other people, "
        "the place, the light, the framing, the point of view, and whether it is a photo, a drawing or a painting. Do "
        "not describe what always belongs to {name}: do not mention species, face, hair, eyes, skin, age or build. Do "
        "not begin with 'The image shows'. Answer with {length} and nothing else."
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
BLIP_NONSENSE = r"\b(?:an?\s+)?ara(?:f|ff|ffe|ffed|fed|ffes|ffy|ffey)\w*\s*(?:image of\s+)?"  # a BLIP large artifact

STYLE_TAG = re.compile(
    r".*\((?:medium|style|texture)\)|.*\bart ?style|.*\bstyle|traditional media|.*sketch|line ?art|monochrome|"
    r"gr[ea]yscale|.*painting|.*watercolou?r|(?:photo)?realistic|photorealism|3d|chibi|flat colors?|.*colou?ring|"
    r"cel shading|pixel art|digital art|vector art|concept art|fan ?art|official art|.*illustration|ukiyo-e|"
    r"impressionism|art nouveau|no lineart|spot color|halftone|film grain|chromatic aberration|render|4k|8k|"
    r"masterpiece|(?:best|high|low|worst) quality|highres|absurdres|trending on \w+",
    re.IGNORECASE,
)
COLORS = r"(?:aqua|black|blonde?|blue|brown|gr[ea]y|green|orange|pink|purple|red|silver|white|yellow|multicolou?red)"
IDENTITY_TAG = re.compile(
    rf"(?:(?:very )?(?:long|short|medium|big)|{COLORS}|two-tone|gradient|streaked|colored inner|light \w+|dark \w+) "
    r"(?:hair|skin|fur|eyelashes|eyebrows|sclera|pupils|ears?|tail|horns?|wings)|"
    rf"(?:{COLORS}|heterochromatic|light \w+|dark \w+) eyes|heterochromia|bangs|blunt bangs|ahoge|"
    r"hair between eyes|sidelocks|freckles|mole(?: .*)?|scar(?: .*)?|fangs?|pointy ears|animal ears?|"
    r"(?:cat|dog|fox|wolf|rabbit|bear|horse|mouse) (?:ears|tail|girl|boy)|tail|horns?|wings|halo|"
    r"(?:dark|pale|colored|tan)[- ]?(?:skinned (?:fe)?male|skin)|dark skin|pale skin|"
    r"(?:flat chest|(?:small|medium|large|huge) breasts|breasts)|slit pupils|whiskers|facial mark|beard|mustache",
    re.IGNORECASE,
)


def build_prompt(subject: SubjectKind, detail: Detail, name: str) -> str:
    """The prompt for a model that follows instructions; `name` is what the character is called."""
    return TEMPLATES[subject].format(length=LENGTHS[detail], name=f"'{name}'" if name else "'the character'")


def clean_answer(answer: str, subject: SubjectKind) -> str:
    """Remove stock phrases and Markdown from a model's answer, and descriptions of the style for subject `style`."""
    text = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
    text = re.sub(r"[*_#`]{1,3}(?=\S)|(?<=\S)[*_#`]{1,3}", "", " ".join(text.split())).strip(QUOTES)
    text = re.sub(BLIP_NONSENSE, "", text, flags=re.IGNORECASE)
    for opening in OPENINGS:
        text = re.sub(opening, "", text, flags=re.IGNORECASE)
    if subject == "style":
        text = CLOSE_UP.sub(lambda match: f"{match[1] or ''}{match[2]} ", text)
        for phrase in (*STYLE_OPENINGS, *STYLE_ENDINGS):
            text = re.sub(phrase, "", text, flags=re.IGNORECASE)
        tags = tags_of(text)
        if len(tags) > 1:
            text = ", ".join(tag for tag in tags if not STYLE_TAG.fullmatch(tag.rstrip(".")))
    return tidy(text).strip(QUOTES)


def is_allowed(tag: str, subject: SubjectKind) -> bool:
    """Whether a caption may contain a tag: no style tags for a style, no identity tags for a character."""
    return not (STYLE_TAG if subject == "style" else IDENTITY_TAG).fullmatch(tag)
