"""A series of students: each becomes what it becomes in a run of its own."""

import pytest
from helpers.training import assert_same, quick
from series.series import train_series
from tiny import PROMPTS, call_kwargs, tiny_flux, tiny_student

from t5slim.distill import DistillConfig, train

WIDTHS = (8, 16, 24)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "velocity"},
        {"embedding_phase": 0.3, "velocity_every": 2},
        {"objective": "embedding", "ema_decay": 0.0, "lr_schedule": "constant"},
        {"objective": DistillConfig().objective, "reservoir_size": 0},
    ],
    ids=["velocity", "sum", "embedding", "without a reservoir"],
)
def test_the_weights_are_those_of_single_runs(changes):
    pipe = tiny_flux()
    kwargs = {"pipeline_kwargs": call_kwargs(pipe)}
    config = quick(**{"max_steps": 12, "batch_size": 2} | changes)
    students = [tiny_student(pipe, d_model=width, dropout_rate=0.1) for width in WIDTHS]
    reservoir = train_series(pipe, students, PROMPTS, config, **kwargs)
    for width, student in zip(WIDTHS, students, strict=True):
        alone = tiny_student(pipe, d_model=width, dropout_rate=0.1)
        result = train(pipe, alone, PROMPTS, config, **kwargs)
        assert_same(dict(alone.named_parameters()), dict(student.named_parameters()))
        assert result.teacher_samples == reservoir.teacher_samples  # once for all students
        assert result.student_samples == reservoir.student_samples  # of each
