"""Distil several students along the same trajectories of one teacher.

    python examples/series/series.py --out my-series

The denoiser's passes for the teacher are made once and not once for each student, and every student
becomes what `t5slim.distill.train` makes of it alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from t5slim import SlimT5Encoder
from t5slim.distill import DistillConfig, Objective, TrajectoryReservoir, VelocityGap, train
from t5slim.distill.pipeline import frozen

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world.generation import CALL, captions, load_pipeline
from shapes_world.students import fresh_student

SIZES = {
    "1/8": {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 192, "num_layers": 3},
    "1/21": {},
    "1/50": {"d_model": 20, "d_kv": 10, "num_heads": 2, "d_ff": 40, "num_layers": 2},
}


class Learner:
    """A student with an optimizer, a schedule and an EMA of its own, as `train` makes them."""

    def __init__(self, student: SlimT5Encoder, config: DistillConfig, device: torch.device) -> None:
        self.student = student.to(device, torch.float32).train()
        self._parameters = list(student.parameters())
        self._max_grad_norm = config.max_grad_norm
        self._optimizer = config.adamw(self._parameters, student.config.d_model)
        schedule = config.lr_schedule
        self._scheduler = get_scheduler(
            "constant_with_warmup" if schedule == "constant" else schedule,
            self._optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
        )
        self._ema = EMAModel(self._parameters, decay=config.ema_decay) if config.ema_decay else None

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        if self._ema:
            self._ema.step(self._parameters)

    def finish(self) -> None:
        """Give the student its EMA weights."""
        if self._ema:
            self._ema.copy_to(self._parameters)
        self.student.eval()


def train_series(
    pipe: Any,
    students: Sequence[SlimT5Encoder],
    prompts: Any,
    config: DistillConfig,
    *,
    pipeline_kwargs: Mapping[str, Any],
) -> TrajectoryReservoir:
    """Train the students in place, in float32 and one batch to an update.

    Returns:
        The reservoir that they shared, with the counts of the denoiser's samples.
    """
    device = torch.device(pipe._execution_device)
    learners = [Learner(student, config, device) for student in students]
    reservoir = TrajectoryReservoir(pipe, prompts, config, pipeline_kwargs=pipeline_kwargs)
    with frozen(pipe, config.gradient_checkpointing):
        objective = Objective(pipe, reservoir, config)
        for step in tqdm(range(config.max_steps), "distil"):
            weights = config.weights_at(step)
            (batch,) = reservoir.batches(step, denoiser="velocity" in weights)
            for learner in learners:
                # Every student drops out as it would in a run of its own.
                torch.manual_seed((config.seed << 40) + step + 1)
                learner.update(objective(learner.student, batch, weights))
    for learner in learners:
        learner.finish()
    return reservoir


def main() -> None:
    """Train a series in the miniature world, and print the gaps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the students")
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--alone", action="store_true", help="also train each in a run of its own")
    args = parser.parse_args()
    pipe = load_pipeline()
    _, prompts = captions(4000, held_out=False)
    config = DistillConfig(max_steps=args.updates, batch_size=args.batch_size, eval_every=10**6)
    measure = VelocityGap(pipe, captions(8, held_out=True, seed=1)[1], pipeline_kwargs=CALL)
    students = {size: fresh_student(**shape) for size, shape in SIZES.items()}
    reservoir = train_series(pipe, [*students.values()], prompts, config, pipeline_kwargs=CALL)
    print(f"{reservoir.teacher_samples:,} samples of the denoiser for the teacher")
    for size, student in students.items():
        student.save_pretrained(args.out / size.replace("/", "-"))
        gaps = {"series": measure(student)}
        if args.alone:
            single = train(
                pipe, fresh_student(**SIZES[size]), prompts, config, pipeline_kwargs=CALL
            )
            gaps["alone"] = measure(single.student)
        print(size, *(f"{name}: {gap:.5f}" for name, gap in gaps.items()), sep="  ")


if __name__ == "__main__":
    main()
