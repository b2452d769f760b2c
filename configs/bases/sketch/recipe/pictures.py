"""The training images of `sketch`: everyday objects from two free emoji sets, rendered on demand.

Noto Emoji (Apache-2.0) is the shaded style, Twemoji (CC BY 4.0) the flat style; emojibase (MIT) provides the names.
The repository contains none of them: npm downloads the three packages, and resvg renders the images.
"""

import hashlib
import json
import random
import subprocess
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "names": "emojibase-data@17.0.0",
}
STYLES = {"noto": "shaded style", "twemoji": "flat style"}
RENDERED_PX, SIZE_PX = 128, 64
HELD_OUT_SHARE = 0.1

_OBJECTS = """
    red apple; green apple; pear; banana; lemon; tangerine; strawberry; cherries; grapes; watermelon; pineapple;
    peach; tomato; avocado; eggplant; carrot; corn; broccoli; hot pepper; cucumber; mushroom; onion; coconut; kiwi
    fruit; bread; croissant; pretzel; pancakes; cheese; bacon; hamburger; french fries; pizza; hot dog; sandwich;
    taco; egg; popcorn; sushi; ice cream; ice cream cone; donut; cookie; birthday cake; cupcake; pie; candy; lollipop;
    milk; cup of coffee; teapot; wine glass; beer; cat; cat face; dog; dog face; fox; lion; tiger; tiger face; panda;
    koala; bear; polar bear; wolf; raccoon; monkey; monkey face; gorilla; horse; unicorn; zebra; deer; cow; cow face;
    pig; pig face; ram; goat; camel; giraffe; elephant; rhinoceros; hippopotamus; mouse face; rabbit; rabbit face;
    hamster; hedgehog; bat; kangaroo; sloth; chicken; rooster; baby chick; bird; penguin; eagle; duck; swan; owl;
    flamingo; peacock; parrot; dove; frog; crocodile; turtle; snake; lizard; dragon; dragon face; dinosaur; whale;
    dolphin; fish; tropical fish; shark; octopus; crab; lobster; snail; butterfly; bee; ant; ladybug; spider;
    jellyfish; rose; sunflower; tulip; cherry blossom; hibiscus; bouquet; cactus; palm tree; pine tree; tree; clover;
    maple leaf; potted plant; seedling; house; castle; church; hut; tent; factory; school; volcano; mountain; ferris
    wheel; fountain; statue of liberty; desert island; rock; car; taxi; bus; train; locomotive; truck; fire engine;
    police car; ambulance; racing car; tractor; motorcycle; bicycle; motor scooter; sailboat; ship; speedboat; canoe;
    anchor; airplane; helicopter; rocket; ufo; parachute; sun; full moon; crescent moon; ringed planet; star; glowing
    star; cloud; rainbow; lightning; snowflake; snowman; fire; droplet; wave; tornado; umbrella; red heart; orange
    heart; yellow heart; green heart; blue heart; purple heart; broken heart; red circle; yellow circle; green circle;
    blue circle; red square; yellow square; green square; blue square; grinning face; winking face; crying face;
    sleeping face; enraged face; thinking face; smiling face with heart-eyes; smiling face with sunglasses; smiling
    face with horns; cowboy hat face; clown face; skull; ghost; alien; robot; ogre; baby; boy; girl; man; woman; old
    man; old woman; princess; prince; astronaut; cook; farmer; police officer; pilot; artist; firefighter; superhero;
    wizard; fairy; vampire; mermaid; santa claus; ninja; guard; zombie; eye; tooth; bone; guitar; violin; trumpet;
    drum; saxophone; accordion; microphone; bell; radio; camera; television; laptop; telephone; light bulb; candle;
    flashlight; open book; scroll; envelope; package; pencil; paintbrush; scissors; key; padlock; hammer; axe; wrench;
    bomb; crossed swords; bow and arrow; shield; magnet; gear; ladder; balloon; gift; trophy; ribbon; teddy bear;
    pumpkin; christmas tree; kite; crystal ball; game die; yarn; artist palette; glasses; sunglasses; t-shirt; jeans;
    dress; scarf; gloves; socks; handbag; backpack; running shoe; high-heeled shoe; crown; top hat; ring; diamond;
    lipstick; soccer ball; basketball; american football; tennis; bowling; bullseye; money bag; coin; treasure chest;
    hourglass; alarm clock; watch; test tube; microscope; telescope; bed; chair; door; toilet; bathtub; basket; broom
"""
OBJECTS = {" ".join(name.split()) for name in _OBJECTS.split(";")}

SHORT_NAMES = {
    "automobile": "car", "deciduous tree": "tree", "evergreen tree": "pine tree", "wrapped gift": "gift",
    "soft ice cream": "ice cream cone", "hot beverage": "cup of coffee", "glass of milk": "milk", "honeybee": "bee",
    "lady beetle": "ladybug", "ear of corn": "corn", "beer mug": "beer", "articulated lorry": "truck",
    "jack-o-lantern": "pumpkin", "cheese wedge": "cheese", "locked": "padlock", "gem stone": "diamond",
    "mage": "wizard", "high voltage": "lightning", "flying saucer": "ufo",
    "T-Rex": "dinosaur", "water wave": "wave",
    "doughnut": "donut", "four leaf clover": "clover", "hourglass done": "hourglass",
}  # fmt: skip

_EVALUATED = """
    red apple, tiger, rocket, princess, castle, sailboat, owl, pizza, cactus, guitar, car, ghost, banana, strawberry,
    lemon, watermelon, carrot, broccoli, mushroom, hamburger, donut, ice cream, birthday cake, cheese, cat, dog, fox,
    lion, panda, koala, elephant, giraffe, penguin, frog, turtle, snake, octopus, whale, shark, butterfly, bee, ladybug,
    rose, sunflower, tulip, palm tree, pine tree, house, bus, bicycle, tractor, helicopter, airplane, fire, rainbow,
    snowman, star, red heart, crown, top hat, robot, skull, pumpkin, teddy bear, camera, umbrella, key, hammer
"""
# The objects of the evaluation prompts; both styles of them are training images.
EVALUATED: list[str] = [" ".join(name.split()) for name in _EVALUATED.split(",")]


@dataclass(frozen=True)
class Emoji:
    """One rendered emoji: `rgba` is uint8 (128, 128, 4), straight alpha, twice the size of generated images."""

    name: str
    style: str
    held_out: bool
    rgba: np.ndarray

    @property
    def caption(self) -> str:
        return f"{self.name}, {self.style}"

    def on_white(self) -> np.ndarray:
        """The training image, uint8 RGB (64, 64, 3): on white, averaged over 2 x 2 pixels."""
        alpha = self.rgba[..., 3:].astype(np.float32) / 255
        large = self.rgba[..., :3] * alpha + 255 * (1 - alpha)
        return large.reshape(SIZE_PX, 2, SIZE_PX, 2, 3).mean((1, 3)).round().astype(np.uint8)


def augmented(emoji: Emoji, number: int) -> Emoji:
    """A variant of an emoji: mirrored, color-jittered, rotated, scaled and shifted, seeded by its caption and `number`.

    Without variants, the model memorizes the images after hundreds of epochs and does not generalize.
    """
    rng = random.Random(f"{emoji.caption}/{number}")
    image = Image.fromarray(emoji.rgba)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance, spread in ((ImageEnhance.Color, 0.3), (ImageEnhance.Brightness, 0.15), (ImageEnhance.Contrast, 0.15)):
        alpha = image.getchannel("A")
        image = enhance(image.convert("RGB")).enhance(1 + rng.uniform(-spread, spread))
        image.putalpha(alpha)
    angle, size = rng.uniform(-12, 12), round(RENDERED_PX * rng.uniform(0.72, 1.0))
    image = image.convert("RGBa").rotate(angle, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.LANCZOS)
    shifted = Image.new("RGBa", (RENDERED_PX, RENDERED_PX))
    shifted.paste(image, (rng.randint(0, RENDERED_PX - size), rng.randint(0, RENDERED_PX - size)))
    return replace(emoji, rgba=np.asarray(shifted.convert("RGBA")))


def install(packages: list[str], work: Path) -> Path:
    """Install npm `packages` in `work` unless they are there; returns the `node_modules` folder."""
    modules = work / "npm" / "node_modules"
    if not all((modules / package.rpartition("@")[0]).is_dir() for package in packages):
        (work / "npm").mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts", *packages]
        subprocess.run(command, cwd=work / "npm", check=True)
    return modules


def is_held_out(name: str, style: str) -> bool:
    """A tenth of all (name, style), selected by hash: at most one style of an object, and no evaluated object."""
    uniform = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    held_out_style = list(STYLES.values())[int(uniform * 1e6) % 2]
    return name not in EVALUATED and uniform < 2 * HELD_OUT_SHARE and style == held_out_style


def codes_and_names(emojibase: Path) -> list[tuple[str, str]]:
    """(emoji code in lower-case hex, name) of every object."""
    entries = json.loads((emojibase / "en/data.json").read_text())
    found = []
    for entry in entries:
        name = SHORT_NAMES.get(entry["label"], entry["label"]).lower()
        if name in OBJECTS:
            found.append((entry["hexcode"].lower(), name))
    return found


def render_emoji(work: Path) -> list[Emoji]:
    """Render every object in both styles at 128 px; the packages are kept in `work`."""
    import resvg_py

    modules = install(list(PACKAGES.values()), work)
    rendered = []
    icons = {}
    for source in STYLES:
        folder = modules / PACKAGES[source].rpartition("@")[0]
        icons[source] = (
            json.loads((folder / "icons.json").read_text())["icons"],
            json.loads((folder / "chars.json").read_text()),
        )
    for code, name in codes_and_names(modules / "emojibase-data"):
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
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDERED_PX, height=RENDERED_PX))
            rgba = np.asarray(Image.open(BytesIO(png)).convert("RGBA"))
            rendered.append(Emoji(name, style, is_held_out(name, style), rgba))
    return rendered
