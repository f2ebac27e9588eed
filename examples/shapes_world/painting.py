"""Painting captions of the miniature world with its pipeline, and measuring what was painted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from . import world

PIPELINE = Path(__file__).parent / "pipeline"
STUDENT = Path(__file__).parent / "student"
# How the pipeline is called: as it was trained. `train` and `velocity_gap` take the same as
# `pipeline_kwargs`.
CALL = {
    "height": world.SIDE,
    "width": world.SIDE,
    "num_inference_steps": 20,
    "max_sequence_length": world.MAX_TOKENS,
}


def load_pipeline(folder: Path = PIPELINE) -> FluxPipeline:
    """The trained pipeline, in float32, on a GPU if there is one."""
    pipe = FluxPipeline.from_pretrained(folder, local_files_only=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)


def captions(
    count: int, *, held_out: bool, seed: int = 0, chatter: float = 0.5
) -> tuple[list[world.Scene], list[str]]:
    """`count` scenes of each criterion with their captions; the scenes don't depend on
    `chatter`."""
    scenes, texts = [], []
    for criterion in world.CRITERIA:
        for i in range(count):
            rng = random.Random(f"{seed} {criterion} {i} {held_out}")
            scenes.append(world.sample_scene(rng, criterion, held_out=held_out))
            texts.append(world.describe(scenes[-1], rng, chatter))
    return scenes, texts


def paint(
    pipe: FluxPipeline, texts: Sequence[str], *, seed: int = 0, batch_size: int = 50
) -> list[np.ndarray]:
    """A (64, 64, 3) uint8 picture of each caption; the noise depends on `seed` and the place in the
    list alone."""
    pictures: list[np.ndarray] = []
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(texts), batch_size), "painting", unit="batch", leave=False):
        batch = list(texts[start : start + batch_size])
        generators = [
            torch.Generator("cpu").manual_seed(seed * 1_000_003 + start + i)
            for i in range(len(batch))
        ]
        images = pipe(batch, generator=generators, output_type="np", **CALL).images
        pictures += list((images * 255).round().astype(np.uint8))
    return pictures


def sheet(
    columns: Sequence[str],
    texts: Sequence[str],
    pictures: Sequence[Sequence[np.ndarray]],
    scale: int = 3,
) -> Image.Image:
    """A labelled picture: a row for each caption, a column for each encoder.
    `pictures[column][row]`."""
    side, gap, label, head = world.SIDE * scale, 8, 330, 30
    image = Image.new(
        "RGB",
        (label + len(columns) * (side + gap) + gap, head + len(texts) * (side + gap)),
        "white",
    )
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    for c, name in enumerate(columns):
        pen.text((label + c * (side + gap) + side / 2, head / 2), name, "black", font, anchor="mm")
        for r in range(len(texts)):
            tile = Image.fromarray(pictures[c][r]).resize((side, side), Image.Resampling.NEAREST)
            image.paste(tile, (label + c * (side + gap), head + r * (side + gap)))
    for r, text in enumerate(texts):
        lines, line = [], ""
        for word in text.split():
            if pen.textlength(f"{line} {word}", font) > label - 24:
                lines, line = [*lines, line], word
            else:
                line = f"{line} {word}".strip()
        pen.multiline_text(
            (12, head + r * (side + gap) + side / 2),
            "\n".join([*lines, line]),
            "black",
            font,
            anchor="lm",
        )
    return image
