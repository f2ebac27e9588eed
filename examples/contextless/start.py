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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from t5slim import SlimT5Encoder
from t5slim.distill import DistillConfig, Objective, TrajectoryReservoir, VelocityGap
from t5slim.distill.pipeline import frozen, teacher_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from contextless.contextless import encoded_batches, read_prompts
from series.series import Learner
from shapes_world.generation import CALL, captions, load_pipeline
from shapes_world.students import fresh_student

KWARGS = CALL | {"num_inference_steps": 6}
STARTS = ("random", "table", "table alone")
OBJECTIVES = ("fisher", "embedding")
Run = tuple[int, str, str]  # updates, objective, start


def main() -> None:
    """Train from every start for each number of updates, and print the gaps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, nargs="+", default=[500, 2000, 8000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", nargs="+", default=STARTS, choices=STARTS)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    parser.add_argument("--captions", type=int, default=2000, help="to train on, of each criterion")
    parser.add_argument("--count", type=int, default=33, help="to measure on, of each criterion")
    args = parser.parse_args()
    pipe = load_pipeline()
    prompts = captions(args.captions, held_out=False)[1]
    means = mean_embeddings(pipe, prompts, KWARGS)
    held_out = captions(args.count, held_out=True, seed=2)[1]
    measure = VelocityGap(pipe, held_out, pipeline_kwargs=KWARGS)
    print(f"{len(measure.prompts)} captions\nupdates  seed  objective  start        velocity gap")
    for seed in args.seeds:
        for start in args.starts:
            report = measure.report(started(start, seed, means).to(pipe.device))
            print(f"{0:<7}  {seed:<4}  {'':<9}  {start:<11}  {report}", flush=True)
        runs = {
            (updates, objective, start): started(start, seed, means).to(pipe.device)
            for updates in args.updates
            for objective in args.objectives
            for start in args.starts
        }
        config = DistillConfig(objective=dict.fromkeys(args.objectives, 1.0), seed=seed)
        for (updates, objective, start), student in trained(pipe, runs, prompts, config, KWARGS):
            line = f"{updates:<7}  {seed:<4}  {objective:<9}  {start:<11}"
            print(f"{line}  {measure.report(student)}", flush=True)


def started(start: str, seed: int, means: Tensor) -> SlimT5Encoder:
    """A student of 1/21, before it learns."""
    student = fresh_student(seed)
    if start != "random":
        start_from_means(student, means.cpu())
    if start == "table alone":
        silence_layers(student)
    return student


@torch.no_grad()
def mean_embeddings(pipe: Any, prompts: Any, pipeline_kwargs: Mapping[str, Any]) -> Tensor:
    """(V, D) float32, the mean of the teacher's embeddings of each token in `prompts`; NaN for a
    token that isn't in them."""
    sums = torch.zeros(teacher_of(pipe).config.vocab_size, teacher_of(pipe).config.d_model)
    counts = torch.zeros(len(sums), 1)
    for ids, encoded in encoded_batches(pipe, read_prompts(pipe, prompts, pipeline_kwargs)):
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


def trained(
    pipe: Any,
    runs: Mapping[Run, SlimT5Encoder],
    prompts: Sequence[str],
    config: DistillConfig,
    pipeline_kwargs: Mapping[str, Any],
) -> Iterator[tuple[Run, SlimT5Encoder]]:
    """Train students without velocity, along the same batches, each as `train` would alone.

    Args:
        pipe: The pipeline with the teacher.
        runs: A student for each number of updates, objective and start. Trained in place.
        prompts: As for `train`.
        config: The settings; each run has its own `max_steps`.
        pipeline_kwargs: How to call the pipeline.

    Yields:
        Every run when it is finished, and its student.
    """
    device, steps = torch.device(pipe._execution_device), max(updates for updates, *_ in runs)
    config = replace(config, max_steps=steps)
    learners = {
        run: Learner(student, replace(config, max_steps=run[0]), device)
        for run, student in runs.items()
    }
    reservoir = TrajectoryReservoir(pipe, prompts, config, pipeline_kwargs=pipeline_kwargs)
    with frozen(pipe, config.gradient_checkpointing):
        objective = Objective(pipe, reservoir, config)
        for step in tqdm(range(steps), "distil"):
            (batch,) = reservoir.batches(step, denoiser=False)
            for run, learner in [*learners.items()]:
                updates, term, _ = run
                learner.update(objective(learner.student, batch, {term: 1.0}))
                if step + 1 == updates:
                    learner.finish()
                    yield run, learners.pop(run).student


if __name__ == "__main__":
    main()
