"""Capture a teacher's walk, find where T5's rows go, and replay it: on real pipelines."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from tiny import MAX_TOKENS, PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_sd3, tiny_student

from t5slim.distill import VelocityLoss, capture
from t5slim.distill.calls import call_encoder
from t5slim.distill.fallback import predict_through_pipeline
from t5slim.distill.pipeline import teacher_of
from t5slim.distill.replay import Rows, collate, predict, split_walk
from t5slim.distill.teacher import PromptTable, encode_prompts
from t5slim.distill.trace import NotAGather, _decode, _encode, trace
from t5slim.distill.walk import Walk
from t5slim.errors import DistillError

GATHERS = ["flux", "sd3", "chroma", "pixart_sigma", "ltx"]
CPU = torch.device("cpu")


def walk_and_split(
    pipe: Any, prompts: list[str], table: PromptTable | None = None, **changes: Any
) -> tuple[Walk, list[Rows], PromptTable]:
    table = table or PromptTable()
    kwargs = call_kwargs(pipe) | changes.pop("pipeline_kwargs", {})
    walk = capture(pipe, prompts, pipeline_kwargs=kwargs, encode=table.teacher_rows, **changes)
    return walk, split_walk(pipe, walk, table), table


@torch.no_grad()
def teacher_prediction(pipe: Any, rows: Rows, table: PromptTable) -> torch.Tensor:
    ids, mask = table.batch(rows.prompts, CPU)
    return predict(pipe, rows, table.teacher_rows(teacher_of(pipe), ids, mask))


def assert_replays(pipe: Any, calls: list[Rows], table: PromptTable) -> None:
    for rows in calls:
        assert torch.equal(teacher_prediction(pipe, rows, table), rows.target)


@pytest.mark.parametrize("name", GATHERS)
def test_replay_with_the_teachers_rows_is_bitwise_the_capture(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    walk, calls, table = walk_and_split(pipe, PROMPTS[:3])
    assert len(calls) == len(walk.denoiser_calls) == (6 if name == "chroma" else 3)
    assert_replays(pipe, calls, table)
    # The rows matter: those of another prompt give another prediction.
    ids, mask = table.batch([calls[0].prompts[-1]] * len(calls[0]), CPU)
    other = table.teacher_rows(teacher_of(pipe), ids, mask)
    with torch.no_grad():
        assert not torch.allclose(predict(pipe, calls[0], other), calls[0].target, atol=1e-4)


@pytest.mark.parametrize(
    "build, changes",
    [
        (tiny_flux, {"true_cfg_scale": 2.0, "negative_prompt": "a star"}),
        (tiny_flux, {"num_images_per_prompt": 2}),
        (
            tiny_sd3,
            {
                "skip_guidance_layers": [0],
                "skip_layer_guidance_start": 0.0,
                "skip_layer_guidance_stop": 0.9,
            },
        ),
    ],
    ids=["true-cfg", "two images a prompt", "skip-layer guidance"],
)
def test_replay_under_other_guidance(build: Any, changes: dict[str, Any]) -> None:
    pipe = build()
    _, calls, table = walk_and_split(pipe, PROMPTS[:2], pipeline_kwargs=changes)
    assert len(calls) > 3 or len(calls[0]) > 2
    assert_replays(pipe, calls, table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replay_in_half_precision(dtype: torch.dtype) -> None:
    pipe = tiny_sd3().to(dtype)
    _, calls, table = walk_and_split(pipe, PROMPTS[:2])
    assert calls[0].target.dtype == dtype
    assert_replays(pipe, calls, table)


def test_sd3_keeps_clips_rows_where_t5_has_none() -> None:
    _, calls, _ = walk_and_split(tiny_sd3(), PROMPTS[:2])
    (text,) = calls[0].text.values()
    clip_tokens = text.positions.shape[1] - MAX_TOKENS
    assert clip_tokens > 0 and text.constant is not None
    assert (text.positions[:, :clip_tokens] == -1).all()
    assert (text.positions[:, clip_tokens:] == torch.arange(MAX_TOKENS)).all()


def test_a_batch_as_long_as_the_text_is_not_mistaken_for_it() -> None:
    # txt_ids is (tokens, 3): with as many prompts as tokens, its length is the batch's.
    pipe = tiny_flux()
    _, calls, table = walk_and_split(pipe, PROMPTS * (MAX_TOKENS // len(PROMPTS)))
    assert len(calls[0]) == MAX_TOKENS
    assert ("txt_ids",) not in calls[0].batched and ("guidance",) in calls[0].batched
    half = calls[0].select(range(6))
    torch.testing.assert_close(
        teacher_prediction(pipe, half, table), half.target, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", GATHERS)
def test_rows_of_different_walks_and_timesteps_share_a_call(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    _, first, table = walk_and_split(pipe, PROMPTS[:2], seed=1)
    _, second, _ = walk_and_split(pipe, PROMPTS[2:5], table, seed=2)
    assert {rows.signature for rows in first} == {rows.signature for rows in second}
    mixed = collate([(second[2], 1), (first[0], 0), (first[1], 1), (second[0], 2)])
    torch.testing.assert_close(
        teacher_prediction(pipe, mixed, table), mixed.target, rtol=1e-5, atol=1e-5
    )


def test_batch_dimensions_are_looked_for_once_for_walks_of_one_shape() -> None:
    pipe, table = tiny_sd3(), PromptTable()
    known: dict[Any, Any] = {}
    for prompts, steps, shapes in [
        (PROMPTS[:2], 3, 1), (PROMPTS[2:4], 3, 1), (PROMPTS[:3], 3, 2), (PROMPTS[:2], 2, 3),
    ]:  # fmt: skip
        kwargs = call_kwargs(pipe) | {"num_inference_steps": steps}
        walk = capture(pipe, prompts, pipeline_kwargs=kwargs, encode=table.teacher_rows)
        assert_replays(pipe, split_walk(pipe, walk, table, known), table)
        assert len(known) == shapes
        alone = trace(pipe, walk)
        for found, expected in zip(trace(pipe, walk, known), alone, strict=True):
            assert found.batch_dims == expected.batch_dims
            assert found.sources.keys() == expected.sources.keys()


def test_stable_audio_is_no_gather() -> None:
    pipe = TINY_PIPELINES["stable_audio"]()
    walk = capture(pipe, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe))
    with pytest.raises(NotAGather, match="encoder_hidden_states"):
        trace(pipe, walk)


@pytest.mark.parametrize("name", GATHERS)
def test_both_routes_give_the_same_loss_and_gradients(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    student = tiny_student(pipe)
    walk, calls, table = walk_and_split(pipe, PROMPTS[:2])
    call = 2  # with a prompt in it: in Chroma, every other call is the negative one
    loss = VelocityLoss()

    rows = calls[call]
    replayed = loss(
        predict(pipe, rows, encode_prompts(student, table, rows.prompts, CPU)), rows.target
    )
    gradients = torch.autograd.grad(replayed.mean(), list(student.parameters()))

    walked = predict_through_pipeline(
        pipe, walk, lambda ids, mask: call_encoder(student, ids, mask), {call}
    )
    assert list(walked) == [call]
    expected = loss(walked[call], walk.denoiser_calls[call].target)
    torch.testing.assert_close(replayed, expected, rtol=1e-5, atol=1e-8)
    for mine, theirs in zip(
        gradients, torch.autograd.grad(expected.mean(), list(student.parameters())), strict=True
    ):
        assert theirs.norm() > 0
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


class ZeroesPadding(FluxPipeline):
    """Zeroes the rows of the padding in place, as Cosmos does."""

    def _get_t5_prompt_embeds(self, prompt: Any = None, **kwargs: Any) -> torch.Tensor:
        rows = super()._get_t5_prompt_embeds(prompt=prompt, **kwargs)
        for row, text in zip(rows, prompt, strict=True):
            row[len(self.tokenizer_2(text).input_ids) :] = 0
        return rows


class ScalesRows(FluxPipeline):
    def _get_t5_prompt_embeds(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super()._get_t5_prompt_embeds(*args, **kwargs) * 1.5


class LeaksIntoPooled(FluxPipeline):
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        rows, pooled, text_ids = super().encode_prompt(*args, **kwargs)
        return rows, pooled + rows.mean(), text_ids


def test_zeroed_padding_stays_zero() -> None:
    pipe = ZeroesPadding(**tiny_flux().components)
    _, calls, table = walk_and_split(pipe, PROMPTS[:2])
    (text,) = calls[0].text.values()
    lengths = [len(pipe.tokenizer_2(prompt).input_ids) for prompt in PROMPTS[:2]]
    assert [(row >= 0).sum().item() for row in text.positions] == [
        min(n, MAX_TOKENS) for n in lengths
    ]
    assert_replays(pipe, calls, table)


@pytest.mark.parametrize("cls", [ScalesRows, LeaksIntoPooled])
def test_a_pipeline_that_changes_t5s_rows_is_detected(cls: type[FluxPipeline]) -> None:
    pipe = cls(**tiny_flux().components)
    walk = capture(pipe, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe))
    with pytest.raises(NotAGather):
        trace(pipe, walk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_numbers_survive_every_dtype(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0, 1, 15, 16, 255, 4095, 65535, 65536, 16**5 - 1])
    assert torch.equal(_decode(_encode(numbers, 5, 32).to(dtype), 5), numbers)
    zeros, noise = torch.zeros(4, 32, dtype=dtype), torch.randn(4, 32).to(dtype)
    assert (_decode(zeros, 5) == -1).all() and (_decode(noise, 5) == -1).all()


def test_zero_pooled_zeroes_what_teacher_and_student_see() -> None:
    pipe = tiny_flux()
    walk, calls, table = walk_and_split(pipe, PROMPTS[:2], zero_pooled=True)
    assert not any(call.kwargs["pooled_projections"].any() for call in walk.denoiser_calls)
    assert_replays(pipe, calls, table)
    plain, _, _ = walk_and_split(pipe, PROMPTS[:2])
    assert not torch.equal(plain.denoiser_calls[0].target, walk.denoiser_calls[0].target)


def test_autocast_reaches_the_denoiser_alone() -> None:
    pipe = tiny_flux()
    plain = capture(pipe, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe))
    walk = capture(
        pipe, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe), autocast_dtype=torch.bfloat16
    )
    assert torch.equal(walk.slot_calls[0].rows, plain.slot_calls[0].rows)
    for call in walk.denoiser_calls:  # bfloat16 would spread from the answer to x_t
        assert call.kwargs["hidden_states"].dtype == call.target.dtype == torch.float32
    exact, rounded = plain.denoiser_calls[0].target, walk.denoiser_calls[0].target
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


def test_the_teacher_is_asked_for_each_prompt_once() -> None:
    pipe = TINY_PIPELINES["pixart_sigma"]()
    seen: list[int] = []
    table = PromptTable()

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(len(args[0]))
        return teacher_of(pipe)(*args, **kwargs)

    ids = torch.tensor([[5, 1, 0], [6, 1, 0], [5, 1, 0]])
    mask = torch.tensor([[1, 1, 0]] * 3)
    first = table.teacher_rows(forward, ids, mask)
    assert seen == [8]  # batches have one size: the rows of a prompt are the same in each
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    seen.clear()
    assert torch.equal(table.teacher_rows(forward, ids, mask), first) and not seen
    # The same ids under another mask are another prompt to the teacher.
    assert len(table) == 2 and table.numbers(ids[:1], torch.ones_like(mask[:1])) == [2]


def test_capture_leaves_the_pipeline_as_it_was() -> None:
    pipe = tiny_flux()
    pipe.set_progress_bar_config(disable=True, desc="mine")
    generator = torch.Generator

    def image() -> torch.Tensor:
        return pipe(
            PROMPTS[0],
            **call_kwargs(pipe),
            output_type="latent",
            generator=generator().manual_seed(0),
        )[0]

    before, attributes = image(), set(vars(pipe))
    walk_and_split(pipe, PROMPTS[:2])
    assert torch.equal(image(), before)
    assert set(vars(pipe)) == attributes
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
    for module in (pipe.transformer, pipe.text_encoder_2):
        assert "forward" not in vars(module)


def test_a_failing_denoiser_leaves_no_trace() -> None:
    pipe = tiny_flux()

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    handle = pipe.transformer.proj_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        capture(pipe, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe))
    handle.remove()
    assert "forward" not in vars(pipe.transformer) and "forward" not in vars(pipe.text_encoder_2)
    assert logging.getLogger("diffusers").level != logging.ERROR


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"hight": 16}, "'hight', which FluxPipeline doesn't take"),
        ({"prompt": "a cat"}, "may not hold 'prompt'"),
        ({"prompt_embeds": torch.zeros(1)}, "may not hold 'prompt_embeds'"),
        ({"output_type": "pil"}, "may not hold 'output_type'"),
    ],
)
def test_bad_pipeline_kwargs(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        capture(tiny_flux(), PROMPTS[:1], pipeline_kwargs=kwargs)


def test_a_random_scheduler_without_the_generator_is_refused() -> None:
    pipe = TINY_PIPELINES["stable_audio"]()
    walk = capture(pipe, PROMPTS[:1], pipeline_kwargs=call_kwargs(pipe))
    walk.denoiser_calls[1].kwargs["hidden_states"].add_(0.1)
    student = tiny_student(pipe)
    with pytest.raises(DistillError, match="another hidden_states"):
        predict_through_pipeline(
            pipe, walk, lambda ids, mask: call_encoder(student, ids, mask), {0}
        )
