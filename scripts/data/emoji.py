"""Emoji of 32 x 32 pixels with names, as .npz files for recipes/emoji-vit.yaml and text-to-image.yaml.

    python scripts/data/emoji.py --source emoji32.npz [--output runs/emoji]
    python scripts/data/emoji.py --font NotoColorEmoji.ttf

A file holds ``x`` uint8 [N,32,32,3], ``names`` (captions) and ``label`` (categories). A font with coloured bitmaps is
drawn on white by Pillow and named by Python's Unicode table.
"""

# The category follows from the name: the first list at the foot that holds one of its words. The split has a fixed
# seed, 65 % train, 10 % dev, 25 % test of each category. Names that differ only in colour, size, sex or number, and
# pictures that differ little, stay in one split.

from __future__ import annotations

import argparse
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 0
SIDE = 32
SHARES = {"train": 0.65, "dev": 0.1, "test": 0.25}
ALIKE = 6.0  # mean difference of a pixel, of 255
GLYPH = 109  # the one size of the bitmaps in Noto Color Emoji
Images = NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--source", type=Path, help=".npz with x and names")
    source.add_argument("--font", type=Path, help="font with coloured bitmaps")
    parser.add_argument("--output", type=Path, default=Path("runs/emoji"))
    given = parser.parse_args()
    images, names = read(given.source) if given.source else drawn(given.font)
    labels = [category(name) for name in names]
    given.output.mkdir(parents=True, exist_ok=True)
    for split, rows in splits(labels, group_similar(images, names)).items():
        kept = {"x": images[rows], "names": np.array(names)[rows], "label": np.array(labels)[rows]}
        arrays: dict[str, Any] = kept
        np.savez_compressed(given.output / f"{split}.npz", **arrays)
        counts = ", ".join(f"{count} {label}" for label, count in sorted(Counter(kept["label"].tolist()).items()))
        print(f"{given.output / split}.npz: {len(rows)} images ({counts})")


def read(path: Path) -> tuple[Images, list[str]]:
    """Pictures and names of a .npz."""
    with np.load(path, allow_pickle=False) as file:
        return file["x"], [str(name) for name in file["names"]]


def drawn(font: Path) -> tuple[Images, list[str]]:
    """Every emoji of one code point that a font has, on white."""
    from PIL import Image, ImageDraw, ImageFont

    face = ImageFont.truetype(str(font), GLYPH)
    images, names = [], []
    for code in (*range(0x203C, 0x3300), *range(0x1F000, 0x1FB00)):
        name = unicodedata.name(chr(code), "").lower()
        box = face.getbbox(chr(code)) if name else (0, 0, 0, 0)
        canvas = Image.new("RGB", (int(box[2]) or 1, int(box[3]) or 1), "white")
        ImageDraw.Draw(canvas).text((0, 0), chr(code), font=face, embedded_color=True)
        small = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
        if small.min() < 255:  # the font has it
            images.append(small)
            names.append(name)
    return np.stack(images), names


def category(name: str) -> str:
    """The first category one of whose words is in a name; ``object`` if none is."""
    words = set(re.findall(r"[a-z0-9]+", name))
    lists = (line.partition(": ") for line in CATEGORIES.splitlines())
    return next((label for label, _, listed in lists if words & set(listed.split())), "object")


def group_similar(images: Images, names: list[str]) -> list[int]:
    """Number of the group of each picture; groups are tied by like names and by like pictures."""
    group = list(range(len(names)))

    def root(row: int) -> int:
        while group[row] != row:
            row = group[row]
        return row

    first: dict[str, int] = {}
    flat = images.reshape(len(images), -1).astype(np.float32)
    for row, name in enumerate(names):
        words = re.findall(r"[a-z]+", name)
        same = first.setdefault(" ".join(word for word in words if word not in VARIANTS.split()) or name, row)
        near = np.flatnonzero(np.abs(flat[:row] - flat[row]).mean(axis=1) < ALIKE)
        for other in (same, *near):
            group[root(row)] = root(int(other))
    return [root(row) for row in range(len(names))]


def splits(labels: list[str], groups: list[int]) -> dict[str, NDArray[np.int64]]:
    """Rows of each split: groups whole, of each category (that of the group's root) the same shares."""
    random = np.random.default_rng(SEED)
    chosen: dict[str, list[int]] = {split: [] for split in SHARES}
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    for label in sorted(set(labels)):
        own = [group for group in members if labels[group] == label]
        total = sum(len(members[group]) for group in own)
        counts = dict.fromkeys(SHARES, 0)
        for index in random.permutation(len(own)):
            split = min(SHARES, key=lambda name: counts[name] / (SHARES[name] * total))
            chosen[split] += members[own[index]]
            counts[split] += len(members[own[index]])
    return {split: np.array(sorted(rows), np.int64) for split, rows in chosen.items()}


VARIANTS = """black white red blue orange yellow green purple brown large small medium heavy man woman men women person
persons mans womans mens boy girl adult child male female father mother prince princess older waxing waning first last
quarter full new crescent left right leftwards rightwards upwards downwards up down pointing one two three four five six
seven eight nine ten eleven twelve thirty oclock raised lowered"""

# In this order: the face of an animal is an animal's, a clock's is a sign.
CATEGORIES = """nature: moon
sign: clock symbol squared modifier heart hearts
animal: rat mouse ox buffalo cow tiger leopard rabbit cat dragon crocodile whale snail snake horse ram goat sheep
animal: monkey rooster chicken dog pig boar elephant octopus ant bug honeybee beetle fish blowfish turtle chick
animal: bird penguin koala poodle camel dolphin frog hamster wolf bear panda chipmunk spider crab lion scorpion
animal: turkey unicorn eagle duck bat shark owl fox butterfly deer gorilla lizard rhinoceros shrimp squid giraffe
animal: zebra hedgehog sauropod rex cricket kangaroo llama peacock hippopotamus parrot raccoon lobster mosquito
animal: badger swan mammoth dodo sloth otter orangutan skunk flamingo oyster beaver bison seal fly worm cockroach
animal: dove
person: person people man woman boy girl men women family officer bride baby worker princess prince guardsman
person: dancer runner surfer swimmer lifter golfer bicyclist pedestrian adult child mage fairy vampire merperson
person: elf genie zombie superhero supervillain ninja angel christmas selfie shrug juggling wrestlers fencer
person: climbing massage haircut sleuth couple kiss bust busts silhouette snowboarder skier handball polo
person: cartwheel feeding troll hug hugging
face: face ogre goblin ghost alien imp skull poo monster laughing
person: hand hands fist finger fingers index thumbs biceps fisted palm palms ear nose mouth eye eyes tongue lip
person: lips leg foot arm brain tooth bone handshake
sign: circled square triangle triangles arrow arrows circle diamond regional ideograph katakana sign mark aries
sign: taurus gemini cancer leo virgo libra scorpius sagittarius capricorn aquarius pisces ophiuchus keycap
sign: button sparkle asterisk star cross plus minus division equals loop dash suit om peace yin multiplication
sign: check restroom stop eject information pedestrians bicycles
food: hot taco burrito chestnut tomato aubergine grapes melon watermelon tangerine lemon banana pineapple apple
food: pear peach cherries strawberry hamburger pizza meat poultry rice curry bowl spaghetti bread fries potato
food: dango oden sushi cake cream doughnut cookie chocolate candy lollipop custard honey shortcake bento food
food: cooking fork teacup sake wine cocktail drink beer bottle popcorn croissant avocado cucumber bacon carrot
food: baguette salad flatbread egg milk peanuts kiwifruit pancakes dumpling takeout chopsticks cup coconut
food: broccoli pie pretzel sandwich canned leafy mango bagel cheese cupcake salt beverage garlic onion falafel
food: waffle butter ice tea blueberries pepper olive tamale fondue teapot liquid beans jar glass glasses spoon
food: mushroom
nature: sun cloud rain snow snowman snowflake tornado fog foggy rainbow wave volcano milky earth tree cactus
nature: tulip blossom rose hibiscus sunflower maize herb leaf shamrock seedling flower bouquet mountain sunrise
nature: sunset night dusk desert island beach comet planet cyclone plant feather lotus coral nest rock wood
nature: umbrella droplet fire fuji shell wind shooting glowing globe park palm
travel: airplane rocket helicopter locomotive railway train metro rail station tram bus trolleybus minibus
travel: ambulance engine car cars taxi automobile vehicle truck lorry tractor monorail cableway tramway ship boat
travel: rowboat speedboat bicycle scooter motorcycle canoe sled saucer skateboard rickshaw ferry sailboat
travel: satellite wheel house building buildings office hospital bank hotel store school factory castle church
travel: shrine mosque synagogue temple hut kaaba tower statue stadium cityscape construction tent fountain bridge
travel: motorway coaster carousel circus departure arriving camping moyai traffic"""


if __name__ == "__main__":
    main()
