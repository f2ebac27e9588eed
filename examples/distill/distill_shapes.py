r"""Distil a new student for the miniature pipeline, through its frozen denoiser.

    python examples/distill/distill_shapes.py --out my-student
    python examples/quickstart/quickstart.py --student my-student

    # through SD3's denoiser, under classifier-free guidance; on from FLUX's student
    python examples/distill/distill_shapes.py --pipeline examples/shapes_world/sd3 \
        --start examples/shapes_world/student --updates 250 --out my-sd3-student

Only prompts are needed: the pipeline itself is the teacher.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from t5slim import SlimT5Encoder
from t5slim.distill import DistillConfig, train

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world.generation import CALL, PIPELINE, captions, load_pipeline
from shapes_world.students import settings, student_config


def main() -> None:
    """Distil, and say where the student is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="folder of FLUX or SD3")
    parser.add_argument("--start", type=Path, help="a student to go on from, with velocity alone")
    parser.add_argument("--updates", type=int, default=DistillConfig().max_steps)
    args = parser.parse_args()

    pipe = load_pipeline(args.pipeline)
    if args.start:
        # Slowly: at its first rate a finished student would lose what it knows.
        student: Any = SlimT5Encoder.from_pretrained(args.start, dtype=torch.float32)
        config = settings(objective="velocity", learning_rate=1e-4, max_steps=args.updates)
    else:
        student, config = student_config(), settings(max_steps=args.updates)
    result = train(
        pipe,
        student,
        captions(4000, held_out=False)[1],
        config,
        # Short trajectories: more prompts for as many passes of the denoiser.
        pipeline_kwargs=CALL | {"num_inference_steps": 6},
        eval_prompts=captions(8, held_out=True, seed=1)[1],
        output_dir=args.out,
    )
    print(result)
    command = f"python examples/quickstart/quickstart.py --student {args.out}"
    print(command if args.pipeline == PIPELINE else f"{command} --pipeline {args.pipeline}")


if __name__ == "__main__":
    main()
