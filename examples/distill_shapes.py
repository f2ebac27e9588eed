r"""Distil a student for the miniature pipeline, from a fresh start, through its frozen denoiser.

    python examples/distill_shapes.py --out my-student
    python examples/quickstart.py --student my-student

    # through SD3's denoiser, under classifier-free guidance; on from FLUX's student
    python examples/distill_shapes.py --pipeline examples/shapes_world/sd3 \
        --start examples/shapes_world/student --out my-sd3-student

    # one student for both
    python examples/distill_shapes.py --pipeline examples/shapes_world/pipeline \
        examples/shapes_world/sd3 --out my-joint-student

Only prompts are needed: the pipeline itself is the teacher.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from shapes_world.painting import BF16, CALL, PIPELINE, captions, load_pipeline

import t5slim
from t5slim.distill import DistillConfig, train


def fresh_student(seed: int = 0, **shape: int) -> t5slim.SlimT5Encoder:
    """262,000 parameters, 1/21 of the teacher's encoder, if `shape` doesn't say otherwise; about a
    third of them are embeddings."""
    torch.manual_seed(seed)
    sizes = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2} | shape
    return t5slim.SlimT5Encoder(
        t5slim.SlimT5Config(
            vocab_size=1536,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,  # too small to learn so many prompts by heart
            project_out_dim=256,
            **sizes,
        )
    )


def main() -> None:
    """Distil, and say where the student is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--pipeline", type=Path, nargs="+", default=[PIPELINE], help="folders, of FLUX, SD3 or both"
    )
    parser.add_argument("--start", type=Path, help="a student to go on from")
    parser.add_argument("--minutes", type=float, default=17, help="of training")
    parser.add_argument("--warm-up", type=float, default=0.2, help="share of them for embeddings")
    args = parser.parse_args()

    flux = load_pipeline()
    pipes = [
        flux if path.resolve() == PIPELINE.resolve() else load_pipeline(path, flux)
        for path in args.pipeline
    ]
    student = fresh_student()
    _, prompts = captions(4000, held_out=False)
    _, eval_prompts = captions(8, held_out=True, seed=1)
    # First the teacher's rows, which ask the denoiser nothing: twenty updates for the price of one.
    # Then what the denoiser makes of them, which is what counts.
    seconds, rate = args.minutes * 60, 1e-3
    if args.start:
        rate = 1e-4  # at 1e-3 a finished student first loses what it knows
        student = t5slim.SlimT5Encoder.from_pretrained(args.start, dtype=torch.float32)
    else:
        first = settings(
            objective="embedding",
            batch_size=128,
            learning_rate=2e-3,
            max_seconds=args.warm_up * seconds,
        )
        train(pipes, student, prompts, first, pipeline_kwargs=CALL)
        seconds *= 1 - args.warm_up
    result = train(
        pipes,
        student,
        prompts,
        settings(objective="velocity", learning_rate=rate, max_seconds=seconds),
        pipeline_kwargs=CALL,
        eval_prompts=eval_prompts,
        output_dir=args.out,
    )
    gaps = ", ".join(f"{report.gap:.4f}" for report in result.reports)
    print(f"velocity gap {gaps} after {result.steps} updates, {result.seconds:.0f} s")
    print(f"The student is in {args.out}:")
    for path in args.pipeline:
        print(f"python examples/quickstart.py --pipeline {path} --student {args.out}")


def passes(entry: dict[str, Any]) -> int:
    """Of rows through the denoiser, at an entry of a run's history: a student's go there and back,
    and the way back costs about as much."""
    return int(entry["teacher_rows"] + 2 * entry["student_rows"])


def settings(**changes: object) -> DistillConfig:
    """What suits this world: a student that is small, and so learns fast."""
    return DistillConfig(
        **{
            "max_steps": 100_000,
            "learning_rate": 1e-3,
            "mixed_precision": "bf16" if BF16 else "no",
            **changes,
        }
    )


if __name__ == "__main__":
    main()
