"""The same run in one process and in several, on gloo, and in batches of other sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import assert_same, comparable, distributed
from safetensors.torch import load_file

SPLITS: dict[str, dict[str, Any]] = {
    "eight batches": {"batch_size": 1, "gradient_accumulation_steps": 8},
    "two batches": {"batch_size": 4, "gradient_accumulation_steps": 2},
    "two processes": {"batch_size": 4, "processes": 2},
    "both": {"batch_size": 2, "gradient_accumulation_steps": 2, "processes": 2},
    # As in docs/distributed.md; evaluations are made by both processes then.
    "sharded": {"batch_size": 4, "processes": 2, "sharded": True},
}  # fmt: skip


def result_of(folder: Path, name: str, processes: int = 1, **changes: Any) -> dict[str, Any]:
    folder.mkdir()
    if processes == 1:
        comparable(folder, name, **changes)
    else:
        distributed(folder, name, processes, **changes)
        students = [load_file(folder / f"student-{rank}.safetensors") for rank in (0, 1)]
        assert_same(*students)
    result = json.loads((folder / "result-0.json").read_text())
    result["losses"] = torch.tensor(result["losses"], dtype=torch.float64)
    return result


@pytest.mark.parametrize(
    "name, changes, splits",
    [
        ("flux", {"max_steps": 12}, ["eight batches", "two batches", "both", "sharded"]),
        ("sd3", {"max_steps": 4}, ["eight batches", "two processes"]),
        ("stable_audio", {"max_steps": 6, "reservoir_size": 0}, ["two batches", "two processes"]),
    ],
    ids=["gather", "guidance", "through the pipeline, consecutive"],
)
def test_however_a_batch_is_split_the_same_is_learned(
    name: str, changes: dict[str, Any], splits: list[str], tmp_path: Path
) -> None:
    whole = result_of(tmp_path / "whole", name, batch_size=8, **changes)
    expected = whole["losses"]
    assert len(expected) == changes["max_steps"] / 2 and expected[-1] < expected[0]
    for split in splits:
        other = result_of(tmp_path / split, name, **changes | SPLITS[split])
        # These losses are small: 1e-5 of the largest.
        assert (other["losses"] - expected).abs().max() < 1e-5 * expected.max(), split
        assert other["gap"] == pytest.approx(whole["gap"], rel=1e-4)
        for count in ("teacher_samples", "student_samples"):
            assert other[count] == whole[count]
