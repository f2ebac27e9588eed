"""Trajectories of real pipelines, captured and replayed."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from helpers.training import calls_of, losses, pipeline_and_kwargs, run
from helpers.trajectories import CPU, assert_replays, captured
from tiny import MAX_TOKENS, PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_sd3, tiny_student
from zoo import CASES
from zoo.case import image, images

from t5slim.distill import cache_teacher, capture, velocity_gap
from t5slim.distill.objective import velocity_loss
from t5slim.distill.pipeline import autocast_denoisers, call_encoder
from t5slim.distill.replay import collate, predictions, split_trajectory
from t5slim.distill.teacher import TeacherEmbeddings
from t5slim.errors import DistillError

GATHERS = ["flux", "sd3", "chroma", "pixart_sigma", "ltx"]


@pytest.mark.parametrize("name", [*GATHERS, "stable_audio"])
def test_capture_is_the_pipelines_own_run(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    prompts = [*PROMPTS, "a star", "a sign"]  # the teacher encodes batches of eight
    calls, generator = calls_of(pipe.transformer), torch.Generator().manual_seed(0)
    pipe(prompts, generator=generator, output_type="latent", **call_kwargs(pipe))
    expected = [*calls]
    trajectory = capture(pipe, prompts, pipeline_kwargs=call_kwargs(pipe))
    for call, (kwargs, (prediction, *_)) in zip(trajectory.denoiser_calls, expected, strict=True):
        assert torch.equal(call.target, prediction)
        for argument, tensor in kwargs.items():
            assert not torch.is_tensor(tensor) or torch.equal(call.kwargs[argument], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replay_in_half_precision_without_the_pooled_vector(dtype: torch.dtype) -> None:
    pipe = tiny_sd3().to(dtype)
    plain, _, _ = captured(pipe, PROMPTS[:2])
    trajectory, calls, teacher = captured(pipe, PROMPTS[:2], zero_pooled=True)
    assert not any(call.kwargs["pooled_projections"].any() for call in trajectory.denoiser_calls)
    assert calls[0].target.dtype == dtype
    assert not torch.equal(plain.denoiser_calls[0].target, calls[0].target)
    assert_replays(pipe, calls, teacher)


def test_a_batch_as_long_as_the_text_is_not_mistaken_for_it(pipe: Any) -> None:
    # txt_ids is (tokens, 3): with as many prompts as tokens, its length is the batch's.
    _, calls, teacher = captured(pipe, PROMPTS * (MAX_TOKENS // len(PROMPTS)))
    assert len(calls[0]) == MAX_TOKENS
    assert ("txt_ids",) not in calls[0].batched and ("guidance",) in calls[0].batched
    half = collate([(calls[0], i) for i in range(6)])
    assert_replays(pipe, [half], teacher, 1e-5)


@pytest.mark.parametrize("name", GATHERS)
def test_samples_of_different_trajectories_and_timesteps_share_a_call(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    _, first, teacher = captured(pipe, PROMPTS[:2], seed=1)
    _, second, _ = captured(pipe, PROMPTS[2:5], teacher, seed=2)
    assert {samples.signature for samples in first} == {samples.signature for samples in second}
    mixed = collate([(second[2], 1), (first[0], 0), (first[1], 1), (second[0], 2)])
    assert_replays(pipe, [mixed], teacher, 1e-5)


def test_the_guard_runs_once_for_each_set_of_shapes() -> None:
    pipe, teacher = tiny_sd3(), TeacherEmbeddings()
    layouts: dict[Any, Any] = {}
    encoded = calls_of(pipe.text_encoder)  # CLIP, which every run of the pipeline calls
    for prompts, steps, shapes in [
        (PROMPTS[:2], 3, 1), (PROMPTS[2:4], 3, 1), (PROMPTS[:3], 3, 2), (PROMPTS[:2], 2, 3),
    ]:  # fmt: skip
        before = len(encoded)
        kwargs = call_kwargs(pipe, steps)
        _, calls, _ = captured(pipe, prompts, teacher, pipeline_kwargs=kwargs, layouts=layouts)
        runs = (len(encoded) - before) // 2  # for the prompts and the negative prompts
        assert runs == (1 if prompts == PROMPTS[2:4] else 3)
        assert len(layouts) == shapes
        assert_replays(pipe, calls, teacher)


@pytest.mark.parametrize("name", [*GATHERS, "IFPipeline", "Kandinsky3Pipeline"])
def test_both_routes_give_the_same_loss_and_gradients(name: str) -> None:
    """The last two decorate `encode_prompt` with `torch.no_grad`."""
    pipe, kwargs = pipeline_and_kwargs(name)
    student = tiny_student(pipe)
    trajectory, calls, teacher = captured(pipe, PROMPTS[:2], pipeline_kwargs=kwargs)
    whole = split_trajectory(replace(trajectory, batch_dims=None))
    found = []
    for route in (calls, whole):
        call = route[-2]  # with a prompt in it: in Chroma, every other call is the negative one
        (prediction,) = predictions(
            pipe, [call], lambda prompts: call_encoder(student, *teacher.tokens(prompts, CPU))
        )
        losses = velocity_loss(prediction, call.target)
        found.append((losses, torch.autograd.grad(losses.mean(), list(student.parameters()))))
    (one, gradients), (other, others) = found
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    for gradient, expected in zip(gradients, others, strict=True):
        assert expected.norm() > 0
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()
    assert "encode_prompt" not in vars(pipe)


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
def test_changed_embeddings_are_detected(cls: type[FluxPipeline], reason: str) -> None:
    pipe = cls(**tiny_flux().components)
    layouts: dict[Any, Any] = {}
    for _ in range(2):  # found out, then known
        trajectory, calls, teacher = captured(pipe, PROMPTS[:2], layouts=layouts)
        assert reason in trajectory.reason
        assert_replays(pipe, calls, teacher)
    assert [call.index for call in calls] == [0, 1, 2]


def test_autocast_reaches_the_denoiser_alone(pipe: Any) -> None:
    plain, _, _ = captured(pipe, PROMPTS[:2])
    with autocast_denoisers(pipe, torch.bfloat16):
        trajectory, _, _ = captured(pipe, PROMPTS[:2])
    exact, rounded = plain.denoiser_calls[0], trajectory.denoiser_calls[0]
    text = "encoder_hidden_states"
    assert torch.equal(rounded.kwargs[text], exact.kwargs[text])
    for call in trajectory.denoiser_calls:  # bfloat16 would spread from the prediction to x_t
        assert call.kwargs["hidden_states"].dtype == call.target.dtype == torch.float32
    assert 0 < (rounded.target - exact.target).norm() < 0.05 * exact.target.norm()


def test_capture_leaves_the_pipeline_as_it_was(pipe: Any) -> None:
    pipe.set_progress_bar_config(disable=True, desc="mine")
    pipe(PROMPTS[0], **call_kwargs(pipe))  # which leaves attributes of its own
    attributes, level = set(vars(pipe)), logging.getLogger("diffusers").level

    def fail(*args: Any) -> None:
        raise error

    handle = pipe.transformer.proj_out.register_forward_hook(fail)
    for error in (torch.OutOfMemoryError("x"), KeyboardInterrupt(), DistillError("x")):
        with pytest.raises(type(error)) as raised:
            captured(pipe, PROMPTS[:2])
        assert raised.value is error
    error = RuntimeError("a kernel failed")
    named = r"FluxPipeline failed on a batch of 2.*'height'.*RuntimeError: a kernel failed"
    with pytest.raises(DistillError, match=named) as raised:
        captured(pipe, PROMPTS[:2])
    assert raised.value.__cause__ is error
    handle.remove()
    for _ in range(2):  # after a failure and a success
        assert set(vars(pipe)) == attributes
        assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
        assert logging.getLogger("diffusers").level == level
        for module in (pipe.transformer, pipe.text_encoder_2):
            assert "forward" not in vars(module)
        captured(pipe, PROMPTS[:2])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"hight": 16}, "may not hold 'hight'; expected, of FluxPipeline: .*, height, "),
        ({"prompt_embeds": torch.zeros(1)}, "may not hold 'prompt_embeds'"),
        ({"num_images_per_prompt": 2}, "may not hold 'num_images_per_prompt'.* take more seeds"),
        ({"height": "16"}, "FluxPipeline failed on a batch of 1.*TypeError"),
    ],
)
def test_bad_pipeline_kwargs(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        capture(tiny_flux(), PROMPTS[:1], pipeline_kwargs=kwargs)


GRIDS = [[[image(0), image(1)], [image(2), None]]]


@pytest.mark.parametrize(
    ("name", "prompts", "changes", "message"),
    [
        ("IFImg2ImgPipeline", 2, {"image": torch.rand(2, 3, 16, 16)}, ""),
        ("VisualClozeGenerationPipeline", 1, {"image": GRIDS}, ""),
        ("VisualClozeGenerationPipeline", 1, {"image": GRIDS[0]}, "one for each prompt"),
        ("LTXImageToVideoPipeline", 2, {"image": images(2, 32)}, ""),
        ("LTXImageToVideoPipeline", 2, {"image": image(size=32)}, "one for each prompt"),
        ("CogVideoXPipeline", 2, {"num_videos_per_prompt": 2}, "may not hold 'num_videos_per_"),
    ],
)
def test_images_go_with_prompts(name: str, prompts: int, changes: Any, message: str) -> None:
    case = CASES[name]
    pipe, settings = case.pipe(), {"max_steps": 1, "batch_size": prompts}
    arguments: Any = {"prompts": PROMPTS[:prompts], "pipeline_kwargs": case.call() | changes}
    if not message:
        assert velocity_gap(pipe, tiny_student(pipe), batch_size=prompts, **arguments) > 0
        assert losses(run(pipe, **settings, **arguments))[0] > 0
        return
    with pytest.raises(DistillError, match=f"(?s){message}") as raised:
        run(pipe, **settings, **arguments)
    assert "scheduler" not in str(raised.value)


def test_annotations_need_no_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_flux()
    monkeypatch.setitem(FluxPipeline.__init__.__annotations__, "vae", "OnlyForTypeCheckers")
    cache_teacher(pipe, PROMPTS[:2], tmp_path, pipeline_kwargs=call_kwargs(pipe))
    pipe.transformer = None
    cache_teacher(pipe, PROMPTS[2:], tmp_path, pipeline_kwargs=call_kwargs(pipe))


def test_a_random_scheduler_without_the_generator_is_refused() -> None:
    pipe = TINY_PIPELINES["stable_audio"]()
    trajectory, calls, teacher = captured(pipe, PROMPTS[:1])
    trajectory.denoiser_calls[1].kwargs["hidden_states"].add_(0.1)
    student = tiny_student(pipe)
    with pytest.raises(DistillError, match="another hidden_states"):
        next(predictions(pipe, calls, lambda i: call_encoder(student, *teacher.tokens(i, CPU))))
