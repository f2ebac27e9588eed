"""Diffusion Lens: images from each layer of a text encoder.

python examples/lens/lens.py --out examples/lens/lens.png

Source: Toker et al., ACL 2024, "Diffusion Lens: Interpreting Text Encoders in Text-to-Image
Pipelines", arXiv 2403.05846.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from t5slim import SlimT5Encoder
from t5slim.distill.pipeline import (
    batches_of,
    check_pipeline_kwargs,
    evaluating,
    run_pipeline,
    teacher_of,
)
from t5slim.distill.report import image_grid
from t5slim.errors import DistillError
from t5slim.slot import uncompiled

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world import judge, world
from shapes_world.generation import CALL, STUDENT, captions, load_pipeline

_BATCH = 32
Images = dict[str, dict[int, list[Image.Image]]]


def main() -> None:
    """Print how many captions each layer gets right, and draw the shortest of each criterion."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("lens.png"), help="image grid")
    parser.add_argument("--student", default=STUDENT, help="a folder or Hub id")
    parser.add_argument("--count", type=int, default=33, help="captions of each criterion")
    parser.add_argument("--steps", type=int, default=4, help="of each image")
    args = parser.parse_args()
    pipe = load_pipeline()
    student = SlimT5Encoder.from_pretrained(args.student, dtype=pipe.dtype).to(pipe.device)
    scenes, texts = captions(args.count, held_out=True, seed=2)
    kwargs = CALL | {"num_inference_steps": args.steps}
    images = lens(pipe, texts, {"student": student}, pipeline_kwargs=kwargs)
    for name, by_layer in images.items():
        for layer, generated in by_layer.items():
            right = judge.accuracy_with_intervals(scenes, [np.asarray(one) for one in generated])
            columns = ", ".join(f"{key} {share}" for key, share in right.items())
            print(f"{name}, layer {layer}: {columns}", flush=True)
    of_criteria = (range(k * args.count, (k + 1) * args.count) for k in range(len(world.CRITERIA)))
    shortest = [min(indices, key=lambda i: len(texts[i])) for indices in of_criteria]
    grid = lens_grid(texts, images, shortest, cell=128)
    grid.quantize(64).save(args.out, optimize=True)


def lens(
    pipe: Any,
    prompts: Sequence[str],
    students: Mapping[str, nn.Module] | None = None,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    pipeline_kwargs: Mapping[str, Any] | None = None,
) -> Images:
    """Generate prompts from the hidden states after each layer of the teacher and of students.

    The states after a layer go through the encoder's final norm (and a student's projection) as if
    there were no more layers, and the pipeline gets them as prompt embeddings.

    Args:
        pipe: A pipeline for images with its teacher; unpatch a patched one first.
        prompts: A list of prompts.
        students: Students by name, on the pipeline's device.
        layers: The layers to show: 0 is the word embeddings, the last the whole encoder, and
            negative ones count from the end. A layer that an encoder doesn't have is left out for
            it. None: all of them.
        seed: The first prompt's noise has this seed, the second's the next...; the same for all
            layers.
        pipeline_kwargs: Arguments of the pipeline's call.

    Returns:
        The images of the prompts, by encoder and layer.

    Raises:
        ValueError: There are no such layers, an encoder isn't a T5, or the pipeline generates no
            images.
        DistillError: `prompts` is one text, or the pipeline doesn't take `pipeline_kwargs`.
    """
    if isinstance(prompts, str):
        raise DistillError(f"prompts is {prompts!r}; expected a list of texts.")
    kwargs = check_pipeline_kwargs(pipe, pipeline_kwargs)
    teacher: Any = teacher_of(pipe)
    encoders = {"teacher": teacher, **(students or {})}
    chosen = {name: _layers(encoder, layers) for name, encoder in encoders.items()}
    images: Images = {name: {layer: [] for layer in found} for name, found in chosen.items()}
    for name, layer in tqdm([(n, layer) for n in chosen for layer in chosen[n]], "lens"):

        def encode(
            _: Any, input_ids: Tensor, mask: Tensor | None, name=name, layer=layer
        ) -> Tensor:
            return hidden_states(encoders[name], layer, input_ids, mask).to(teacher.dtype)

        for batch in batches_of(prompts, _BATCH):
            start = seed + len(images[name][layer])
            seeds = range(start, start + len(batch))
            with evaluating(encoders[name]):
                images[name][layer] += run_pipeline(
                    pipe, batch, kwargs, seeds, encode=encode, decode=True
                )
        if not images[name][layer]:
            raise ValueError(f"{type(pipe).__name__} generates no images.")
    return images


def lens_grid(
    prompts: Sequence[str], images: Images, shown: Sequence[int], cell: int = 256
) -> Image.Image:
    """An image grid: a line for each prompt in `shown` and encoder, a column for each layer."""
    layers = sorted({layer for by_layer in images.values() for layer in by_layer})
    blank = Image.new("RGB", next(iter(images["teacher"].values()))[0].size, "white")
    columns: dict[str, list[Image.Image]] = {f"layer {layer}": [] for layer in layers}
    for i in shown:
        for by_layer in images.values():
            for layer, column in zip(layers, columns.values(), strict=True):
                column.append(by_layer[layer][i] if layer in by_layer else blank)
    lines = [f"{name}: {prompts[i]}" for i in shown for name in images]
    return image_grid(lines, columns, cell)


@torch.no_grad()
def hidden_states(encoder: Any, layer: int, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Token embeddings (B, S, D) of an encoder that ends after a layer.

    Args:
        encoder: A T5's or UMT5's encoder, or a student.
        layer: 0 for none, up to their number, which gives the whole encoder's.
        input_ids: (B, S).
        mask: Attention mask (B, S), or None.
    """
    encoder = uncompiled(encoder)
    is_student = isinstance(encoder, SlimT5Encoder)
    stack = encoder.encoder.encoder if is_student else encoder.encoder
    output = stack(input_ids=input_ids, attention_mask=mask, output_hidden_states=True)
    states = output.hidden_states[layer]
    if layer < len(output.hidden_states) - 1:  # transformers' last state is after the norm already
        states = stack.final_layer_norm(states)
    return encoder.final_projection(states) if is_student else states


def _layers(encoder: Any, wanted: Sequence[int] | None) -> list[int]:
    encoder = uncompiled(encoder)
    count = getattr(getattr(encoder, "config", None), "num_layers", None)
    if count is None or not hasattr(encoder, "encoder"):
        raise ValueError(f"A {type(encoder).__name__} has no layers of a T5 to look into.")
    indices = range(count + 1)
    if wanted is None:
        return list(indices)
    found = [indices[layer] for layer in wanted if -len(indices) <= layer < len(indices)]
    if not found:
        raise ValueError(f"layers is {wanted}; a {type(encoder).__name__} has 0 to {count}.")
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    main()
