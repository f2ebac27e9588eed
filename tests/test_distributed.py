"""The same run in one process and in several, on gloo, and in batches of other sizes."""

from typing import Any

import pytest
from helpers.training import assert_same, comparable, distributed, losses

from t5slim.distill import DistillResult

SPLITS: dict[str, dict[str, Any]] = {
    "eight batches": {"batch_size": 1, "gradient_accumulation_steps": 8},
    "two batches": {"batch_size": 4, "gradient_accumulation_steps": 2},
    "two processes": {"batch_size": 4, "processes": 2},
    "both": {"batch_size": 2, "gradient_accumulation_steps": 2, "processes": 2},
    # As in docs/distributed.md; evaluations are made by both processes then.
    "sharded": {"batch_size": 4, "processes": 2, "sharded": True},
}


def result_of(name: str, processes: int = 1, **changes: Any) -> DistillResult:
    if processes == 1:
        return comparable(name, changes)
    one, other = distributed(name, processes, changes)
    assert_same(one.student.state_dict(), other.student.state_dict())
    return one


@pytest.mark.parametrize(
    "name, changes, splits",
    [
        ("flux", {"max_steps": 12}, ["eight batches", "two batches", "both", "sharded"]),
        ("sd3", {"max_steps": 4, "fresh": True}, ["eight batches", "two processes"]),
        ("pixart_sigma", {"max_steps": 4, "fresh": True}, ["eight batches", "two processes"]),
        ("stable_audio", {"max_steps": 6, "reservoir_size": 0}, ["two batches", "two processes"]),
    ],
    ids=["gather", "guidance", "mask", "through the pipeline, consecutive"],
)
def test_splits_teach_the_same(name: str, changes: dict[str, Any], splits: list[str]) -> None:
    whole = result_of(name, batch_size=8, **changes)
    expected = losses(whole)
    assert len(expected) == changes["max_steps"] / 2 and expected[-1] < expected[0]
    for split in splits:
        other = result_of(name, **changes | SPLITS[split])
        # These losses are small: 1e-5 of the largest, 3e-5 where a new student's start rounds, too.
        close = (3e-5 if "fresh" in changes else 1e-5) * max(expected)
        assert losses(other) == pytest.approx(expected, rel=0, abs=close), split
        assert other.gap == pytest.approx(whole.gap, rel=1e-4)
        for count in ("teacher_samples", "student_samples"):
            assert getattr(other, count) == getattr(whole, count)
