"""The whole path in a minute: a FLUX pipeline under its teacher T5, then under a student.

    python examples/quickstart/quickstart.py

Loads the miniature pipeline of `shapes_world/`, patches it with the committed student, generates
the same held-out captions from the same noise under both, and without any text, writes an image
grid and prints a table.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Before the imports: their warnings and loading bars say nothing of use here.
os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DIFFUSERS_VERBOSITY"] = "error"

import diffusers
import torch
import transformers
from diffusers.utils import make_image_grid
from torch import nn

import t5slim
from t5slim.distill import velocity_gap
from t5slim.slot import TextSlot

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world import judge
from shapes_world.generation import (
    CALL,
    PIPELINE,
    STUDENT,
    captions,
    generate,
    grid,
    load_pipeline,
)


def main() -> None:
    """Generate, measure, and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="folder of FLUX or SD3")
    parser.add_argument("--student", type=Path, default=STUDENT, help="folder or Hub id")
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="image grid")
    parser.add_argument("--count", type=int, default=40, help="captions of each criterion")
    args = parser.parse_args()

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    pipe = load_pipeline(args.pipeline)
    slot = TextSlot(pipe).name
    scenes, texts = captions(args.count, held_out=True)
    teacher = getattr(pipe, slot)
    images = {"teacher": generate(pipe, texts)}

    pipe = t5slim.patch_pipeline(pipe, args.student, keep_teacher=True)
    student = getattr(pipe, slot)
    images["student"] = generate(pipe, texts)

    pipe = t5slim.unpatch_pipeline(pipe)
    images["no text"] = generate(pipe, [""] * len(texts))
    _, few = captions(min(args.count, 33), held_out=True)
    gap = velocity_gap(pipe, student, few, pipeline_kwargs=CALL)

    encoders = (teacher, student)
    table = {
        "": tuple(images),
        "parameters": tuple(f"{count(m):,}" for m in encoders),
        "MiB in bfloat16": tuple(f"{count(m) * 2 / 2**20:.2f}" for m in encoders),
        "encode 8 prompts, ms": tuple(f"{encode_ms(m):.1f}" for m in encoders),
        "velocity gap": ("0", f"{gap:.3f}", "1"),
    }
    correct = [judge.accuracy(scenes, generated) for generated in images.values()]
    for name in correct[0]:
        table[f"{name} correct"] = tuple(f"{each[name]:.1%}" for each in correct)
    for name, cells in table.items():
        print(f"{name:<22}" + "".join(f"{cell:>12}" for cell in cells))

    grids = []
    for first in range(0, len(texts), args.count):  # two captions of each criterion
        shown = slice(first, first + min(2, args.count))
        columns = {name: generated[shown] for name, generated in images.items()}
        grids.append(grid(texts[shown], columns, cell=112))
    make_image_grid(grids, rows=1, cols=len(grids)).save(args.out)
    print(f"\nThe same captions from the same noise: {args.out}")


def count(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def encode_ms(encoder: Callable[..., object], repeats: int = 20) -> float:
    """Milliseconds for 8 prompts, the least of several runs."""
    ids = torch.ones(8, CALL["max_sequence_length"], dtype=torch.int64, device=encoder.device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        encoder(ids)[0].sum().item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return min(times) * 1000


if __name__ == "__main__":
    main()
