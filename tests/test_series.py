"""Several students at one teacher's walks; sums of objectives; precision; what is skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROMPTS, call_kwargs, tiny_flux, tiny_student

from t5slim import SlimT5Encoder
from t5slim.distill import DistillConfig, RelationalLoss, train
from t5slim.errors import DistillError

CONFIG: dict[str, Any] = {
    "max_steps": 12, "batch_size": 4, "reservoir_walks": 8, "warmup_steps": 2, "ema_decay": 0.9,
    "learning_rate": 5e-3, "eval_every": 6, "objective": "velocity",
}  # fmt: skip


def config(**changes: Any) -> DistillConfig:
    return DistillConfig(**CONFIG | changes)


# --- series --------------------------------------------------------------------------------------


def test_a_series_comes_to_what_its_runs_come_to(tmp_path: Path) -> None:
    pipe = tiny_flux()
    widths = (8, 16, 24)
    arguments: Any = {"pipeline_kwargs": call_kwargs(pipe), "eval_prompts": PROMPTS[4:]}
    single = [
        train(pipe, tiny_student(pipe, d_model=w), PROMPTS[:4], config(), **arguments)
        for w in widths
    ]
    calls: list[int] = []
    handle = pipe.transformer.register_forward_hook(
        lambda *_: calls.append(1) if not torch.is_grad_enabled() else None
    )
    students = [tiny_student(pipe, d_model=w) for w in widths]
    series = train(pipe, students, PROMPTS[:4], config(), output_dir=tmp_path, **arguments)
    handle.remove()
    for one, of_series, student in zip(single, series, students, strict=True):
        assert of_series.student is student
        assert of_series.gap == pytest.approx(one.gap, rel=1e-6)
        for (name, tensor), other in zip(
            one.student.named_parameters(), student.parameters(), strict=True
        ):
            assert torch.equal(tensor, other), name
        assert of_series.teacher_rows == one.teacher_rows  # once for all
    for i, result in enumerate(series):
        loaded = SlimT5Encoder.from_pretrained(tmp_path / f"student-{i}")
        assert torch.equal(
            loaded.final_projection[0].weight, students[i].final_projection[0].weight
        )
        lines = (tmp_path / f"student-{i}" / "history.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == result.history


def test_a_series_goes_on(tmp_path: Path) -> None:
    pipe = tiny_flux()
    arguments: Any = {"pipeline_kwargs": call_kwargs(pipe), "resume": True}

    def students() -> list[SlimT5Encoder]:
        return [tiny_student(pipe, d_model=w) for w in (8, 16)]

    whole = train(pipe, students(), PROMPTS, config(), output_dir=tmp_path / "a", **arguments)
    with pytest.raises(ZeroDivisionError):
        seen = iter(range(10**6))

        def fail(*_: Any) -> None:
            if next(seen) == 40:
                raise ZeroDivisionError

        handle = pipe.transformer.register_forward_hook(fail)
        try:
            train(
                pipe, students(), PROMPTS, config(checkpoint_every=2), output_dir=tmp_path / "b",
                **arguments,
            )  # fmt: skip
        finally:
            handle.remove()
    assert list((tmp_path / "b" / "checkpoints").iterdir())
    later = train(pipe, students(), PROMPTS, config(), output_dir=tmp_path / "b", **arguments)
    for one, other in zip(whole, later, strict=True):
        pairs = zip(one.student.parameters(), other.student.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_an_empty_series_is_refused() -> None:
    pipe = tiny_flux()
    with pytest.raises(DistillError, match="list of them is empty"):
        train(pipe, [], PROMPTS, config(), pipeline_kwargs=call_kwargs(pipe))


# --- objectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        "relational",
        {"velocity": 1.0, "embedding": 0.1},
        {"velocity": 1.0, "relational": {"weight": 0.5, "until": 6}},
    ],
    ids=["relational", "sum", "fading"],
)
@pytest.mark.parametrize("name", ["pixart_sigma", "stable_audio"])
def test_every_objective_learns(name: str, objective: Any) -> None:
    from tiny import TINY_PIPELINES

    pipe = TINY_PIPELINES[name]()
    student = tiny_student(pipe, dropout_rate=0.0)
    kwargs = call_kwargs(pipe, steps=2)
    result = train(
        pipe, student, PROMPTS[:4], config(objective=objective, max_steps=60, eval_every=15),
        pipeline_kwargs=kwargs,
    )  # fmt: skip
    losses = [entry["loss"] for entry in result.history]
    assert losses[-1] < 0.7 * losses[0]
    assert (result.teacher_rows == 0) == (objective == "relational")


def test_a_warm_up_asks_the_denoiser_nothing_until_it_starts() -> None:
    pipe = tiny_flux()
    objective = {"embedding": {"until": 6}, "velocity": {"start": 6}}
    result = train(
        pipe, tiny_student(pipe), PROMPTS, config(objective=objective, eval_every=3),
        pipeline_kwargs=call_kwargs(pipe),
    )  # fmt: skip
    rows = [entry["student_rows"] for entry in result.history]
    assert rows == [0, 0, 12, 24]


def test_trajectory_weights_choose_thirds() -> None:
    """With three steps and the weight on the first, only the first call's errors count."""
    pipe = tiny_flux()
    arguments: Any = {"pipeline_kwargs": call_kwargs(pipe)}
    paper = {"reservoir_walks": 0, "eval_every": 1, "max_steps": 3}
    plain = train(pipe, tiny_student(pipe), PROMPTS, config(**paper), **arguments)
    first = train(
        pipe,
        tiny_student(pipe),
        PROMPTS,
        config(**paper, trajectory_weights=(1, 0, 0)),
        **arguments,
    )
    losses = [entry["loss"] for entry in first.history]
    assert losses[0] == pytest.approx(3 * plain.history[0]["loss"]) and losses[1:] == [0, 0]


def test_relational_loss_is_zero_for_the_same_and_one_for_a_collapse() -> None:
    torch.manual_seed(0)
    target = torch.randn(6, 5, 8)
    mask = torch.ones(6, 5)
    mask[:, 3:] = 0
    loss = RelationalLoss()
    assert loss(target, target).shape == (6,) and loss(target, target).max() < 1e-10
    moved = target + torch.randn(5, 8)  # distances don't see what all share
    torch.testing.assert_close(loss(moved, target), torch.zeros(6), atol=1e-6, rtol=0)
    collapsed = torch.zeros_like(target).requires_grad_()
    assert loss(collapsed, target).mean().item() == pytest.approx(1.0, rel=0.1)
    loss(collapsed, target).sum().backward()
    assert collapsed.grad is not None and collapsed.grad.isfinite().all()
    elsewhere = torch.where(mask[..., None] > 0, target, torch.randn_like(target))
    torch.testing.assert_close(loss(elsewhere, target, mask), torch.zeros(6), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="at least two"):
        loss(target[:1], target[:1])


# --- precision, and what is skipped --------------------------------------------------------------


def test_float16_scales_the_loss() -> None:
    """The gradients through a denoiser in float16 would vanish without."""
    pipe = tiny_flux()
    pipe.transformer.half()
    student = tiny_student(pipe)
    before = [p.clone() for p in student.parameters()]
    result = train(
        pipe, student, PROMPTS, config(mixed_precision="fp16", weight_decay=0.0),
        pipeline_kwargs=call_kwargs(pipe),
    )  # fmt: skip
    assert result.skipped < 3 and result.loss > 0
    assert all((p != b).any() for p, b in zip(student.parameters(), before, strict=True))
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    pipe = tiny_flux()
    student = tiny_student(pipe)
    calls: list[int] = []

    def poison(module: Any, args: Any, output: Any) -> Any:
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) in (3, 4, 7):
                return (output[0] * torch.nan,)
        return output

    handle = pipe.transformer.register_forward_hook(poison)
    result = train(
        pipe, student, PROMPTS, config(max_skipped_updates=3), pipeline_kwargs=call_kwargs(pipe),
        output_dir=tmp_path,
    )  # fmt: skip
    handle.remove()
    assert result.skipped == 3 and result.steps == 12
    assert [entry["skipped_updates"] for entry in result.history] == [2, 3]
    assert all(entry["loss"] > 0 for entry in result.history)  # a mean of those that are finite
    assert all(p.isfinite().all() for p in student.parameters())


def test_learning_rates_of_the_schedules() -> None:
    rates = {
        name: [
            DistillConfig(max_steps=100, warmup_steps=9, learning_rate=1.0, lr_schedule=name)
            .learning_rate_at(step, 0.0)
            for step in (0, 50, 99)
        ]
        for name in ("constant", "linear", "cosine")
    }  # fmt: skip
    assert rates["constant"] == [0.1, 1.0, 1.0]
    assert rates["linear"] == pytest.approx([0.1, 0.5, 0.01])
    assert rates["cosine"] == pytest.approx([0.1, 0.5, 0.00025], rel=0.02)


def test_8_bit_adam_says_what_it_needs() -> None:
    pytest.importorskip("t5slim")
    try:
        import bitsandbytes  # noqa: F401  # type: ignore[import-not-found]
    except ImportError:
        pipe = tiny_flux()
        with pytest.raises(DistillError, match="pip install bitsandbytes"):
            train(
                pipe, tiny_student(pipe), PROMPTS, config(optimizer="adamw_8bit"),
                pipeline_kwargs=call_kwargs(pipe),
            )  # fmt: skip
