"""Distil one student for several pipelines that share their T5, such as FLUX.1 and SD3.

    python examples/joint/joint.py --out my-joint-student

Updates take turns between the pipelines, each with trajectories of its own; the teacher encodes a
prompt once for all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from t5slim import SlimT5Encoder
from t5slim.distill import DistillConfig, Objective, TrajectoryReservoir, train, velocity_gap
from t5slim.distill.pipeline import frozen, teacher_of
from t5slim.distill.teacher import TeacherEmbeddings

sys.path.insert(0, str(Path(__file__).parents[1]))
from series.series import Learner
from shapes_world.generation import CALL, SD3, captions, load_pipeline
from shapes_world.students import fresh_student


def train_joint(
    pipes: Sequence[Any],
    student: SlimT5Encoder,
    prompts: Any,
    config: DistillConfig,
    *,
    pipeline_kwargs: Sequence[Mapping[str, Any]],
) -> list[TrajectoryReservoir]:
    """Train the student in place, in float32 and one batch to an update.

    Args:
        pipes: With one T5 module, and on one device.
        student: Of their vocabulary and output width.
        prompts: As for `train`.
        config: `max_steps` counts the updates of all pipelines together.
        pipeline_kwargs: How each pipeline is called.

    Returns:
        The reservoir of each pipeline, with the counts of its denoiser's samples.

    Raises:
        ValueError: The pipelines have more than one teacher.
    """
    teachers = {id(teacher_of(pipe)): teacher_of(pipe) for pipe in pipes}
    if len(teachers) > 1:
        raise ValueError(
            f"Expected pipelines that share one T5, got {len(teachers)}. Load the others with the "
            "first one's, as in from_pretrained(..., text_encoder_3=flux.text_encoder_2)."
        )
    embeddings = TeacherEmbeddings()
    reservoirs = [
        TrajectoryReservoir(pipe, prompts, config, pipeline_kwargs=kwargs, teacher=embeddings)
        for pipe, kwargs in zip(pipes, pipeline_kwargs, strict=True)
    ]
    learner = Learner(student, config, torch.device(pipes[0]._execution_device))
    with ExitStack() as stack:
        for pipe in pipes:
            stack.enter_context(frozen(pipe, config.gradient_checkpointing))
        objectives = [
            Objective(pipe, reservoir, config)
            for pipe, reservoir in zip(pipes, reservoirs, strict=True)
        ]
        for step in tqdm(range(config.max_steps), "distil"):
            # Turns of so many updates that each pipeline gets its share of those with velocity.
            turn, weights = step // config.velocity_every % len(pipes), config.weights_at(step)
            (batch,) = reservoirs[turn].batches(step, denoiser="velocity" in weights)
            torch.manual_seed((config.seed << 40) + step + 1)
            learner.update(objectives[turn](student, batch, weights))
    learner.finish()
    return reservoirs


def main() -> None:
    """Train one student for the miniature FLUX and SD3, and print its gaps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the student")
    parser.add_argument("--start", type=Path, help="a student to start from, slowly")
    parser.add_argument("--updates", type=int, default=2000, help="of both pipelines together")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--alone", action="store_true", help="also one for each, half as long")
    args = parser.parse_args()
    flux = load_pipeline()
    pipes = {"FLUX": flux, "SD3": load_pipeline(SD3, flux)}
    _, prompts = captions(4000, held_out=False)
    _, held_out = captions(8, held_out=True, seed=1)

    def new_student() -> SlimT5Encoder:
        if args.start is None:
            return fresh_student()
        return SlimT5Encoder.from_pretrained(args.start, dtype=torch.float32)

    def config(max_steps: int) -> DistillConfig:
        slowly = {} if args.start is None else {"objective": "velocity", "learning_rate": 1e-4}
        return DistillConfig(
            max_steps=max_steps, batch_size=args.batch_size, eval_every=10**6, **slowly
        )

    student = new_student()
    kwargs = [CALL] * len(pipes)
    train_joint([*pipes.values()], student, prompts, config(args.updates), pipeline_kwargs=kwargs)
    student.save_pretrained(args.out)
    for name, pipe in pipes.items():
        gaps = {"joint": velocity_gap(pipe, student, held_out, pipeline_kwargs=CALL)}
        if args.alone:
            steps = config(args.updates // len(pipes))
            alone = train(pipe, new_student(), prompts, steps, pipeline_kwargs=CALL).student
            gaps["alone"] = velocity_gap(pipe, alone, held_out, pipeline_kwargs=CALL)
        print(name, *(f"{kind}: {gap:.5f}" for kind, gap in gaps.items()), sep="  ")


if __name__ == "__main__":
    main()
