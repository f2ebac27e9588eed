"""Every pipeline class of diffusers with a T5: patched, captured, replayed, learned from.

What is measured here is the table of docs/pipelines.md; `python tests/zoo/table.py` writes it.
"""

import pytest
import torch
from diffusers import WanPipeline
from helpers.trajectories import assert_replays, captured
from tiny import PROMPTS, tiny, tiny_student
from zoo import CASES
from zoo.table import TABLE, measure

from t5slim import IncompatibleStudentError, patch_pipeline
from t5slim.distill.pipeline import frozen, teacher_of
from t5slim.distill.replay import predict
from t5slim.slot import TextSlot


@pytest.mark.parametrize("name", CASES)
def test_pipeline(name: str) -> None:
    # The table of the docs is what was measured; to write it anew: python tests/zoo/table.py
    (line,) = [line for line in TABLE.read_text("utf-8").splitlines() if f"`{name}`" in line]
    assert line.startswith(measure(CASES[name]))


def test_gradients_pass_through_experts() -> None:
    """HiDream's, in eval mode, predict under torch.no_grad: a fifth of this slope was missing."""
    case = CASES["HiDreamImagePipeline"]
    pipe = case.pipe()
    experts = pipe.transformer.double_stream_blocks[0].block.ff_i
    with frozen(pipe, gradient_checkpointing=False):
        _, (samples, *_), teacher = captured(pipe, case.texts, pipeline_kwargs=case.call())
        assert_replays(pipe, [samples], teacher)
        own = teacher.get(teacher_of(pipe), samples.prompts, torch.device("cpu"))
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
        embeddings = (own + 0.3 * noise).requires_grad_()

        def loss(embeddings: torch.Tensor) -> torch.Tensor:
            return (predict(pipe, samples, embeddings) - samples.target).square().mean()

        (gradient,) = torch.autograd.grad(loss(embeddings), embeddings)
        step = 0.003 * gradient / gradient.norm()
        with torch.no_grad():
            slope = (loss(embeddings + step) - loss(embeddings - step)) / 0.006
    torch.testing.assert_close(gradient.norm(), slope, rtol=0.01, atol=0)
    assert not experts.training


def test_wan_2_2_has_two_denoisers() -> None:
    pipe = tiny(WanPipeline, transformer_2={}, boundary_ratio=0.9)
    call = CASES["WanPipeline"].call()
    _, calls, teacher = captured(pipe, PROMPTS[:2], pipeline_kwargs=call)
    # The second step is below `boundary_ratio`; each has a call for the prompt and one without.
    assert [call.denoiser for call in calls] == ["transformer"] * 2 + ["transformer_2"] * 2
    assert calls[0].signature != calls[2].signature
    assert_replays(pipe, calls, teacher)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.student])
def test_students_of_another_width_than_their_output(name: str) -> None:
    """HunyuanImage pads quotations by zeros of `d_model`, LongCat-Audio adds a hidden state.

    So does a class of the user's own that is derived from one. As wide as its output, a student
    passes: see `test_pipeline`.
    """
    pipe = CASES[name].pipe()
    slot = TextSlot(pipe)
    teacher, narrow = slot.encoder, tiny_student(pipe)
    for cls in (type(pipe), type("Own", (type(pipe),), {})):
        pipe.__class__ = cls
        with pytest.raises(IncompatibleStudentError, match=f"width 16, .* {cls.__name__} takes"):
            patch_pipeline(pipe, narrow)
    assert slot.encoder is teacher
