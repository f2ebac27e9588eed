"""A student that starts from the teacher's mean embeddings, against a random start.

    python examples/contextless/start.py

Students of both starts learn from the same batches, once with the denoiser's Fisher information and
once by naive embedding matching:

- random: T5's own initialization.
- teacher: `Objective.initialize`, as `t5slim.distill.train` begins with a new student. The student
  says each token's mean teacher embedding, and its layers add nothing yet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from t5slim import SlimT5Encoder
from t5slim.distill import DistillConfig, Objective, TrajectoryReservoir, VelocityGap
from t5slim.distill.pipeline import frozen

sys.path.insert(0, str(Path(__file__).parents[1]))
from series.series import Learner
from shapes_world.generation import CALL, captions, load_pipeline
from shapes_world.students import fresh_student

from contextless.contextless import read_prompts

KWARGS = CALL | {"num_inference_steps": 4}
STARTS = ("random", "teacher")
OBJECTIVES = ("fisher", "embedding")


class Run(NamedTuple):
    """A student's training: how long, from which seed and start, and what it learns."""

    updates: int
    seed: int
    objective: str
    start: str


def main() -> None:
    """Train from every start for each number of updates, and print the gaps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, nargs="+", default=[500, 2000, 8000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    parser.add_argument("--starts", nargs="+", default=STARTS, choices=STARTS)
    parser.add_argument("--captions", type=int, default=2000, help="to train on, of each criterion")
    parser.add_argument("--count", type=int, default=33, help="to measure on, of each criterion")
    args = parser.parse_args()
    pipe = load_pipeline()
    prompts = captions(args.captions, held_out=False)[1]
    held_out = captions(args.count, held_out=True, seed=2)[1]
    measure = VelocityGap(pipe, held_out, pipeline_kwargs=KWARGS)

    def show(run: Run, student: SlimT5Encoder) -> None:
        line = f"{run.updates:>5} updates  seed {run.seed}  {run.objective:<9}  {run.start:<11}"
        print(f"{line}  {measure.report(student.to(pipe.device))}", flush=True)

    print(f"velocity gaps on {len(measure.prompts)} captions")
    config = DistillConfig(objective=dict.fromkeys(args.objectives, 1.0))
    common: Any = {"pipeline_kwargs": KWARGS, "teacher": read_prompts(pipe, prompts, KWARGS)}

    def started(run: Run) -> SlimT5Encoder:
        """A student of 1/21, before it learns."""
        student = fresh_student(run.seed).to(pipe.device)
        if run.start == "teacher":
            new = TrajectoryReservoir(pipe, prompts, replace(config, seed=run.seed), **common)
            objective.initialize(student, new)
        return student

    with frozen(pipe, config.gradient_checkpointing):
        # Measured once: the Fisher information is the denoiser's, whatever the student.
        objective = Objective(pipe, TrajectoryReservoir(pipe, prompts, config, **common), config)
        for start in args.starts:
            untrained = Run(0, args.seeds[0], "", start)
            show(untrained, started(untrained))
        for updates in args.updates:
            combinations = product([updates], args.seeds, args.objectives, args.starts)
            runs = {run: started(run) for run in map(Run._make, combinations)}
            train_together(pipe, objective, runs, prompts, config, **common)
            for run, student in runs.items():
                show(run, student)


def train_together(
    pipe: Any,
    objective: Objective,
    runs: Mapping[Run, SlimT5Encoder],
    prompts: Sequence[str],
    config: DistillConfig,
    **common: Any,
) -> None:
    """Train the students of runs of one length, in place and without velocity: those of a seed
    along the same batches, each as `train` would teach it alone."""
    device, (steps,) = torch.device(pipe._execution_device), {run.updates for run in runs}
    config = replace(config, max_steps=steps)
    learners = {run: Learner(student, config, device) for run, student in runs.items()}
    reservoirs = {
        seed: TrajectoryReservoir(pipe, prompts, replace(config, seed=seed), **common)
        for seed in {run.seed for run in runs}
    }
    for step in tqdm(range(steps), "distil"):
        for seed, reservoir in reservoirs.items():
            (batch,) = reservoir.batches(step, denoiser=False)
            for run, learner in learners.items():
                if run.seed == seed:
                    learner.update(objective(learner.student, batch, {run.objective: 1.0}))
    for learner in learners.values():
        learner.finish()


if __name__ == "__main__":
    main()
