"""Trajectories of real pipelines, captured and replayed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from tiny import MAX_TOKENS, PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_sd3, tiny_student

from t5slim.distill import capture
from t5slim.distill.calls import call_encoder
from t5slim.distill.objective import VelocityLoss
from t5slim.distill.pipeline import teacher_of
from t5slim.distill.replay import (
    Samples,
    collate,
    predict,
    predict_through_pipeline,
    split_trajectory,
)
from t5slim.distill.teacher import TeacherEmbeddings, encode_prompts
from t5slim.distill.trajectory import Trajectory
from t5slim.errors import DistillError

GATHERS = ["flux", "sd3", "chroma", "pixart_sigma", "ltx"]
CPU = torch.device("cpu")


def captured(
    pipe: Any, prompts: list[str], teacher: TeacherEmbeddings | None = None, **changes: Any
) -> tuple[Trajectory, list[Samples], TeacherEmbeddings]:
    teacher = teacher or TeacherEmbeddings()
    kwargs = call_kwargs(pipe) | changes.pop("pipeline_kwargs", {})
    trajectory = capture(pipe, prompts, pipeline_kwargs=kwargs, encode=teacher.encode, **changes)
    return trajectory, split_trajectory(trajectory, teacher), teacher


@torch.no_grad()
def teacher_prediction(pipe: Any, samples: Samples, teacher: TeacherEmbeddings) -> torch.Tensor:
    return predict(pipe, samples, teacher.get(teacher_of(pipe), samples.prompts, CPU))


def assert_replays(pipe: Any, calls: list[Samples], teacher: TeacherEmbeddings) -> None:
    for samples in calls:
        assert torch.equal(teacher_prediction(pipe, samples, teacher), samples.target)


@torch.no_grad()
def plain_run(pipe: Any, prompts: list[str]) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """The denoiser's arguments and predictions when the pipeline is called as it is."""
    calls = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(({k: v for k, v in kwargs.items() if torch.is_tensor(v)}, output[0].clone()))

    handle = pipe.transformer.register_forward_hook(record, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    pipe(prompts, generator=generator, output_type="latent", **call_kwargs(pipe))
    handle.remove()
    return calls


@pytest.mark.parametrize("name", [*GATHERS, "stable_audio"])
def test_capture_is_the_pipelines_own_run(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    expected = plain_run(pipe, PROMPTS[:3])
    trajectory = capture(pipe, PROMPTS[:3], pipeline_kwargs=call_kwargs(pipe))
    assert len(trajectory.denoiser_calls) == len(expected)
    for call, (kwargs, prediction) in zip(trajectory.denoiser_calls, expected, strict=True):
        assert torch.equal(call.target, prediction)
        for argument, tensor in kwargs.items():
            assert torch.equal(call.kwargs[argument], tensor)


def test_replay_of_several_images_of_a_prompt() -> None:
    pipe = tiny_flux()
    _, calls, teacher = captured(pipe, PROMPTS[:2], pipeline_kwargs={"num_images_per_prompt": 2})
    assert len(calls) == 3 and len(calls[0]) == 4
    assert_replays(pipe, calls, teacher)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replay_in_half_precision(dtype: torch.dtype) -> None:
    pipe = tiny_sd3().to(dtype)
    _, calls, teacher = captured(pipe, PROMPTS[:2])
    assert calls[0].target.dtype == dtype
    assert_replays(pipe, calls, teacher)


def test_sd3_keeps_clips_embeddings_where_t5_has_none() -> None:
    _, calls, _ = captured(tiny_sd3(), PROMPTS[:2])
    ((path, positions),) = calls[0].text.items()
    clip_tokens = positions.shape[1] - MAX_TOKENS
    assert clip_tokens > 0 and path in calls[0].batched
    assert (positions[:, :clip_tokens] == -1).all()
    assert (positions[:, clip_tokens:] == torch.arange(MAX_TOKENS)).all()


def test_a_batch_as_long_as_the_text_is_not_mistaken_for_it() -> None:
    # txt_ids is (tokens, 3): with as many prompts as tokens, its length is the batch's.
    pipe = tiny_flux()
    _, calls, teacher = captured(pipe, PROMPTS * (MAX_TOKENS // len(PROMPTS)))
    assert len(calls[0]) == MAX_TOKENS
    assert ("txt_ids",) not in calls[0].batched and ("guidance",) in calls[0].batched
    half = calls[0].select(range(6))
    torch.testing.assert_close(
        teacher_prediction(pipe, half, teacher), half.target, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", GATHERS)
def test_samples_of_different_trajectories_and_timesteps_share_a_call(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    _, first, teacher = captured(pipe, PROMPTS[:2], seed=1)
    _, second, _ = captured(pipe, PROMPTS[2:5], teacher, seed=2)
    assert {samples.signature for samples in first} == {samples.signature for samples in second}
    mixed = collate([(second[2], 1), (first[0], 0), (first[1], 1), (second[0], 2)])
    torch.testing.assert_close(
        teacher_prediction(pipe, mixed, teacher), mixed.target, rtol=1e-5, atol=1e-5
    )


def test_the_guard_runs_once_for_each_set_of_shapes() -> None:
    pipe, teacher = tiny_sd3(), TeacherEmbeddings()
    layouts: dict[Any, Any] = {}
    encoded: list[int] = []  # by CLIP, which every run of the pipeline calls
    pipe.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    for prompts, steps, shapes in [
        (PROMPTS[:2], 3, 1), (PROMPTS[2:4], 3, 1), (PROMPTS[:3], 3, 2), (PROMPTS[:2], 2, 3),
    ]:  # fmt: skip
        before = len(encoded)
        kwargs = call_kwargs(pipe) | {"num_inference_steps": steps}
        trajectory = capture(
            pipe, prompts, pipeline_kwargs=kwargs, encode=teacher.encode, layouts=layouts
        )
        runs = (len(encoded) - before) // 2  # for the prompts and the negative prompts
        assert runs == (1 if prompts == PROMPTS[2:4] else 3)
        assert len(layouts) == shapes
        assert_replays(pipe, split_trajectory(trajectory, teacher), teacher)


@pytest.mark.parametrize("name", GATHERS)
def test_both_routes_give_the_same_loss_and_gradients(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    student = tiny_student(pipe)
    trajectory, calls, teacher = captured(pipe, PROMPTS[:2])
    call = 2  # with a prompt in it: in Chroma, every other call is the negative one
    samples, loss = calls[call], VelocityLoss()
    embeddings = encode_prompts(student, teacher, samples.prompts, CPU)
    replayed = loss(predict(pipe, samples, embeddings), samples.target)
    gradients = torch.autograd.grad(replayed.mean(), list(student.parameters()))

    through_pipeline = predict_through_pipeline(
        pipe, trajectory, lambda ids, mask: call_encoder(student, ids, mask), {call}
    )
    assert list(through_pipeline) == [call]
    expected = loss(through_pipeline[call], trajectory.denoiser_calls[call].target)
    torch.testing.assert_close(replayed, expected, rtol=1e-5, atol=1e-8)
    for mine, theirs in zip(
        gradients, torch.autograd.grad(expected.mean(), list(student.parameters())), strict=True
    ):
        assert theirs.norm() > 0
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


class ScalesEmbeddings(FluxPipeline):
    def _get_t5_prompt_embeds(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super()._get_t5_prompt_embeds(*args, **kwargs) * 1.5


class LeaksIntoPooled(FluxPipeline):
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        embeddings, pooled, text_ids = super().encode_prompt(*args, **kwargs)
        return embeddings, pooled + embeddings.mean(), text_ids


@pytest.mark.parametrize(
    "cls, reason",
    [
        (ScalesEmbeddings, "no token embedding of T5 reaches its denoiser"),
        (LeaksIntoPooled, "pooled_projections depends on T5's output"),
    ],
)
def test_a_pipeline_that_changes_the_embeddings_is_detected(
    cls: type[FluxPipeline], reason: str, caplog: Any
) -> None:
    pipe = cls(**tiny_flux().components)
    layouts: dict[Any, Any] = {}
    expected = plain_run(pipe, PROMPTS[:2])
    with caplog.at_level(logging.INFO, "t5slim"):
        for _ in range(2):  # found out, then known
            trajectory = capture(
                pipe, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe), layouts=layouts
            )
            assert reason in trajectory.reason
            targets = [call.target for call in trajectory.denoiser_calls]
            assert all(map(torch.equal, targets, (prediction for _, prediction in expected)))
        calls = split_trajectory(trajectory, TeacherEmbeddings())
    assert reason in caplog.text and [call.index for call in calls] == [0, 1, 2]


def test_zero_pooled_zeroes_what_teacher_and_student_see() -> None:
    pipe = tiny_flux()
    trajectory, calls, teacher = captured(pipe, PROMPTS[:2], zero_pooled=True)
    assert not any(call.kwargs["pooled_projections"].any() for call in trajectory.denoiser_calls)
    assert_replays(pipe, calls, teacher)
    plain, _, _ = captured(pipe, PROMPTS[:2])
    assert not torch.equal(plain.denoiser_calls[0].target, trajectory.denoiser_calls[0].target)


def test_autocast_reaches_the_denoiser_alone() -> None:
    pipe = tiny_flux()
    plain = capture(pipe, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe))
    trajectory = capture(
        pipe, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe), autocast_dtype=torch.bfloat16
    )
    assert torch.equal(trajectory.encoder_calls[0].embeddings, plain.encoder_calls[0].embeddings)
    for call in trajectory.denoiser_calls:  # bfloat16 would spread from the prediction to x_t
        assert call.kwargs["hidden_states"].dtype == call.target.dtype == torch.float32
    exact, rounded = plain.denoiser_calls[0].target, trajectory.denoiser_calls[0].target
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


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
    captured(pipe, PROMPTS[:2])
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
    trajectory = capture(pipe, PROMPTS[:1], pipeline_kwargs=call_kwargs(pipe))
    trajectory.denoiser_calls[1].kwargs["hidden_states"].add_(0.1)
    student = tiny_student(pipe)
    with pytest.raises(DistillError, match="another hidden_states"):
        predict_through_pipeline(
            pipe, trajectory, lambda ids, mask: call_encoder(student, ids, mask), {0}
        )
