"""Bria encodes each prompt by itself, and doesn't pad it: T5's rows are as many as its tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import BriaPipeline
from tiny import PROMPTS, tiny_student
from transformers.modeling_outputs import BaseModelOutput
from zoo.flux import CASES, bria

from t5slim.distill import DistillConfig, VelocityGap, train, velocity_gap
from t5slim.distill.teacher import PromptTable

CALL = next(case.call for case in CASES if case.name == "BriaPipeline")()
CPU = torch.device("cpu")


class Empty(torch.nn.Module):
    """Says of every prompt what the pipeline makes of an empty one: the end, and zeros after it."""

    def __init__(self, end: torch.Tensor) -> None:
        super().__init__()
        self.end = end

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> BaseModelOutput:
        rows = self.end.new_zeros(*input_ids.shape, self.end.shape[-1])
        rows[:, 0] = self.end
        return BaseModelOutput(last_hidden_state=rows)


def test_training_closes_the_gap() -> None:
    pipe = bria(BriaPipeline)
    student = tiny_student(pipe)
    before = velocity_gap(pipe, student, PROMPTS[:3], pipeline_kwargs=CALL)
    config = DistillConfig(  # embeddings first, then velocities
        max_steps=60, batch_size=3, reservoir_walks=6, warmup_steps=2, learning_rate=5e-3
    )
    result = train(
        pipe, student, PROMPTS[:3], config, pipeline_kwargs=CALL, eval_prompts=PROMPTS[:3]
    )
    assert result.gap is not None and result.gap < 0.6 * before


def test_gap_is_0_for_the_teacher_and_1_for_an_empty_prompt() -> None:
    pipe = bria(BriaPipeline)
    gap = VelocityGap(pipe, PROMPTS[:4], pipeline_kwargs=CALL, batch_size=3)
    assert gap(copy.deepcopy(pipe.text_encoder)) < 1e-8
    with torch.no_grad():
        end = pipe.text_encoder(pipe.tokenizer([""], return_tensors="pt").input_ids)[0][0, 0]
    assert gap(Empty(end)) == pytest.approx(1.0, rel=1e-5)


def test_rows_of_prompts_of_different_lengths() -> None:
    pipe, table = bria(BriaPipeline), PromptTable()
    each = [pipe.tokenizer([prompt], return_tensors="pt").input_ids for prompt in PROMPTS[:3]]
    alone = [table.teacher_rows(pipe.text_encoder, ids, None)[0] for ids in each]
    together = table.rows(pipe.text_encoder, [0, 1, 2], CPU)
    ids, mask = table.batch([0, 1, 2], CPU)
    assert mask is not None
    for i, rows in enumerate(alone):
        assert torch.equal(together[i, : len(rows)], rows) and not together[i, len(rows) :].any()
        assert mask[i].sum() == len(rows) and torch.equal(ids[i, : len(rows)], each[i][0])
    assert table.batch([1, 1], CPU)[1] is None
