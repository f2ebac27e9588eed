"""Faults around a run that must not cost the student, or change what it learns."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from tiny import PROMPTS, call_kwargs, tiny_flux, tiny_student

from t5slim import SlimT5Encoder
from t5slim.distill import DistillConfig, train

QUICK: dict[str, Any] = {
    "batch_size": 4,
    "reservoir_size": 8,
    "warmup_steps": 2,
    "learning_rate": 5e-3,
    "ema_decay": 0.9,
    "objective": "velocity",
    "max_steps": 6,
    "eval_every": 2,
    "trackers": (),
}


def run(pipe: Any, student: Any = None, out: Path | None = None, **settings: Any) -> Any:
    resume = settings.pop("resume", False)
    return train(
        pipe,
        student or tiny_student(pipe),
        PROMPTS[:4],
        DistillConfig(**QUICK | settings),
        pipeline_kwargs=call_kwargs(pipe),
        eval_prompts=PROMPTS[4:],
        output_dir=out,
        resume=resume,
    )


def test_side_jobs_that_fail_dont_cost_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from t5slim.distill import report

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setattr(Accelerator, "log", fail)
    monkeypatch.setattr(report, "image_grid", fail)
    monkeypatch.setattr(ModelCard, "load", fail)
    (tmp_path / "README.md").write_text("mine")
    result = run(tiny_flux(), out=tmp_path, samples_every=2)
    for job in ("trackers", "image grid", "model card", "pip install 't5slim[train]'"):
        assert job in caplog.text
    loaded = SlimT5Encoder.from_pretrained(tmp_path)
    for a, b in zip(loaded.parameters(), result.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_card_is_written_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    run(tiny_flux(), out=tmp_path)
    assert "## Distillation" in (tmp_path / "README.md").read_text()


def test_the_student_that_was_saved_resumes(tmp_path: Path) -> None:
    """As in a notebook: a save notes architecture and dtype in the student's config."""
    pipe = tiny_flux()
    student = tiny_student(pipe)
    run(pipe, student, tmp_path)
    assert run(pipe, student, tmp_path, resume=True).steps == 6


def test_the_environments_accumulation_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = run(tiny_flux()).loss
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    assert run(tiny_flux()).loss == loss


def test_a_large_seed() -> None:
    assert run(tiny_flux(), seed=2**31 - 1).loss > 0


def test_a_first_update_that_is_skipped_warns_of_nothing_and_keeps_the_schedule() -> None:
    pipe = tiny_flux()
    calls: list[int] = []

    def poison(module: Any, args: Any, output: Any) -> Any:
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 1:
                return (output[0] * torch.nan,)
        return output

    pipe.transformer.register_forward_hook(poison)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = run(pipe, eval_every=1)
    assert result.skipped == 1
    rates = [entry["learning_rate"] for entry in result.history]
    assert rates[:3] == [0.0, 0.0, QUICK["learning_rate"] / 2]


def test_facts_say_which_precision_was_used(tmp_path: Path) -> None:
    pipe = tiny_flux().to(torch.bfloat16)
    run(pipe, out=tmp_path, mixed_precision="bf16")
    facts = json.loads((tmp_path / "distillation.json").read_text())["precision"]
    assert facts == {"student": "float32", "denoiser": "bfloat16", "autocast": "bf16"}
