"""The pictures that `sketch` learns from: iconic things from two free emoji sets, rendered on demand.

Noto Emoji (Apache-2.0) gives the shaded style, Twemoji (CC BY 4.0) the flat one; emojibase (MIT) gives the
names. Nothing is stored in the repository: npm fetches the three packages, resvg renders them.
"""

import hashlib
import json
import subprocess
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "names": "emojibase-data@17.0.0",
}
STYLES = {"noto": "shaded style", "twemoji": "flat style"}
SIZE_PX = 128
HELD_OUT_SHARE = 0.1

WHOLE_SUBGROUPS = {
    "face-smiling",
    "face-hat",
    "face-glasses",
    "face-costume",
    "animal-mammal",
    "animal-bird",
    "animal-amphibian",
    "animal-reptile",
    "animal-marine",
    "animal-bug",
    "plant-flower",
    "plant-other",
    "food-fruit",
    "food-vegetable",
    "food-prepared",
    "food-asian",
    "food-sweet",
    "drink",
    "place-geographic",
    "place-building",
    "transport-water",
    "transport-air",
    "musical-instrument",
    "sport",
    "tool",
}

SINGLE_NAMES = {
    name.strip()
    for line in """
    red heart; orange heart; yellow heart; green heart; blue heart; purple heart; brown heart; black heart
    pink heart; grey heart; broken heart; red circle; orange circle; yellow circle; green circle; blue circle
    purple circle; brown circle; black circle; red square; orange square; yellow square; green square
    blue square; purple square; brown square; star; glowing star; sun; sun with face; full moon; crescent moon
    ringed planet; cloud; cloud with rain; cloud with lightning; rainbow; snowman; fire; droplet; water wave
    snowflake; tornado; umbrella; high voltage; comet; skull; enraged face; smiling face with horns
    crying face; sleeping face; thinking face; face with tongue; smiling face with heart-eyes; kissing face
    hot face; cold face; eyes; eye; mouth; tooth; bone; brain; ear; nose; baby; boy; girl; man; woman
    old man; old woman; princess; prince; Santa Claus; superhero; fairy; mage; vampire; mermaid; elf; genie
    zombie; troll; ninja; astronaut; police officer; cook; farmer; artist; pilot; firefighter; guard
    locomotive; train; bus; ambulance; fire engine; police car; taxi; automobile; pickup truck; delivery truck
    articulated lorry; tractor; racing car; motorcycle; motor scooter; bicycle; kick scooter; skateboard
    fuel pump; wheel; vertical traffic light; fountain; tent; ferris wheel; circus tent; church; mosque
    jack-o-lantern; Christmas tree; balloon; wrapped gift; party popper; trophy; ribbon; ticket
    sports medal; kite; crystal ball; magic wand; game die; puzzle piece; teddy bear; yo-yo; bullseye
    video game; artist palette; yarn; framed picture; glasses; sunglasses; necktie; t-shirt; jeans; scarf
    gloves; coat; socks; dress; kimono; bikini; shorts; handbag; backpack; purse; running shoe; hiking boot
    high-heeled shoe; crown; top hat; graduation cap; billed cap; lipstick; ring; gem stone; bell; microphone
    headphone; radio; mobile phone; telephone; laptop; desktop computer; printer; floppy disk; battery
    camera; television; candle; light bulb; flashlight; red paper lantern; open book; green book; blue book
    orange book; books; scroll; newspaper; money bag; coin; treasure chest; envelope; package; postbox
    pencil; fountain pen; paintbrush; crayon; briefcase; calendar; pushpin; paperclip; scissors; key; locked
    old key; hourglass done; alarm clock; watch; microscope; telescope; test tube; syringe; pill; door; window
    bed; chair; toilet; bathtub; mirror; broom; basket; bucket; soap; toothbrush; shopping cart; luggage
    spoon; kitchen knife; jar; fork and knife; globe with meridians; compass; moai; coffin; footprints
    """.splitlines()
    for name in line.split(";")
    if name.strip()
}

LEFT_OUT = {
    "guide dog", "service dog", "spouting whale", "paw prints", "pig nose", "feather", "wing", "microbe", "spider web",
    "building construction", "brick", "wood", "Japanese post office", "love hotel", "convenience store",
    "department store", "derelict house", "bank", "wedding", "airplane departure", "airplane arrival", "seat",
    "suspension railway", "mountain cableway", "aerial tramway", "satellite", "ring buoy", "clinking glasses",
    "clinking beer mugs", "pouring liquid", "front-facing baby chick", "fallen leaf", "leafless tree", "ice",
    "leaf fluttering in wind", "landslide", "national park", "martial arts uniform", "field hockey",
    "hammer and pick", "hammer and wrench", "white cane", "link", "broken chain", "chains", "softball",
    "melting face", "upside-down face", "rolling on the floor laughing", "grinning squinting face", "rosette",
    "alien monster", "goblin", "sheaf of rice", "bottle with popping cork", "cooking", "lacrosse", "salt",
}  # fmt: skip

SAID_SHORTER = {
    "automobile": "car", "deciduous tree": "tree", "evergreen tree": "pine tree",
    "wrapped gift": "gift", "steaming bowl": "noodle soup", "shallow pan of food": "paella", "soft ice cream":
    "ice cream cone", "hot beverage": "cup of coffee", "glass of milk": "milk", "honeybee": "bee",
    "lady beetle": "ladybug", "ear of corn": "corn", "beer mug": "beer", "cup with straw": "soda",
    "articulated lorry": "truck", "jack-o-lantern": "pumpkin", "cheese wedge": "cheese", "locked": "padlock",
    "gem stone": "diamond", "mage": "wizard", "sun with face": "sun face", "high voltage": "lightning",
    "flying saucer": "ufo", "passenger ship": "cruise ship", "pile of poo": "poo", "T-Rex": "dinosaur",
    "sauropod": "long neck dinosaur", "two-hump camel": "camel with two humps", "water wave": "wave",
    "horse face": "horse head", "leafy green": "lettuce", "bowl with spoon": "bowl of soup", "doughnut": "donut",
    "snow-capped mountain": "mountain with snow", "four leaf clover": "clover", "hourglass done": "hourglass",
}  # fmt: skip

ALWAYS_LEARNED = {"red apple", "tiger", "rocket", "princess", "cat", "dog", "car", "house", "tree", "robot"}


@dataclass(frozen=True)
class Picture:
    """One rendered emoji: `rgba` is uint8 of shape (128, 128, 4), straight alpha."""

    name: str
    style: str
    held_out: bool
    rgba: np.ndarray

    @property
    def caption(self) -> str:
        return f"{self.name}, {self.style}"

    def on_white(self) -> np.ndarray:
        """uint8 RGB (128, 128, 3), as the base sees it."""
        alpha = self.rgba[..., 3:].astype(np.float32) / 255
        return (self.rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def fetch(packages: list[str], work: Path) -> Path:
    """Install npm `packages` below `work` once; returns the `node_modules` folder."""
    modules = work / "npm" / "node_modules"
    if not all((modules / package.rpartition("@")[0]).is_dir() for package in packages):
        (work / "npm").mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts", *packages]
        subprocess.run(command, cwd=work / "npm", check=True)
    return modules


def is_held_out(name: str, style: str) -> bool:
    """Every tenth (name, style), by hash, never the same thing in both styles, never a demonstration word."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    which = list(STYLES.values())[int(draw * 1e6) % 2]
    return name not in ALWAYS_LEARNED and draw < 2 * HELD_OUT_SHARE and style == which


def things(names: Path) -> list[tuple[str, str]]:
    """(emoji code in lower-case hex, name) of every chosen thing."""
    subgroups = json.loads((names / "meta/groups.json").read_text())["subgroups"]
    chosen = []
    for emoji in json.loads((names / "en/data.json").read_text()):
        label = emoji["label"]
        subgroup = subgroups.get(str(emoji.get("subgroup")), "")
        if label not in LEFT_OUT and (subgroup in WHOLE_SUBGROUPS or label in SINGLE_NAMES):
            chosen.append((emoji["hexcode"].lower(), SAID_SHORTER.get(label, label).lower()))
    return chosen


def pictures(work: Path) -> list[Picture]:
    """Every chosen thing in both styles, rendered at 128 px (cached in `work`)."""
    import resvg_py

    modules = fetch(list(PACKAGES.values()), work)
    found = []
    icons = {}
    for source in STYLES:
        folder = modules / PACKAGES[source].rpartition("@")[0]
        icons[source] = (
            json.loads((folder / "icons.json").read_text())["icons"],
            json.loads((folder / "chars.json").read_text()),
        )
    for code, name in things(modules / "emojibase-data"):
        for source, style in STYLES.items():
            bodies, codes = icons[source]
            key = codes.get(code) or codes.get(code.replace("-fe0f", ""))
            if key is None:
                continue
            side = 128 if source == "noto" else 36
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {side} {side}">{bodies[key]["body"]}</svg>'
            )
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE_PX, height=SIZE_PX))
            rgba = np.asarray(Image.open(BytesIO(png)).convert("RGBA"))
            found.append(Picture(name, style, is_held_out(name, style), rgba))
    return found
