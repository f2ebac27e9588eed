"""A run of 20 updates in as many processes as it is launched in; writes what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_student

from t5slim.distill import DistillConfig, train


def run(folder: Path, name: str, **changes: Any) -> None:
    """Train a student without dropout, whose draws would be those of its process."""
    torch.set_num_threads(1)
    pipe = TINY_PIPELINES[name]()
    student = tiny_student(pipe, dropout_rate=0.0)
    settings = {
        "max_steps": 20, "eval_every": 1, "reservoir_walks": 16, "learning_rate": 5e-3,
        "warmup_steps": 2, "ema_decay": 0.9, "checkpoint_every": 7, "objective": "velocity",
    }  # fmt: skip
    result = train(
        pipe, student, PROMPTS, DistillConfig(**settings | changes),
        pipeline_kwargs=call_kwargs(pipe), eval_prompts=PROMPTS[:2], output_dir=folder / "run",
    )  # fmt: skip
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    save_file(dict(student.named_parameters()), folder / f"student-{rank}.safetensors")
    entry = {"history": result.history, "teacher_rows": result.teacher_rows}
    (folder / f"result-{rank}.json").write_text(json.dumps(entry))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], **json.loads(sys.argv[3]))
