"""Every pipeline class of diffusers with a T5: patched, captured, replayed, learned from.

What is measured here is the table of docs/pipelines.md; `python tests/zoo/table.py` writes it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from test_slot import every_pipeline_class
from tiny import PROMPTS, tiny_student
from zoo import CASES, NOT_COVERED
from zoo.facts import measure
from zoo.umt5 import wan

from t5slim import DistillError, IncompatibleStudentError, NoT5SlotError, patch_pipeline
from t5slim.distill import capture
from t5slim.distill.replay import predict, split_walk
from t5slim.distill.states import frozen
from t5slim.distill.teacher import PromptTable
from t5slim.distill.trace import NotAGather, trace
from t5slim.slot import find_text_slot

TABLE = Path(__file__).parents[1] / "docs" / "pipelines.md"
HERE = {name: case for name, case in CASES.items() if case.cls is not None}


@pytest.mark.parametrize("name", HERE)
def test_pipeline(name: str) -> None:
    case = CASES[name]
    facts = measure(case)
    assert facts.patched
    assert facts.route == case.route, facts.why
    assert case.why in facts.why
    if facts.route != "none":
        assert facts.calls
        assert facts.replayed
        assert facts.gradient > 0
    # The table of the docs is what was measured; to write it anew: python tests/zoo/table.py
    assert facts.row in TABLE.read_text(encoding="utf-8").splitlines()


def test_no_pipeline_is_left_out() -> None:
    with_t5 = set()
    for cls in every_pipeline_class():
        try:
            find_text_slot(cls)
        except NoT5SlotError:
            continue
        with_t5.add(cls.__name__)
    assert with_t5 <= CASES.keys() | NOT_COVERED.keys()
    assert not CASES.keys() & NOT_COVERED.keys()
    distilled = [case for case in HERE.values() if case.route != "none"]
    assert len(distilled) >= 40


def test_gradients_pass_through_experts() -> None:
    """HiDream's, in eval mode, answer under torch.no_grad: a fifth of this slope was missing."""
    case = CASES["HiDreamImagePipeline"]
    pipe, table = case.pipe(), PromptTable()
    experts = pipe.transformer.double_stream_blocks[0].block.ff_i
    with frozen(pipe, gradient_checkpointing=False):
        walk = capture(pipe, case.texts, pipeline_kwargs=case.call(), encode=table.teacher_rows)
        rows = split_walk(pipe, walk, table)[0]
        ids, mask = table.batch(rows.prompts, torch.device("cpu"))
        teachers = table.teacher_rows(pipe.text_encoder_3, ids, mask)
        assert torch.equal(predict(pipe, rows, teachers), rows.target)
        noise = torch.randn(teachers.shape, generator=torch.Generator().manual_seed(0))
        embeddings = (teachers + 0.3 * noise).requires_grad_()

        def loss(embeddings: torch.Tensor) -> torch.Tensor:
            return (predict(pipe, rows, embeddings) - rows.target).square().mean()

        (gradient,) = torch.autograd.grad(loss(embeddings), embeddings)
        step = 0.003 * gradient / gradient.norm()
        with torch.no_grad():
            slope = (loss(embeddings + step) - loss(embeddings - step)) / 0.006
    torch.testing.assert_close(gradient.norm(), slope, rtol=0.01, atol=0)
    assert not experts.training


def test_wan_2_2_has_two_denoisers() -> None:
    pipe, table = wan(WanPipeline, experts=2), PromptTable()
    kwargs = CASES["WanPipeline"].call()
    walk = capture(pipe, PROMPTS[:2], pipeline_kwargs=kwargs, encode=table.teacher_rows)
    calls = split_walk(pipe, walk, table)
    # The second step is below `boundary_ratio`; each has a call for the prompt and one without.
    assert [rows.denoiser for rows in calls] == ["transformer"] * 2 + ["transformer_2"] * 2
    assert calls[0].signature != calls[2].signature
    for rows in calls:
        ids, mask = table.batch(rows.prompts, torch.device("cpu"))
        with torch.no_grad():
            same = predict(pipe, rows, table.teacher_rows(pipe.text_encoder, ids, mask))
        assert torch.equal(same, rows.target)


@pytest.mark.skipif("AnyFlowFARPipeline" not in HERE, reason="diffusers has it from 0.39 on")
def test_a_cache_between_the_chunks_of_a_video_is_refused() -> None:
    case = CASES["AnyFlowFARPipeline"]
    with pytest.raises(DistillError, match="chunk_partition"):
        capture(case.pipe(), case.texts, pipeline_kwargs=case.call() | {"chunk_partition": [1, 1]})


def test_students_of_another_width_than_their_rows() -> None:
    """HunyuanImage would join zeros as wide as `config.d_model` to the rows of quotations."""
    pipe = CASES["HunyuanImagePipeline"].pipe()
    teacher = pipe.text_encoder_2
    with pytest.raises(IncompatibleStudentError, match=r"HunyuanImagePipeline .*is 16, .*have 32"):
        patch_pipeline(pipe, tiny_student(pipe))
    assert pipe.text_encoder_2 is teacher


def test_interrupted_pipelines_get_their_attention_back() -> None:
    """Perturbed-attention guidance sets other processors for a call; tracing ends that early."""
    case = CASES["PixArtSigmaPAGPipeline"]
    pipe = case.pipe()
    before = pipe.transformer.attn_processors
    walk = capture(pipe, case.texts, pipeline_kwargs=case.call())
    with pytest.raises(NotAGather, match="attention"):
        trace(pipe, walk)
    assert pipe.transformer.attn_processors == before
