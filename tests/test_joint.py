"""One student for several pipelines: updates take turns, and each pipeline is measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROMPTS, call_kwargs, tiny_flux, tiny_sd3, tiny_student

from t5slim import SlimT5Encoder
from t5slim.distill import DistillConfig, train, velocity_gap
from t5slim.errors import DistillError


def config(**changes: Any) -> DistillConfig:
    settings: dict[str, Any] = {
        "max_steps": 8, "batch_size": 2, "reservoir_walks": 4, "warmup_steps": 2, "ema_decay": 0.9,
        "learning_rate": 5e-3, "eval_every": 4, "empty_prompt_share": 0.0,
    }  # fmt: skip
    return DistillConfig(**settings | changes)


def two_pipelines() -> tuple[list[Any], dict[str, Any]]:
    """FLUX and SD3 with one teacher, as T5-XXL is in both."""
    flux, sd3 = tiny_flux(), tiny_sd3()
    sd3.register_modules(text_encoder_3=flux.text_encoder_2)
    return [flux, sd3], {"pipeline_kwargs": [call_kwargs(flux, 2), call_kwargs(sd3, 2)]}


def assert_same(student: SlimT5Encoder, other: SlimT5Encoder) -> None:
    for (name, a), b in zip(student.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_student_learns_from_two_pipelines(tmp_path: Path) -> None:
    pipes, arguments = two_pipelines()
    flux, sd3 = pipes
    asked = {"flux": 0, "sd3": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            asked[name] += torch.is_grad_enabled()

        return hook

    student = tiny_student(flux)
    hooks = [
        module.register_forward_pre_hook(count(name))
        for name, module in (("flux", flux.transformer), ("sd3", sd3.transformer))
    ]
    result = train(
        pipes, student, PROMPTS[:4], config(objective="velocity"), eval_prompts=PROMPTS[4:],
        output_dir=tmp_path, **arguments,
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    assert asked["flux"] == asked["sd3"] == 4  # of 8 updates
    assert len(result.reports) == 2
    for pipe, kwargs, report in zip(
        pipes, arguments["pipeline_kwargs"], result.reports, strict=True
    ):
        gap = velocity_gap(pipe, student, PROMPTS[4:], pipeline_kwargs=kwargs)
        assert report.gap == pytest.approx(gap, rel=1e-5)
    assert result.gap == pytest.approx(sum(report.gap for report in result.reports) / 2)
    assert result.reports[0].gap != result.reports[1].gap
    last = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[-1])
    assert last["velocity_gap_pipeline_1"] == result.reports[1].gap
    facts = json.loads((tmp_path / "distillation.json").read_text())
    assert [one["pipeline"] for one in facts["pipelines"]] == [
        "FluxPipeline", "StableDiffusion3Pipeline"
    ]  # fmt: skip
    card = (tmp_path / "README.md").read_text()
    assert "| pipeline 2 | StableDiffusion3Pipeline" in card and "of each pipeline" in card


def test_one_teacher_reads_each_prompt_once() -> None:
    def encoded(shared: bool) -> int:
        pipes, arguments = two_pipelines()
        teachers = [pipes[0].text_encoder_2, copy.deepcopy(pipes[0].text_encoder_2)]
        if not shared:
            pipes[1].register_modules(text_encoder_3=teachers[1])
        calls: list[int] = []
        for teacher in teachers:
            # Of the stack within, as the pipeline's calls of the teacher itself are answered.
            teacher.encoder.register_forward_hook(lambda *_: calls.append(1))
        train(pipes, tiny_student(pipes[0]), PROMPTS[:4], config(max_steps=4), **arguments)
        return len(calls)

    # SD3 finds the rows of FLUX's prompts in the table; it lacks the negative prompt alone.
    assert encoded(shared=True) < encoded(shared=False)


def test_a_list_of_one_is_that_pipeline() -> None:
    pipe = tiny_flux()
    kwargs = call_kwargs(pipe, 2)
    alone, listed = tiny_student(pipe), tiny_student(pipe)
    train(pipe, alone, PROMPTS[:4], config(), pipeline_kwargs=kwargs)
    train([pipe], listed, PROMPTS[:4], config(), pipeline_kwargs=[kwargs])
    assert_same(alone, listed)


def test_a_joint_run_goes_on_bitwise(tmp_path: Path) -> None:
    pipes, arguments = two_pipelines()
    arguments |= {"eval_prompts": PROMPTS[4:], "resume": True}
    settings = config(max_steps=12, eval_every=6, checkpoint_every=3)
    whole = tiny_student(pipes[0])
    train(pipes, whole, PROMPTS[:4], settings, output_dir=tmp_path / "whole", **arguments)

    class Stop(Exception):
        pass

    calls = iter(range(10**6))

    def stop(*_: Any) -> None:
        if torch.is_grad_enabled() and next(calls) == 2:
            raise Stop

    hook = pipes[1].transformer.register_forward_hook(stop)
    with pytest.raises(Stop):
        train(
            pipes, tiny_student(pipes[0]), PROMPTS[:4], settings,
            output_dir=tmp_path / "cut", **arguments,
        )  # fmt: skip
    hook.remove()
    cut = tiny_student(pipes[0])
    train(pipes, cut, PROMPTS[:4], settings, output_dir=tmp_path / "cut", **arguments)
    assert_same(cut, whole)

    with pytest.raises(DistillError, match="pipeline 0: then"):
        train(
            pipes[::-1], tiny_student(pipes[0]), PROMPTS[:4], settings,
            output_dir=tmp_path / "cut", **arguments | {"pipeline_kwargs": None},
        )  # fmt: skip


def test_bad_input_is_refused_before_anything_runs() -> None:
    pipes, arguments = two_pipelines()
    student = tiny_student(pipes[0])
    cases: list[tuple[str, dict[str, Any]]] = [
        ("no pipeline", {"pipe": []}),
        ("a list of 1 for 2 pipelines", {"pipeline_kwargs": [{}]}),
        ("FluxPipeline doesn't take", {"pipeline_kwargs": [{"hight": 8}, {}]}),
    ]
    before = {name: p.clone() for name, p in student.named_parameters()}

    def run(**changes: Any) -> None:
        call = {"pipe": pipes, **arguments} | changes
        train(call.pop("pipe"), student, PROMPTS[:4], config(), **call)

    for message, changes in cases:
        with pytest.raises(DistillError, match=message):
            run(**changes)
    pipes[1].to("meta")
    with pytest.raises(DistillError, match="FluxPipeline on cpu, StableDiffusion3Pipeline on meta"):
        run()
    for name, p in student.named_parameters():
        assert torch.equal(p, before[name])
