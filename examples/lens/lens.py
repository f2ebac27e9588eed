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

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from t5slim import SlimT5Encoder
from t5slim.distill.pipeline import check_pipeline_kwargs, evaluating, run_pipeline, teacher_of
from t5slim.distill.report import image_grid
from t5slim.errors import DistillError
from t5slim.slot import uncompiled

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world.generation import CALL, SD3_STUDENT, STUDENT, load_pipeline

CAPTIONS = (
    "at the top a cyan circle and at the bottom a blue cross on a white background",
    'the yellow word "RL" on white',
)
Images = dict[str, dict[int, Image.Image]]


def main() -> None:
    """Generate every caption from every layer, and put the image grids below each other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("lens.png"))
    parser.add_argument("--captions", nargs="+", default=CAPTIONS)
    args = parser.parse_args()
    pipe = load_pipeline()
    students = {
        name: SlimT5Encoder.from_pretrained(folder, dtype=pipe.dtype).to(pipe.device)
        for name, folder in {"FLUX's student": STUDENT, "SD3's student": SD3_STUDENT}.items()
    }
    grids = [
        lens_grid(caption, lens(pipe, caption, students, pipeline_kwargs=CALL))
        for caption in args.captions
    ]
    size = max(grid.width for grid in grids), sum(grid.height for grid in grids)
    whole, top = Image.new("RGB", size, "white"), 0
    for grid in grids:
        whole.paste(grid, (0, top))
        top += grid.height
    whole.save(args.out)


def lens(
    pipe: Any,
    prompt: str,
    students: Mapping[str, nn.Module] | None = None,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    pipeline_kwargs: Mapping[str, Any] | None = None,
) -> Images:
    """Generate a prompt from the hidden states after each layer of the teacher and of students.

    The states after a layer go through the encoder's final norm (and a student's projection) as if
    there were no more layers, and the pipeline gets them as prompt embeddings.

    Args:
        pipe: a pipeline for images with its teacher; unpatch a patched one first.
        prompt: the prompt.
        students: students by name, on the pipeline's device.
        layers: layers to show: 0 is the word embeddings, the last the whole encoder, and negative
            ones count from the end. A layer that an encoder doesn't have is left out for it.
            None: all of them.
        seed: seed of the noise, the same for all images.
        pipeline_kwargs: arguments of the pipeline's call.

    Returns:
        The images, by encoder and layer.

    Raises:
        ValueError: no such layers; an encoder that isn't a T5; a pipeline without images; or
            several prompts.
    """
    if not isinstance(prompt, str):
        raise DistillError(f"prompt is {prompt!r}; expected one text: call lens for each.")
    kwargs = check_pipeline_kwargs(pipe, pipeline_kwargs)
    teacher: Any = teacher_of(pipe)
    encoders = {"teacher": teacher, **(students or {})}
    chosen = {name: _layers(encoder, layers) for name, encoder in encoders.items()}
    images: Images = {name: {} for name in encoders}
    for name, layer in tqdm([(n, layer) for n in chosen for layer in chosen[n]], "lens"):

        def encode(
            _: Any, input_ids: Tensor, mask: Tensor | None, name=name, layer=layer
        ) -> Tensor:
            return hidden_states(encoders[name], layer, input_ids, mask).to(teacher.dtype)

        with evaluating(encoders[name]):
            generated = run_pipeline(pipe, [prompt], kwargs, [seed], encode=encode, decode=True)
        if not generated:
            raise ValueError(f"{type(pipe).__name__} generates no images.")
        images[name][layer] = generated[0]
    return images


def lens_grid(prompt: str, images: Images) -> Image.Image:
    """A line of images for each encoder, its layers from left to right."""
    every = sorted({layer for by_layer in images.values() for layer in by_layer})
    blank = Image.new("RGB", next(iter(images["teacher"].values())).size, "white")
    columns = {
        f"layer {layer}": [by_layer.get(layer, blank) for by_layer in images.values()]
        for layer in every
    }
    return image_grid([f"{name}: {prompt}" for name in images], columns)


@torch.no_grad()
def hidden_states(encoder: Any, layer: int, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Token embeddings (B, S, D) of an encoder that ends after a layer.

    Args:
        encoder: a T5's or UMT5's encoder, or a student.
        layer: 0 for none, up to their number, which gives the whole encoder's.
        input_ids: (B, S).
        mask: attention mask (B, S), or None.
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
