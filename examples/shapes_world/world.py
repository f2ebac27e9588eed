"""The miniature world: scenes, how they are drawn in 64x64 pixels, and how they are described.

A `Scene` is the truth from which both the image (`draw`) and the caption (`describe`) are made,
and what the judge (`judge.py`) reads back from an image. Scenes follow the three criteria by which
the paper chooses its prompts (arXiv 2503.19897, section 3.3): *quality* (one object and how it is
drawn), *semantics* (several objects: binding, relations, counts) and *text* (a word on the
image).
"""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 64
MAX_TOKENS = 32  # no caption is longer; the pipeline's max_sequence_length
CRITERIA = ("quality", "semantics", "text")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (245, 205, 40),
    "purple": (150, 50, 180),
    "cyan": (40, 200, 215),
}
BACKGROUNDS = {"white": (250, 250, 250), "grey": (140, 140, 140), "black": (15, 15, 15)}
SHAPES = ("circle", "square", "triangle", "cross")
STYLES = ("filled", "outlined")
RADIUS = {"small": 10, "large": 22, "pair": 12, "row": 9}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A letter's cell is one latent token of the denoiser: 8x from the autoencoder, 2x2 from the packing
# of latents.
CELL, LETTER_ROW = 16, 1

# Where objects can stand. Each layout is a tuple of places (x, y of the centre); the order of the
# places is the order of the objects in a scene, so that comparing two scenes compares places too.
LAYOUTS: dict[str, tuple[tuple[int, int], ...]] = {
    "one": ((32, 32),),
    "left-right": ((16, 32), (48, 32)),
    "top-bottom": ((32, 16), (32, 48)),
    "row": ((11, 32), (32, 32), (53, 32)),
    "column": ((32, 11), (32, 32), (32, 53)),
    "four": ((16, 16), (48, 16), (16, 48), (48, 48)),
}


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    color: str
    shape: str
    size: str = "pair"
    style: str = "filled"


@dataclass(frozen=True)
class Scene:
    """Content of an image: `things` at the places of `layout`, or a `word` in a colour; equality is
    the judge's test."""

    background: str
    layout: str
    things: tuple[Thing, ...] = ()
    word: str = ""
    word_color: str = ""

    @property
    def criterion(self) -> str:
        return {"one": "quality", "word": "text"}.get(self.layout, "semantics")

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept from training: one in eight, by a hash, the same on
        every machine.

        The background is part of the combination only for single objects. A word is held out in
        every colour.
        """
        combination = self.word or (
            self.layout,
            self.things,
            self.background if self.layout == "one" else "",
        )
        return hashlib.sha256(repr(combination).encode()).digest()[0] < 32


def sample_scene(rng: random.Random, criterion: str, held_out: bool = False) -> Scene:
    """Draws a scene of one criterion from the training combinations, or from the held-out ones."""
    while True:
        scene = _SAMPLERS[criterion](rng)
        if scene.held_out == held_out:
            return scene


def _quality(rng: random.Random) -> Scene:
    thing = Thing(
        _color(rng), rng.choice(SHAPES), rng.choice(("small", "large")), rng.choice(STYLES)
    )
    return Scene(rng.choice(list(BACKGROUNDS)), "one", (thing,))


def _semantics(rng: random.Random) -> Scene:
    background = rng.choice(list(BACKGROUNDS))
    kind = rng.choices(("pair", "three", "count"), (5, 2, 3))[0]
    if kind == "count":  # of the same thing
        layout = rng.choice(("left-right", "row", "four"))
        thing = Thing(_color(rng), rng.choice(SHAPES), "row" if layout == "row" else "pair")
        return Scene(background, layout, (thing,) * len(LAYOUTS[layout]))
    layout = rng.choice(("left-right", "top-bottom") if kind == "pair" else ("row", "column"))
    size = "pair" if kind == "pair" else "row"
    kinds = rng.sample(
        [(color, shape) for color in COLORS for shape in SHAPES], len(LAYOUTS[layout])
    )
    return Scene(background, layout, tuple(Thing(color, shape, size) for color, shape in kinds))


def _text(rng: random.Random) -> Scene:
    word = "".join(rng.choices(LETTERS, k=rng.choice((2, 3, 4))))
    return Scene(rng.choice(list(BACKGROUNDS)), "word", (), word, _color(rng))


def _color(rng: random.Random) -> str:
    return rng.choice(list(COLORS))


_SAMPLERS = {"quality": _quality, "semantics": _semantics, "text": _text}


# --- how a scene is drawn ---------------------------------------------------


@functools.cache
def thing_mask(shape: str, size: str, style: str) -> np.ndarray:
    """Coverage of an object in the middle of the image: (64, 64) float32 in 0..1, antialiased."""
    scale, r, middle = 4, RADIUS[size], SIDE / 2
    image = Image.new("L", (SIDE * scale, SIDE * scale))
    pen = ImageDraw.Draw(image)

    def fill(radius: float, value: int) -> None:
        low, high = (middle - radius) * scale, (middle + radius) * scale
        if shape == "circle":
            pen.ellipse((low, low, high, high), fill=value)
        elif shape == "square":
            inset = radius * 0.12 * scale  # about the area of the circle
            pen.rectangle((low + inset, low + inset, high - inset, high - inset), fill=value)
        elif shape == "triangle":
            pen.polygon(((middle * scale, low), (high, high), (low, high)), fill=value)
        else:  # cross
            arm = radius * 0.34 * scale
            pen.rectangle((low, middle * scale - arm, high, middle * scale + arm), fill=value)
            pen.rectangle((middle * scale - arm, low, middle * scale + arm, high), fill=value)

    fill(r, 255)
    mask = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255
    if style == "outlined":
        # Erosion keeps the line equally wide on slanted edges, which drawing a smaller shape
        # inside would not.
        width = 2 if size == "small" else 3
        solid, inner = mask > 0.5, mask.copy()
        for dy in range(-width, width + 1):
            for dx in range(-width, width + 1):
                if dx * dx + dy * dy <= width * width:
                    inner = np.minimum(inner, np.roll(solid, (dy, dx), (0, 1)))
        mask = mask - np.minimum(inner, mask)
    return mask


@functools.cache
def letter_mask(letter: str) -> np.ndarray:
    """Coverage of a capital letter in its cell: (16, 16) float32 of 0 and 1; Pillow's bitmap font,
    doubled."""
    glyph = Image.new("1", (8, 8))
    # The font's capitals stand 2 pixels below the top of their 11 pixel line.
    ImageDraw.Draw(glyph).text((1, -2), letter, fill=1, font=ImageFont.load_default_imagefont())
    return np.asarray(glyph.resize((CELL, CELL), Image.Resampling.NEAREST), np.float32)


def draw(scene: Scene, rng: random.Random | None = None) -> np.ndarray:
    """Draws a scene: (64, 64, 3) uint8 RGB. With `rng`, each object is moved by up to one pixel."""
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    image = np.broadcast_to(background, (SIDE, SIDE, 3)).copy()
    for thing, (x, y) in zip(scene.things, LAYOUTS.get(scene.layout, ()), strict=True):
        dx, dy = (rng.randint(-1, 1), rng.randint(-1, 1)) if rng else (0, 0)
        mask = np.roll(
            thing_mask(thing.shape, thing.size, thing.style), (y + dy - 32, x + dx - 32), (0, 1)
        )[..., None]
        image += mask * (np.array(COLORS[thing.color], np.float32) - image)
    for column, letter in enumerate(scene.word):
        cell = image[
            LETTER_ROW * CELL : (LETTER_ROW + 1) * CELL, column * CELL : (column + 1) * CELL
        ]
        cell += letter_mask(letter)[..., None] * (
            np.array(COLORS[scene.word_color], np.float32) - background
        )
    return image.round().astype(np.uint8)


# --- how a scene is described ----------------------------------------------------

_COUNTS = {2: "two", 3: "three", 4: "four"}
_PAIRS = {
    "left-right": (
        "{a} to the left of {b}",
        "{b} to the right of {a}",
        "{b} with {a} on its left",
        "{a} with {b} on its right",
        "on the left {a} and on the right {b}",
    ),
    "top-bottom": (
        "{a} above {b}",
        "{b} below {a}",
        "{b} with {a} over it",
        "{a} with {b} under it",
        "at the top {a} and at the bottom {b}",
    ),
}
_THREES = {
    "row": ("{a}, {b} and {c} from left to right", "a row of {a}, {b} and {c}"),
    "column": ("{a}, {b} and {c} from top to bottom", "a column of {a}, {b} and {c}"),
}
_WORDS = (
    'the word "{word}" in {color}',
    '{color} letters that spell "{word}"',
    'a sign that says "{word}" in {color}',
    'the {color} word "{word}"',
)
_SUBJECTS = [
    "my brother",
    "our teacher",
    "the old sailor",
    "her neighbour",
    "the committee",
    "a young doctor",
    "the baker",
    "his aunt",
]
_VERBS = [
    "forgot",
    "explained",
    "enjoyed",
    "wrote about",
    "asked about",
    "talked about",
    "remembered",
    "complained about",
]
_OBJECTS = [
    "the meeting",
    "last winter",
    "the long journey",
    "an old song",
    "the train",
    "the price of bread",
    "her idea",
    "the news",
]
_ENDINGS = ["", "again", "yesterday", "this morning", "once more", "for hours"]


def describe(scene: Scene, rng: random.Random, chatter: float = 0.5) -> str:
    """A caption of a scene in one of several phrasings; with probability `chatter`, plus a sentence
    of no visual meaning.

    What a caption leaves out has a default: a white background, a filled object.
    """
    if scene.word:
        text = rng.choice(_WORDS).format(word=scene.word, color=scene.word_color)
    elif scene.layout == "one":
        text = _describe_one(scene.things[0], rng)
    elif len(set(scene.things)) == 1:
        thing, count = scene.things[0], _COUNTS[len(scene.things)]
        group = rng.choice(("", "a group of ", "exactly "))
        text = f"{group}{count} {thing.color} {plural(thing.shape)}"
    else:
        names = {key: f"a {t.color} {t.shape}" for key, t in zip("abc", scene.things, strict=False)}
        text = rng.choice((_PAIRS | _THREES)[scene.layout]).format(**names)
    if scene.background != "white" or rng.random() < 0.5:
        where = rng.choice(("on a {} background", "on {}"))
        text += " " + where.format(scene.background)
    if rng.random() < chatter:
        text = f"{text}. {sentence(rng)}" if rng.random() < 0.7 else f"{sentence(rng)}. {text}"
    return text


def plural(shape: str) -> str:
    """crosses, circles."""
    return shape + ("es" if shape == "cross" else "s")


def _describe_one(thing: Thing, rng: random.Random) -> str:
    if thing.style == "outlined":
        forms = ("a {size} outlined {color} {shape}", "the outline of a {size} {color} {shape}")
    else:
        forms = ("a {size} {color} {shape}", "a {size} filled {color} {shape}")
    return rng.choice((*forms, "a {size} {shape}, {style}, in {color}")).format(**vars(thing))


def sentence(rng: random.Random) -> str:
    """A sentence that says nothing about an image."""
    words = (rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(_OBJECTS), rng.choice(_ENDINGS))
    return " ".join(words).strip()


def restate(scene: Scene, rng: random.Random) -> str:
    """A scene said a second time, as plain statements: with the caption, text in which words can be
    told from others.

    A language model that must fill in a masked colour or letter learns from such text which word
    belongs to which.
    """
    if scene.word:
        ordinals = ("first", "second", "third", "fourth")
        facts = [f"the {ordinals[i]} letter is {letter}" for i, letter in enumerate(scene.word)]
    elif scene.layout == "one":
        thing = scene.things[0]
        facts = [f"the {thing.shape} is {fact}" for fact in (thing.color, thing.size, thing.style)]
    elif len(set(scene.things)) == 1:
        facts = [
            f"there are {_COUNTS[len(scene.things)]}",
            f"each {scene.things[0].shape} is {scene.things[0].color}",
        ]
    else:
        places = {
            "left-right": ("left", "right"),
            "top-bottom": ("top", "bottom"),
            "row": ("left", "middle", "right"),
            "column": ("top", "middle", "bottom"),
        }[scene.layout]
        facts = [
            f"{place} is {t.color} {t.shape}" for place, t in zip(places, scene.things, strict=True)
        ]
    facts.append(f"the background is {scene.background}")
    rng.shuffle(facts)
    return ", ".join(facts)
