"""The velocity gap, and the report of where it comes from."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from helpers.training import pipeline_and_kwargs, run
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, t5_encoder, tiny_flux, tiny_student
from torch import Tensor

from t5slim import T5SlimError, patch_pipeline
from t5slim.distill import VelocityGap, cache_teacher, cached_teacher, capture, train, velocity_gap
from t5slim.distill.metrics import GapReport
from t5slim.errors import ConfigError, DistillError, IncompatibleStudentError
from t5slim.evaluate import compare
from t5slim.slot import TextSlot

MASKED = ("chroma", "pixart_sigma", "stable_audio")


def measured(name: str, prompts: int = 4, **arguments: Any) -> tuple[Any, Any, VelocityGap]:
    """A pipeline, its teacher, and the measure of both."""
    pipe, kwargs = pipeline_and_kwargs(name)
    arguments = {"pipeline_kwargs": kwargs, "batch_size": 3} | arguments
    return pipe, TextSlot(pipe).encoder, VelocityGap(pipe, PROMPTS[:prompts], **arguments)


def empty_prompt(name: str, pipe: Any, teacher: torch.nn.Module) -> Tensor:
    """The teacher's embeddings of the empty prompt, (1, 12, D)."""
    tokens = TextSlot(pipe).tokenizer([""], padding="max_length", return_tensors="pt")
    ids, mask = tokens.input_ids, tokens.attention_mask if name in MASKED else None
    with torch.no_grad():
        if name == "BriaPipeline":  # unpadded: the end of the text alone, and zeros after it
            end = teacher(ids[:, :1])[0]
            return torch.cat([end, end.new_zeros(1, 11, end.shape[-1])], 1)
        return teacher(ids, mask)[0]


@pytest.mark.parametrize("name", [*sorted(TINY_PIPELINES), "BriaPipeline"])
def test_gap_is_0_for_the_teacher_and_1_for_an_empty_prompt(name: str) -> None:
    pipe, teacher, gap = measured(name)
    assert gap(copy.deepcopy(teacher)) < 1e-8
    empty = empty_prompt(name, pipe, teacher)
    silent = copy.deepcopy(teacher)
    silent.register_forward_hook(
        lambda _, args, output: (empty[:, : output[0].shape[1]].expand_as(output[0]),)
    )
    assert gap(silent) == pytest.approx(1.0, rel=1e-5)
    student = tiny_student(pipe).train()
    assert gap(student) > 0.01 and student.training


def test_report_by_prompt_and_call() -> None:
    pipe, _, gap = measured("pixart_sigma")
    student, call = tiny_student(pipe), call_kwargs(pipe)
    found = gap.report(student)
    assert found.gap == gap(student) == gap(student)
    assert found.gap == velocity_gap(pipe, student, PROMPTS[:4], pipeline_kwargs=call, batch_size=3)
    assert found.distances.shape == found.denominators.shape == (4, 3)
    for sums, parts in ((0, found.of_calls), (1, found.of_prompts)):
        weighted = parts * found.denominators.sum(sums)
        assert found.gap == pytest.approx((weighted.sum() / found.denominators.sum()).item())
    _, _, alone = measured("flux", 2, pipeline_kwargs=call_kwargs(tiny_flux(), steps=1))
    report = alone.report(tiny_student(pipe))
    assert report.of_calls.tolist() == [pytest.approx(report.gap)]


def test_interval_and_median_of_a_gap() -> None:
    """Of 100 prompts alike, five are misread: they are three quarters of the gap."""
    distances = torch.full((100, 2), 0.01, dtype=torch.float64)
    distances[:5] = 0.6
    report = GapReport(distances, torch.ones_like(distances))
    assert report.median == pytest.approx(0.01) and report.gap == pytest.approx(0.0395)
    low, high = report.interval
    # Of a binomial number of misread prompts, 5 of 100 expected: 1 to 10 in 95% of the draws.
    assert (low, high) == pytest.approx((0.01 + 0.59 * 0.01, 0.01 + 0.59 * 0.1), abs=0.006)
    assert GapReport(distances, torch.ones_like(distances)).interval == report.interval
    assert str(report).startswith("0.0395 (95% interval 0.0")


def test_gaps_that_mean_nothing_are_refused(pipe: Any) -> None:
    student, arguments = tiny_student(pipe), {"pipeline_kwargs": call_kwargs(pipe)}
    patch_pipeline(pipe, student)
    with pytest.raises(DistillError, match="unpatch_pipeline"):
        velocity_gap(pipe, student, PROMPTS[:1], **arguments)
    pipe = tiny_flux()
    torch.nn.init.zeros_(pipe.transformer.context_embedder.weight)
    with pytest.raises(DistillError, match="reads nothing of these prompts"):
        VelocityGap(pipe, PROMPTS[:2], **arguments)


@pytest.mark.parametrize("name", ["flux", "stable_audio"])  # gather and fallback
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_gap_needs_no_autograd(name: str, mode: Any) -> None:
    pipe, _, gap = measured(name, 2)
    student = tiny_student(pipe)
    expected = gap(student)
    with mode():
        made, _, inside = measured(name, 2)
        found = [inside(student), measured(name, 2)[2](student)]
    arguments: Any = {"pipeline_kwargs": call_kwargs(made), "batch_size": 3}
    found += [inside(student), velocity_gap(made, student, PROMPTS[:2], **arguments)]
    if name == "flux":
        with mode():
            seen = compare(made, {"mine": student}, PROMPTS[:2], **arguments)
        assert len(seen.samples) == 4 and seen.samples["velocity_gap"].notna().sum() == 2
    assert found == pytest.approx([expected] * 4, rel=1e-4)  # kernels differ


def test_a_student_can_be_a_folder(tmp_path: Path) -> None:
    pipe = tiny_flux().to(torch.bfloat16)
    student = tiny_student(pipe).to(torch.bfloat16)
    student.save_pretrained(tmp_path)
    arguments: Any = {"pipeline_kwargs": call_kwargs(pipe)}
    gap = velocity_gap(pipe, student, PROMPTS[:2], **arguments)
    assert velocity_gap(pipe, str(tmp_path), PROMPTS[:2], **arguments) == gap


PIPELINES: dict[str, Callable[[], Any]] = {
    "expected a.* pipeline.* got the class FluxPipeline": lambda: FluxPipeline,
    "expected a.* pipeline.* got str": lambda: "owner/flux",
    "is None: load it|no cached": lambda: tiny_flux(text_encoder_2=None),
    "no weights|meta tensor": lambda: tiny_flux(text_encoder_2=t5_encoder().to("meta")),
}


@pytest.mark.parametrize("what", PIPELINES)
def test_pipelines_that_are_none(what: str, tmp_path: Path) -> None:
    pipe, student = PIPELINES[what](), tiny_student(tiny_flux())
    arguments: Any = {"pipeline_kwargs": call_kwargs(tiny_flux())}
    for function, *given in (
        (compare, student, PROMPTS), (velocity_gap, student, PROMPTS), (VelocityGap, PROMPTS),
        (train, student, PROMPTS), (capture, PROMPTS), (cache_teacher, PROMPTS, tmp_path / "cache"),
    ):  # fmt: skip
        with pytest.raises(T5SlimError, match=what):
            function(pipe, *given, **arguments)
    with pytest.raises(T5SlimError):
        cached_teacher(pipe, tmp_path / "cache").__enter__()
    assert not list(tmp_path.iterdir())


def test_students_without_weights_of_their_own() -> None:
    pipe, student = tiny_flux(), tiny_student(tiny_flux())
    with torch.device("meta"):
        empty = tiny_student(pipe)
    refused = {empty: "has no weights"}
    for name in ("text_encoder_2", "transformer", "text_encoder", "vae"):
        shared = copy.deepcopy(student)
        weight = next(getattr(pipe, name).parameters())  # the same memory, as another parameter
        shared.register_parameter("one", torch.nn.Parameter(weight.data))
        refused[shared] = f"or shares its weights .*are in the {name}"
    for one, message in refused.items():
        for attempt in (velocity_gap, compare, run):
            with pytest.raises(T5SlimError, match=message):
                attempt(pipe, one, PROMPTS, pipeline_kwargs=call_kwargs(pipe))


@pytest.mark.parametrize("student", [3, None, torch.nn.Linear(2, 2), tiny_flux().text_encoder])
def test_what_is_no_encoder_for_the_slot(pipe: Any, student: Any) -> None:
    pipe.transformer.forward = None  # whoever calls it, fails
    with pytest.raises(IncompatibleStudentError, match="expected a SlimT5Encoder"):
        velocity_gap(pipe, student, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe))


def test_settings_that_mean_nothing() -> None:
    pipe, student = tiny_flux(), tiny_student(tiny_flux())
    pipe.transformer.forward = None  # whoever calls it, fails
    for name, value in (("batch_size", 0), ("seed", "a"), ("pipeline_kwargs", "ab")):
        with pytest.raises((ConfigError, DistillError), match=f"{name} is {value!r}; expected"):
            velocity_gap(pipe, student, PROMPTS[:2], **{name: value})
