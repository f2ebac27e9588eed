"""The same run in one process and in several, on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_run
import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


def launch(processes: int, folder: Path, name: str, changes: dict[str, Any]) -> None:
    folder.mkdir()
    # Not `accelerate launch`, which starts several processes on CPUs by MPI only.
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
        str(processes), str(HERE / "distributed_run.py"), str(folder), name, json.dumps(changes),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def losses(folder: Path, rank: int = 0) -> torch.Tensor:
    history = json.loads((folder / f"result-{rank}.json").read_text())["history"]
    assert len(history) == 20
    return torch.tensor([entry["loss"] for entry in history], dtype=torch.float64)


@pytest.mark.parametrize("name", ["flux", "stable_audio"], ids=["gather", "fallback"])
def test_one_process_two_processes_and_accumulation_learn_alike(name: str, tmp_path: Path) -> None:
    whole, pieces, two = (tmp_path / n for n in ("whole", "pieces", "two"))
    whole.mkdir()
    distributed_run.run(whole, name, batch_size=8)
    pieces.mkdir()
    distributed_run.run(pieces, name, batch_size=1, gradient_accumulation_steps=8)
    launch(2, two, name, {"batch_size": 4})
    scale = losses(whole).max()  # these losses are small: 1e-5 of the largest
    for other in (pieces, two):
        assert (losses(other) - losses(whole)).abs().max() < 1e-5 * scale
    assert losses(whole)[-5:].mean() < 0.8 * losses(whole)[:5].mean()  # of a run that learns
    students = [load_file(two / f"student-{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(students[0][k], students[1][k]) for k in students[0])
    rows = [json.loads((f / "result-0.json").read_text())["teacher_rows"] for f in (whole, two)]
    assert rows[0] == rows[1]
