"""Diffusion Lens: what each layer of an encoder already knows, painted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..distill.pipeline import check_pipeline_kwargs, teacher_of
from ..distill.samples import paint, side_by_side
from ..distill.states import evaluating
from ..encoder import SlimT5Encoder
from ..errors import EvaluateError
from ..slot import uncompiled
from .comparison import TEACHER, png
from .loaded import Students, loaded_students, named_students, teacher_in_slot


@dataclass(frozen=True)
class Lens:
    """The pictures of a prompt from each layer of each encoder; a notebook shows them.

    Attributes:
        prompt: that was painted.
        images: by encoder, a picture for each of its layers in `layers`.
        layers: by encoder, numbers of layers: 0 is the word embeddings, the last the whole encoder.
    """

    prompt: str
    images: Mapping[str, Sequence[Image.Image]] = field(repr=False)
    layers: Mapping[str, Sequence[int]]

    def sheet(self) -> Image.Image:
        """A row for each encoder, its layers from left to right."""
        every = sorted({layer for layers in self.layers.values() for layer in layers})
        blank = Image.new("RGB", next(iter(self.images.values()))[0].size, "white")
        columns: dict[str, list[Image.Image]] = {f"layer {layer}": [] for layer in every}
        titles = []
        for name, pictures in self.images.items():
            known = dict(zip(self.layers[name], pictures, strict=True))
            for layer, column in zip(every, columns.values(), strict=True):
                column.append(known.get(layer, blank))
            titles.append(f"{name}: {self.prompt}")
        return side_by_side(titles, columns)

    def _repr_png_(self) -> bytes:
        return png(self.sheet())


def lens(
    pipe: Any,
    prompt: str,
    students: Students = None,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    pipeline_kwargs: Mapping[str, Any] | None = None,
) -> Lens:
    """Paint a prompt from what each layer of the teacher, and of each student, has made of it.

    The states after a layer go through the encoder's final norm (and a student's projection) as if
    there were no more layers, and the pipeline paints what it reads in them. Early layers know the
    things that a prompt names, later ones how they belong together.

    Source: Toker et al., ACL 2024, "Diffusion Lens: Interpreting Text Encoders in Text-to-Image
    Pipelines", arXiv 2403.05846.

    Args:
        pipe: a pipeline with a T5 that makes pictures; or a patched one, as for `compare`.
        prompt: one.
        students: as for `compare`; None: the teacher alone, and the student in the pipeline, if one
            is.
        layers: which; a number that an encoder doesn't have is left out for it. None: all of them.
            Negative ones count from the end.
        seed: of the noise, the same for all pictures.
        pipeline_kwargs: how the pipeline is called.

    Returns:
        The `Lens`. The pipeline and the students are as they were.

    Raises:
        EvaluateError: no layers; an encoder that isn't a T5; or a pipeline without pictures.
        The rest as for `compare`.
    """
    kwargs = dict(pipeline_kwargs or {})
    with teacher_in_slot(pipe) as guest:
        students = guest if students is None else students
        named = {} if students is None else named_students(students)
        check_pipeline_kwargs(pipe, kwargs)
        teacher = teacher_of(pipe)
        with loaded_students(pipe, named) as loaded:
            encoders = {TEACHER: teacher, **loaded.students}
            chosen = {name: _layers(encoder, layers) for name, encoder in encoders.items()}
            images: dict[str, list[Image.Image]] = {name: [] for name in encoders}
            jobs = [(name, layer) for name, found in chosen.items() for layer in found]
            for name, layer in tqdm(jobs, desc="lens", unit="picture"):
                with evaluating(encoders[name]):
                    images[name] += _paint(pipe, prompt, kwargs, seed, encoders[name], layer)
    return Lens(prompt, images, chosen)


def _paint(
    pipe: Any, prompt: str, kwargs: dict[str, Any], seed: int, encoder: nn.Module, layer: int
) -> tuple[Image.Image, ...]:
    dtype: Any = teacher_of(pipe).dtype

    def encode(_: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return rows_after(encoder, layer, input_ids, attention_mask).to(dtype)

    pictures = paint(pipe, [prompt], kwargs, [seed], encode)
    if not pictures:
        raise EvaluateError(f"{type(pipe).__name__} makes no pictures.")
    return pictures[:1]


@torch.no_grad()
def rows_after(
    encoder: Any, layer: int, input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """The rows of an encoder that ends after a layer, with its final norm and its projection.

    Args:
        encoder: a T5's or UMT5's encoder, or a student.
        layer: 0 for none, up to their number.
        input_ids: (B, S).
        attention_mask: (B, S), or None.

    Returns:
        (B, S, D), those of the whole encoder if `layer` is the last.
    """
    encoder = uncompiled(encoder)
    is_student = isinstance(encoder, SlimT5Encoder)
    stack = encoder.encoder.encoder if is_student else encoder.encoder
    # transformers' last state is after the norm already.
    states = stack(
        input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
    ).hidden_states
    rows = states[layer]
    if layer < len(states) - 1:
        rows = stack.final_layer_norm(rows)
    return encoder.final_projection(rows) if is_student else rows


def _layers(encoder: Any, wanted: Sequence[int] | None) -> list[int]:
    config = getattr(uncompiled(encoder), "config", None)
    count = getattr(config, "num_layers", None)
    if count is None or not hasattr(uncompiled(encoder), "encoder"):
        raise EvaluateError(f"A {type(encoder).__name__} has no layers of a T5 to look into.")
    if wanted is None:
        return list(range(count + 1))
    found = [layer + count + 1 if layer < 0 else layer for layer in wanted]
    found = [layer for layer in found if 0 <= layer <= count]
    if not found:
        raise EvaluateError(
            f"layers is {list(wanted)}; a {type(encoder).__name__} has 0 to {count}."
        )
    return found
