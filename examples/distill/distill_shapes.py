r"""Distil a student for the miniature pipeline, from a fresh start, through its frozen denoiser.

    python examples/distill/distill_shapes.py --out my-student
    python examples/quickstart/quickstart.py --student my-student

    # through SD3's denoiser, under classifier-free guidance; on from FLUX's student
    python examples/distill/distill_shapes.py --pipeline examples/shapes_world/sd3 \
        --start examples/shapes_world/student --velocity-steps 250 --out my-sd3-student

Only prompts are needed: the pipeline itself is the teacher.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from t5slim import SlimT5Encoder
from t5slim.distill import train

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world.generation import CALL, PIPELINE, captions, load_pipeline
from shapes_world.students import fresh_student, settings


def main() -> None:
    """Distil, and say where the student is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="folder of FLUX or SD3")
    parser.add_argument("--start", type=Path, help="a student to go on from, with velocity alone")
    parser.add_argument("--embedding-steps", type=int, default=4400, help="updates of 128")
    parser.add_argument("--velocity-steps", type=int, default=3700, help="updates of 32")
    args = parser.parse_args()

    pipe = load_pipeline(args.pipeline)
    student = fresh_student()
    _, prompts = captions(4000, held_out=False)
    _, eval_prompts = captions(8, held_out=True, seed=1)
    rate = 1e-3
    if args.start:
        rate = 1e-4  # at 1e-3 a finished student first loses what it knows
        student = SlimT5Encoder.from_pretrained(args.start, dtype=torch.float32)
    else:
        # First the teacher's embeddings, which need no denoiser pass: twenty updates for the price
        # of one. Then the denoiser's predictions, which are what counts.
        config = settings(
            objective="embedding",
            max_steps=args.embedding_steps,
            batch_size=128,
            learning_rate=2e-3,
        )
        train(pipe, student, prompts, config, pipeline_kwargs=CALL)
    result = train(
        pipe,
        student,
        prompts,
        settings(objective="velocity", max_steps=args.velocity_steps, learning_rate=rate),
        pipeline_kwargs=CALL,
        eval_prompts=eval_prompts,
        output_dir=args.out,
    )
    print(result)
    command = f"python examples/quickstart/quickstart.py --student {args.out}"
    print(command if args.pipeline == PIPELINE else f"{command} --pipeline {args.pipeline}")


if __name__ == "__main__":
    main()
