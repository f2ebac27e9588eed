"""The table without context as the start of a student, against a random start.

    python examples/contextless/start.py

Students of three starts learn from the same batches, once with the denoiser's Fisher information
and once by naive embedding matching:

- random: T5's own initialization.
- table: each token's mean teacher embedding in the embedding table, reduced to the student's width,
  and a projection that undoes the reduction; all else as in "random".
- table alone: the same, and the layers in between add nothing before they have learned something.
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
from torch import Tensor
from tqdm.auto import tqdm

from t5slim import SlimT5Encoder
from t5slim.distill import DistillConfig, Objective, TrajectoryReservoir, VelocityGap
from t5slim.distill.pipeline import frozen, teacher_of
from t5slim.distill.teacher import TeacherEmbeddings

sys.path.insert(0, str(Path(__file__).parents[1]))
from series.series import Learner
from shapes_world.generation import CALL, captions, load_pipeline
from shapes_world.students import fresh_student

from contextless.contextless import encoded_batches, read_prompts

KWARGS = CALL | {"num_inference_steps": 4}
STARTS = ("random", "table", "table alone")
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
    read = read_prompts(pipe, prompts, KWARGS)
    means = mean_embeddings(pipe, read)
    held_out = captions(args.count, held_out=True, seed=2)[1]
    measure = VelocityGap(pipe, held_out, pipeline_kwargs=KWARGS)

    def show(run: Run, student: SlimT5Encoder) -> None:
        line = f"{run.updates:>5} updates  seed {run.seed}  {run.objective:<9}  {run.start:<11}"
        print(f"{line}  {measure.report(student.to(pipe.device))}", flush=True)

    print(f"velocity gaps on {len(measure.prompts)} captions")
    for start in args.starts:
        untrained = Run(0, args.seeds[0], "", start)
        show(untrained, started(untrained, means))
    config = DistillConfig(objective=dict.fromkeys(args.objectives, 1.0))
    common: Any = {"pipeline_kwargs": KWARGS, "teacher": read}
    with frozen(pipe, config.gradient_checkpointing):
        # Measured once: the Fisher information is the denoiser's, whatever the student.
        objective = Objective(pipe, TrajectoryReservoir(pipe, prompts, config, **common), config)
        for updates in args.updates:
            combinations = product([updates], args.seeds, args.objectives, args.starts)
            runs = {run: started(run, means) for run in map(Run._make, combinations)}
            train_together(pipe, objective, runs, prompts, config, **common)
            for run, student in runs.items():
                show(run, student)


def started(run: Run, means: Tensor) -> SlimT5Encoder:
    """A student of 1/21, before it learns."""
    student = fresh_student(run.seed)
    if run.start != "random":
        start_from_means(student, means)
    if run.start == "table alone":
        silence_layers(student)
    return student


@torch.no_grad()
def mean_embeddings(pipe: Any, read: TeacherEmbeddings) -> Tensor:
    """(V, D) float32 on the CPU, the mean of the teacher's embeddings of each token in the prompts
    that were read; NaN for a token that isn't in them."""
    config = teacher_of(pipe).config
    sums, counts = torch.zeros(config.vocab_size, config.d_model), torch.zeros(config.vocab_size, 1)
    for ids, encoded in encoded_batches(pipe, read):
        sums.index_add_(0, ids.flatten().cpu(), encoded.flatten(0, 1).cpu().float())
        counts.index_add_(0, ids.flatten().cpu(), torch.ones(ids.numel(), 1))
    return sums / counts


@torch.no_grad()
def start_from_means(student: SlimT5Encoder, means: Tensor) -> None:
    """Let a student's embedding table and projection say the mean embedding of each token.

    The means are reduced by a singular value decomposition to their d - 1 first components, with d
    the student's width. Two functions stand between table and output, and both are undone exactly:

    - T5's last norm divides an embedding by its length. The d-th channel makes all of them equally
      long, so that it divides by a constant, which is 1 here.
    - ReLU lets positive numbers through. The projection's first layer gives it x and -x, and its
      second takes their difference: ReLU(x) - ReLU(-x) = x. So 2 d of its D channels are needed;
      the second layer doesn't read the others yet.

    A token without a mean gets the mean of all.

    Args:
        student: Changed in place.
        means: (V, D), from `mean_embeddings`.

    Raises:
        ValueError: D is below 2 d.
    """
    width, out_width = student.config.d_model, student.config.project_out_dim
    if out_width < 2 * width:
        raise ValueError(
            f"The projection has {out_width} channels between its layers; to undo ReLU it needs "
            f"twice the student's width, {2 * width}: take a narrower student."
        )
    known = means[~means.isnan().any(1)]
    means = torch.where(means.isnan(), known.mean(0), means)
    components = torch.linalg.svd(known, full_matrices=False).Vh[: width - 1]
    table = torch.zeros(len(means), width)
    table[:, : len(components)] = means @ components.T
    squares = table.square().sum(1)
    table[:, -1] = (squares.max() - squares).sqrt()
    scale = (squares.max() / width).sqrt()  # a root mean square of 1, as T5's own table has
    student.get_input_embeddings().weight[: len(means)] = table / scale
    first, second = student.final_projection[0].weight, student.final_projection[3].weight
    first[: 2 * width] = torch.cat([torch.eye(width), -torch.eye(width)])
    second.zero_()
    second[:, : len(components)] = scale * components.T
    second[:, width : width + len(components)] = -scale * components.T


@torch.no_grad()
def silence_layers(student: SlimT5Encoder) -> None:
    """Let attention and feed-forward layers add nothing, by zeros in their last matrices."""
    for block in student.encoder.encoder.block:
        block.layer[0].SelfAttention.o.weight.zero_()
        block.layer[1].DenseReluDense.wo.weight.zero_()


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
