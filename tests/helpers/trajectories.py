"""Trajectories, captured and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny import call_kwargs

from t5slim.distill import Trajectory, capture
from t5slim.distill.pipeline import teacher_of
from t5slim.distill.replay import Samples, predictions, split_trajectory
from t5slim.distill.teacher import TeacherEmbeddings


def captured(
    pipe: Any, prompts: Sequence[str], teacher: TeacherEmbeddings | None = None, **options: Any
) -> tuple[Trajectory, list[Any], TeacherEmbeddings]:
    """A trajectory, its calls, and the teacher's embeddings."""
    teacher = TeacherEmbeddings() if teacher is None else teacher
    if "pipeline_kwargs" not in options:
        options["pipeline_kwargs"] = call_kwargs(pipe)
    trajectory = capture(pipe, prompts, teacher=teacher, **options)
    return trajectory, split_trajectory(trajectory), teacher


@torch.no_grad()
def assert_replays(
    pipe: Any, calls: list[Samples], teacher: TeacherEmbeddings, tolerance: float = 0
) -> None:
    """With the teacher's own embeddings, the denoiser predicts the same, bitwise by default."""
    cpu, targets = torch.device("cpu"), [call.target for call in calls]
    replayed = [*predictions(pipe, calls, lambda i: teacher.get(teacher_of(pipe), i, cpu))]
    torch.testing.assert_close(replayed, targets, rtol=tolerance, atol=tolerance)
