"""The velocity gap, and the report of where it comes from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.training import pipeline_and_kwargs
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_student
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from t5slim import patch_pipeline
from t5slim.distill import VelocityGap, velocity_gap
from t5slim.errors import DistillError
from t5slim.slot import TextSlot

MASKED = ("chroma", "pixart_sigma", "stable_audio")


class Changed(torch.nn.Module):
    """The teacher with its embeddings changed: `change(embeddings, input_ids)`."""

    def __init__(self, teacher: torch.nn.Module, change: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.teacher = copy.deepcopy(teacher)
        self.change = change

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> BaseModelOutput:
        embeddings = self.teacher(input_ids, attention_mask)[0]
        return BaseModelOutput(last_hidden_state=self.change(embeddings, input_ids))


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
        if name == "bria":  # which doesn't pad: the end of the text alone, and zeros after it
            end = teacher(ids[:, :1])[0]
            return torch.cat([end, end.new_zeros(1, 11, end.shape[-1])], 1)
        return teacher(ids, mask)[0]


@pytest.mark.parametrize("name", [*sorted(TINY_PIPELINES), "bria"])
def test_gap_is_0_for_the_teacher_and_1_for_an_empty_prompt(name: str) -> None:
    pipe, teacher, gap = measured(name)
    assert gap(copy.deepcopy(teacher)) < 1e-8
    empty = empty_prompt(name, pipe, teacher)
    silent = Changed(teacher, lambda e, ids: empty[:, : e.shape[1]].expand_as(e))
    assert gap(silent) == pytest.approx(1.0, rel=1e-5)
    student = tiny_student(pipe).train()
    assert gap(student) > 0.01 and student.training


def test_report_by_prompt_call_and_third() -> None:
    pipe, _, gap = measured("pixart_sigma")
    student, kwargs = tiny_student(pipe), call_kwargs(pipe)
    found = gap.report(student)
    assert found.gap == gap(student) == gap(student)
    assert found.gap == velocity_gap(
        pipe, student, PROMPTS[:4], pipeline_kwargs=kwargs, batch_size=3
    )
    assert found.distances.shape == found.denominators.shape == (4, 3)
    assert found.thirds == pytest.approx(found.of_calls.tolist())  # three calls
    for sums, parts in ((0, found.of_calls), (1, found.of_prompts)):
        weighted = parts * found.denominators.sum(sums)
        assert found.gap == pytest.approx((weighted.sum() / found.denominators.sum()).item())
    _, _, alone = measured("flux", 2, pipeline_kwargs=call_kwargs(tiny_flux(), steps=1))
    report = alone.report(tiny_student(pipe))
    assert report.thirds == (pytest.approx(report.gap), None, None)


@pytest.mark.parametrize("name", ["flux", "pixart_sigma"])
def test_spread_is_1_for_the_teacher_and_0_if_all_prompts_are_encoded_alike(name: str) -> None:
    pipe, teacher, gap = measured(name)
    same = torch.randn(1, 12, 32)
    collapsed = Changed(teacher, lambda e, ids: same.expand_as(e))
    halved = Changed(teacher, lambda e, ids: e / 2 + 3)
    for student, expected in ((copy.deepcopy(teacher), 1), (halved, 0.5), (collapsed, 0)):
        assert gap.report(student).spread == pytest.approx(expected, rel=1e-5, abs=1e-6)
    _, _, alone = measured(name, 1)
    assert alone.report(tiny_student(pipe)).spread is None


def test_gaps_that_mean_nothing_are_refused() -> None:
    pipe = tiny_flux()
    student, arguments = tiny_student(pipe), {"pipeline_kwargs": call_kwargs(pipe)}
    patch_pipeline(pipe, student)
    with pytest.raises(DistillError, match="unpatch_pipeline"):
        velocity_gap(pipe, student, PROMPTS[:1], **arguments)
    pipe = tiny_flux()
    torch.nn.init.zeros_(pipe.transformer.context_embedder.weight)
    with pytest.raises(DistillError, match="same for these prompts as for an empty one"):
        VelocityGap(pipe, PROMPTS[:2], **arguments)
