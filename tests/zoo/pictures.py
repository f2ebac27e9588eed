"""Small pictures for the pipelines that start from one."""

from __future__ import annotations

import torch
from PIL import Image


def picture(seed: int = 0, size: int = 16) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def pictures(count: int = 2, size: int = 16) -> list[Image.Image]:
    """Different ones: the frames of a video, or one for each prompt."""
    return [picture(seed, size) for seed in range(count)]


def mask(size: int = 16) -> Image.Image:
    """The left half is white: to be painted."""
    image = Image.new("L", (size, size))
    image.paste(255, (0, 0, size // 2, size))
    return image
