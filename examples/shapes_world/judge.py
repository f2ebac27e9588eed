"""Judge: reads an image of the miniature world back into the `Scene` that it shows, by analysis
through synthesis.

For every layout, the best object (or letter) is looked for at each of its places among rendered
templates, moved by up to `SHIFT` pixels; the layout whose best scene leaves the smallest squared
error in the whole image is the result. No network, no threshold, and no look at the caption:
`accuracy` compares scenes only at the end.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .world import (
    BACKGROUNDS,
    CELL,
    COLORS,
    CRITERIA,
    LAYOUTS,
    LETTER_ROW,
    LETTERS,
    SHAPES,
    SIDE,
    STYLES,
    Scene,
    Thing,
    letter_mask,
    thing_mask,
)

SHIFT = 2
_COLOR_VALUES = np.array(list(COLORS.values()), np.float32)
_BACKGROUND_VALUES = np.array(list(BACKGROUNDS.values()), np.float32)


def read(image: np.ndarray) -> Scene:
    """The scene that an image shows. `image`: (64, 64, 3) uint8 RGB."""
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected a (64, 64, 3) uint8 image, got {image.shape} {image.dtype}")
    pixels = image.astype(np.float32)
    # Objects leave most of the border free in every layout, so the median of the border is the
    # background.
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = int(((np.median(border, 0) - _BACKGROUND_VALUES) ** 2).sum(-1).argmin())
    rest = pixels - _BACKGROUND_VALUES[background]
    best_gain, best_scene = -np.inf, None
    for layout in (*LAYOUTS, "word"):
        gain, scene = _explain(rest, background, layout)
        if gain > best_gain:
            best_gain, best_scene = gain, scene
    assert best_scene is not None
    return best_scene


def accuracy(scenes: Sequence[Scene], images: Sequence[np.ndarray]) -> dict[str, float]:
    """Share of the images that show their scene whole, for each criterion; for text also the
    share of right letters."""
    seen = [read(image) for image in images]
    result = {}
    for criterion in CRITERIA:
        pairs = [
            (want, got)
            for want, got in zip(scenes, seen, strict=True)
            if want.criterion == criterion
        ]
        if pairs:
            result[criterion] = sum(want == got for want, got in pairs) / len(pairs)
    words = [(want, got) for want, got in zip(scenes, seen, strict=True) if want.word]
    if words:
        right = sum(
            a == b for want, got in words for a, b in zip(want.word, got.word, strict=False)
        )
        # Letters too many count as wrong, like letters too few.
        result["letters"] = right / sum(max(len(want.word), len(got.word)) for want, got in words)
    return result


def accuracy_with_intervals(
    scenes: Sequence[Scene], images: Sequence[np.ndarray]
) -> dict[str, str]:
    """`accuracy` as text, each share with its 95% interval: "97% (85 to 99)"."""
    counts = Counter(scene.criterion for scene in scenes)
    # The letters of a word are right or wrong together: they count as one each.
    counts["letters"] = counts["text"]
    return {
        key: "{:.0%} ({:.0f} to {:.0f})".format(
            share, *(100 * bound for bound in wilson_interval(share, counts[key]))
        )
        for key, share in accuracy(scenes, images).items()
    }


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` trials (Wilson, 1927), which also holds near 0 and
    1."""
    z = 1.96
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5 / (1 + z**2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _explain(rest: np.ndarray, background: int, layout: str) -> tuple[float, Scene]:
    """The best scene of one layout, and the squared error that it explains. `rest`: image minus
    background."""
    name = list(BACKGROUNDS)[background]
    contrast = _COLOR_VALUES - _BACKGROUND_VALUES[background]  # (colors, 3)
    total = 0.0
    if layout == "word":
        letters, gains = "", np.zeros(len(COLORS))
        for column in range(SIDE // CELL):
            cell = rest[
                LETTER_ROW * CELL : (LETTER_ROW + 1) * CELL, column * CELL : (column + 1) * CELL
            ]
            scores = _gain(cell, _letter_templates(), contrast)  # (letters, colors)
            if scores.max() <= 0:
                break  # an empty cell ends the word
            letters += LETTERS[scores.max(1).argmax() // 9]
            gains += scores.max(0)  # one colour for the whole word
        return float(gains.max()), Scene(name, layout, (), letters, list(COLORS)[gains.argmax()])
    things = []
    for x, y in LAYOUTS[layout]:
        kinds, templates = _thing_templates(layout)
        half = _window(layout) // 2
        x, y = min(max(x, half), SIDE - half), min(max(y, half), SIDE - half)
        scores = _gain(rest[y - half : y + half, x - half : x + half], templates[x, y], contrast)
        kind, color = np.unravel_index(scores.argmax(), scores.shape)
        shape, size, style = kinds[kind // (2 * SHIFT + 1) ** 2]
        things.append(Thing(list(COLORS)[color], shape, size, style))
        total += float(scores.max())
    return total, Scene(name, layout, tuple(things))


def _gain(window: np.ndarray, templates: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Squared error that each template in each colour takes from a window: (templates, colors).

    |r|^2 - |r - m c|^2 = 2 c.(m r) - |m|^2 |c|^2 for the rest r, mask m and colour contrast c.
    """
    flat = templates.reshape(len(templates), -1)
    return 2 * (flat @ window.reshape(-1, 3)) @ contrast.T - np.outer(
        (flat**2).sum(1), (contrast**2).sum(1)
    )


def _window(layout: str) -> int:
    return SIDE if layout == "one" else 22 if layout in ("row", "column") else 32


@functools.cache
def _thing_templates(
    layout: str,
) -> tuple[list[tuple[str, str, str]], dict[tuple[int, int], np.ndarray]]:
    """Kinds of objects of a layout, and per window centre their masks, all shifts of the first kind
    first."""
    sizes = {"one": ("small", "large"), "row": ("row",), "column": ("row",)}.get(layout, ("pair",))
    styles = STYLES if layout == "one" else STYLES[:1]
    kinds = [(shape, size, style) for shape in SHAPES for size in sizes for style in styles]
    half, templates = _window(layout) // 2, {}
    for x, y in LAYOUTS[layout]:
        cx, cy = (
            min(max(x, half), SIDE - half),
            min(max(y, half), SIDE - half),
        )  # windows stay inside the image
        shifts = [(dy, dx) for dy in range(-SHIFT, SHIFT + 1) for dx in range(-SHIFT, SHIFT + 1)]
        templates[cx, cy] = np.stack(
            [
                np.roll(thing_mask(*kind), (y + dy - 32, x + dx - 32), (0, 1))[
                    cy - half : cy + half, cx - half : cx + half
                ]
                for kind in kinds
                for dy, dx in shifts
            ]
        )
    return kinds, templates


@functools.cache
def _letter_templates() -> np.ndarray:
    """All letters moved by up to one pixel: (26 * 9, 16, 16)."""
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return np.stack(
        [np.roll(letter_mask(letter), shift, (0, 1)) for letter in LETTERS for shift in shifts]
    )
