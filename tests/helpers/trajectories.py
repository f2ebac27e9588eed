"""Trajectories, captured and replayed."""

from collections.abc import Sequence
from typing import Any

import torch
from tiny import call_kwargs

from t5slim.distill import Trajectory, capture
from t5slim.distill.pipeline import teacher_of
from t5slim.distill.replay import predictions, split_trajectory
from t5slim.distill.teacher import TeacherEmbeddings

CPU = torch.device("cpu")


def captured(
    pipe: Any, prompts: Sequence[str], teacher: TeacherEmbeddings | None = None, **options: Any
) -> tuple[Trajectory, list[Any], TeacherEmbeddings]:
    """A trajectory, its calls, and the teacher's embeddings."""
    teacher = TeacherEmbeddings() if teacher is None else teacher
    options = {"pipeline_kwargs": call_kwargs(pipe)} | options
    trajectory = capture(pipe, prompts, teacher=teacher, **options)
    return trajectory, split_trajectory(trajectory), teacher


def known(prompts: Sequence[int]) -> list[int]:
    """Indices of prompts for the teacher: a text that the pipeline puts zeros for has -1."""
    return [max(prompt, 0) for prompt in prompts]


@torch.no_grad()
def assert_replays(
    pipe: Any, calls: list[Any], teacher: TeacherEmbeddings, tolerance: float = 0
) -> None:
    """With the teacher's own embeddings, the denoiser predicts the same, bitwise by default."""
    targets = [call.target for call in calls]
    replayed = predictions(pipe, calls, lambda i: teacher.get(teacher_of(pipe), known(i), CPU))
    torch.testing.assert_close([*replayed], targets, rtol=tolerance, atol=tolerance)
