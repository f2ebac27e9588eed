"""Sample pictures: the pipeline under its teacher and under a student, side by side."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm.auto import tqdm

from ..errors import DistillError
from .calls import call_encoder
from .pipeline import Encode, images_of, run_pipeline, teacher_of
from .states import evaluating

logger = logging.getLogger(__name__)

# A sheet holds no more pixels of a picture than this, and tiny pictures are enlarged to at least:
_MAX_SIZE, _MIN_SIZE = 512, 192
_MARGIN, _FONT_SIZE, _LINE = 12, 16, 22


class Samples:
    """Whole pictures for some prompts, each student's beside the teacher's from the same noise.

    The teacher's are painted at once, before any training: a decoder that is missing, or that the
    device has no room for, is noticed then.

    Args:
        pipe: the pipeline with the teacher.
        prompts: that are painted.
        pipeline_kwargs: how the pipeline is called, as for `capture`.
        seed: of the first prompt's noise; the next one's is one higher.

    Attributes:
        pictures: whether the pipeline makes any. Of videos and sounds there are no samples.

    Raises:
        DistillError: the pipeline was loaded without its decoder.
    """

    def __init__(
        self, pipe: Any, prompts: Sequence[str], pipeline_kwargs: Mapping[str, Any], seed: int
    ) -> None:
        if "vae" in pipe.components and pipe.vae is None:
            raise DistillError(
                f"Sample pictures need a decoder, and {type(pipe).__name__}.vae is None: load the "
                "pipeline with it, or set samples_every to 0."
            )
        self._pipe = pipe
        self._prompts = list(prompts)
        self._kwargs = dict(pipeline_kwargs)
        self._seed = seed
        self._teacher = self._paint(call_encoder)
        self.pictures = bool(self._teacher)
        if not self.pictures:
            logger.warning(
                "%s makes no pictures: there will be no samples of it.", type(pipe).__name__
            )

    def sheet(self, student: nn.Module, name: str = "student") -> Image.Image:
        """Paint all prompts under a student.

        Args:
            student: its mode (train or eval) is as before when this returns.
            name: stands above its pictures.

        Returns:
            Each prompt, and under it the teacher's and the student's picture.
        """
        with evaluating(student):
            pictures = self._paint(encoded_by(student, self._pipe))
        return side_by_side(self._prompts, {"teacher": self._teacher, name: pictures})

    def _paint(self, encode: Encode) -> list[Image.Image]:
        pictures = []
        for i, prompt in enumerate(tqdm(self._prompts, desc="sample pictures", leave=False)):
            images = paint(self._pipe, [prompt], self._kwargs, [self._seed + i], encode)
            if not images:
                return []
            pictures.append(images[0])
        return pictures


def paint(
    pipe: Any,
    prompts: Sequence[str],
    pipeline_kwargs: Mapping[str, Any],
    seeds: Sequence[int],
    encode: Encode,
) -> tuple[Image.Image, ...]:
    """The pictures of a batch of prompts, each from the noise of its own seed, if T5's rows are
    what `encode` returns; none, of pipelines for video and sound.
    """
    output = run_pipeline(
        pipe, prompts, pipeline_kwargs, seeds, encode=encode,
        denoise=lambda _, forward, kwargs: forward(**kwargs), output_type="pil",
    )  # fmt: skip
    return images_of(output)


def encoded_by(student: nn.Module, pipe: Any) -> Encode:
    """`encode`, for a student in the place of the pipeline's teacher."""
    dtype: Any = teacher_of(pipe).dtype
    return lambda _, ids, mask: call_encoder(student, ids, mask).to(dtype)


def side_by_side(
    prompts: Sequence[str], columns: Mapping[str, Sequence[Image.Image]]
) -> Image.Image:
    """A sheet with a row for each prompt, headed by it, and a column for each name.

    Args:
        prompts: of the rows.
        columns: the pictures by the column's name, one for each prompt, all of one size.
    """
    (size, *_) = {picture.size for pictures in columns.values() for picture in pictures}
    scale = min(_MAX_SIZE / max(size), max(1, _MIN_SIZE // max(size)))
    width, height = (round(scale * length) for length in size)
    font = ImageFont.load_default(_FONT_SIZE)
    sheet_width = _MARGIN + len(columns) * (width + _MARGIN)
    texts = [_wrap(prompt, font, sheet_width - 2 * _MARGIN) for prompt in prompts]
    head = _FONT_SIZE + 2 * _MARGIN
    tops = [head]
    for lines in texts:
        tops.append(tops[-1] + len(lines) * _LINE + height + 2 * _MARGIN)
    sheet = Image.new("RGB", (sheet_width, tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    # Enlarged pixels stay pixels.
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    for c, (name, pictures) in enumerate(columns.items()):
        x = _MARGIN + c * (width + _MARGIN)
        draw.text((x, _MARGIN), name, "black", font)
        for picture, lines, top in zip(pictures, texts, tops, strict=False):
            scaled = picture.convert("RGB").resize((width, height), how)
            sheet.paste(scaled, (x, top + len(lines) * _LINE))
    for lines, top in zip(texts, tops, strict=False):
        for i, text in enumerate(lines):
            draw.text((_MARGIN, top + i * _LINE), text, "dimgray", font)
    return sheet


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines of at most `width` pixels, but for words that are longer."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
