"""Distillation as users start it, on real pipelines of tiny size."""

import math
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ParallelismConfig
from diffusers import FluxImg2ImgPipeline
from helpers.training import (
    QUICK,
    assert_same,
    calls_of,
    history_of,
    losses,
    pipeline_and_kwargs,
    quick,
    run,
    weights,
)
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_student

from t5slim import SlimT5Encoder, patch_pipeline
from t5slim.distill import DistillConfig, TrajectoryReservoir, train, trainer, velocity_gap
from t5slim.errors import DistillError, T5SlimError


def modules_of(pipe: Any) -> torch.nn.ModuleDict:
    parts = {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return torch.nn.ModuleDict(parts)


@pytest.mark.parametrize("name", ["pixart_sigma", "stable_audio", "BriaPipeline"])
def test_training_closes_the_gap(name: str, caplog: Any) -> None:
    """By copies of the embeddings, through the pipeline, and of prompts without padding."""
    pipe, kwargs = pipeline_and_kwargs(name, steps=2)
    student = tiny_student(pipe)
    prompts = PROMPTS[:2]  # measured on them, too: does it learn, not does it generalise
    objective = {"velocity": 1, "embedding": 10} if name == "BriaPipeline" else "velocity"
    before = velocity_gap(pipe, student, prompts, pipeline_kwargs=kwargs)
    result = run(
        pipe, student, prompts, max_steps=60, pipeline_kwargs=kwargs, eval_prompts=prompts,
        objective=objective,
    )  # fmt: skip
    assert result.gap < 0.6 * before
    assert result.gap < 0.9 and "empty prompt" not in caplog.text
    after = velocity_gap(pipe, result.student, prompts, pipeline_kwargs=kwargs)
    assert result.gap == pytest.approx(after, rel=1e-4)
    assert result.student is student and not student.training


@pytest.mark.parametrize("factor", [30, math.nan])
def test_a_student_that_says_nothing_is_warned_of(pipe: Any, factor: float, caplog: Any) -> None:
    """At its end, by its gap: more than 0.9, or NaN."""
    student = tiny_student(pipe)
    student.register_forward_hook(
        lambda module, _, output: output if module.training else (output[0] * factor,)
    )
    result = run(pipe, student, PROMPTS, eval_prompts=PROMPTS[4:], max_steps=1)
    assert not result.gap <= 0.9
    assert "hardly more than an empty prompt" in caplog.text and "from_t5" in caplog.text


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_changes_nothing(mode: Any) -> None:
    pipe = FluxImg2ImgPipeline.from_pipe(tiny_flux())

    def trained(mode: Any) -> dict[str, torch.Tensor]:
        student = tiny_student(pipe)
        with mode():
            kwargs = call_kwargs(tiny_flux()) | {"image": torch.ones(1, 3, 16, 16) / 2}
            return weights(run(pipe, student, pipeline_kwargs=kwargs).student)

    assert_same(trained(mode), trained(torch.enable_grad))


def test_an_image_for_each_prompt_of_a_batch() -> None:
    pipe, images = FluxImg2ImgPipeline.from_pipe(tiny_flux()), torch.rand(2, 3, 16, 16)
    kwargs = call_kwargs(tiny_flux()) | {"image": images}
    common = {"batch_size": 2, "objective": {"velocity": 1, "embedding": 1}, "max_steps": 12}
    result = run(pipe, pipeline_kwargs=kwargs, eval_prompts=PROMPTS[:2], **common)
    assert result.steps == 12 and result.gap > 0 and math.isfinite(result.loss)


def test_embedding_matching_never_calls_the_denoiser() -> None:
    pipe = TINY_PIPELINES["chroma"]()
    calls = calls_of(pipe.transformer)
    result = run(pipe, objective="embedding", max_steps=40, eval_every=5)
    assert not calls and result.teacher_samples == result.student_samples == 0
    assert losses(result)[-1] < 0.7 * losses(result)[0]


def test_only_the_student_is_trained_and_the_pipeline_is_given_back_as_it_was() -> None:
    pipe = tiny_flux()
    frozen = pipe.transformer.proj_out.weight.requires_grad_(False)
    kept = pipe.transformer.x_embedder.weight
    kept.grad = torch.ones_like(kept)  # of somebody's own training: neither clipped nor zeroed
    pipe.vae.train()
    modules = modules_of(pipe)
    before = weights(modules)
    pipe(PROMPTS[0], **call_kwargs(pipe))  # which leaves attributes of its own
    attributes, student = set(vars(pipe)), tiny_student(pipe)
    untrained, random_state = weights(student), torch.get_rng_state()
    run(pipe, student, optimizer=lambda weights: torch.optim.AdamW(weights, weight_decay=0.0))
    trained = student.state_dict()
    assert not [name for name in trained if torch.equal(trained[name], untrained[name])]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(vars(pipe)) == attributes
    assert_same(modules.state_dict(), before)
    assert not [module for module in modules.values() if "forward" in vars(module)]
    assert [p for p in modules.parameters() if not p.requires_grad] == [frozen]
    assert [p for p in modules.parameters() if p.grad is not None] == [kept]
    assert bool((kept.grad == 1).all())
    assert pipe.vae.training and pipe.vae.encoder.training and not pipe.transformer.training
    assert all(p.grad is None and p.requires_grad for p in student.parameters())
    assert "forward" not in vars(student)


def test_a_new_student_starts_from_the_teacher(pipe: Any) -> None:
    """At so small a learning rate, nothing is learned."""
    settings: Any = {"objective": "embedding", "max_steps": 16, "learning_rate": 1e-12}
    student = tiny_student(pipe, dropout_rate=0.0)
    untrained = run(pipe, student, **settings)
    started = run(pipe, student.config, **settings)
    assert started.loss < 0.5 * untrained.loss and started.student is not student
    assert started.student.config is not student.config


def test_the_seed_decides_and_nothing_that_was_drawn_before() -> None:
    def student(seed: int, start: Any = None) -> dict[str, torch.Tensor]:
        return weights(run(tiny_flux(), start, seed=seed, max_steps=2).student)

    new = tiny_student(tiny_flux()).config
    assert_same(student(3, new), student(3, new))
    one, same, other = map(student, (-1, -1, 2**31 - 1))
    assert_same(one, same)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_constant_learning_rate_warms_up_too() -> None:
    changes = {"learning_rate": 1.0, "lr_schedule": "constant", "eval_every": 1, "max_steps": 4}
    result = run(tiny_flux(), objective="embedding", **changes)
    assert [entry["learning_rate"] for entry in result.history] == [0, 0.5, 1, 1]


def test_the_users_optimizer_steps_with_clipped_gradients(pipe: Any) -> None:
    student = tiny_student(pipe)
    before = weights(student)
    result = run(
        pipe, student, optimizer=partial(torch.optim.SGD, lr=30.0), max_steps=1, warmup_steps=0,
        ema_decay=0.0, lr_schedule="constant", max_grad_norm=1e-4,
    )  # fmt: skip
    moved = [(p - before[name]).double().square().sum() for name, p in student.named_parameters()]
    assert sum(moved).sqrt().item() == pytest.approx(3e-3, rel=1e-2)  # learning rate times norm
    assert result.history[-1]["learning_rate"] == 30.0


@pytest.mark.parametrize(
    "precision, dtype, own",
    [
        ("no", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("fp16", torch.float16, torch.float32),
        ("fp16", torch.float16, torch.float16),
    ],
)
def test_master_weights_are_float32(precision: str, dtype: torch.dtype, own: torch.dtype) -> None:
    """Whatever the dtypes of the pipeline and of the student, which returns."""
    pipe = tiny_flux().to(own)
    student = tiny_student(pipe).to(torch.bfloat16)
    before = weights(student)
    layers = (student.final_projection[0], pipe.transformer.context_embedder)
    seen: set[Any] = set()

    def note(layer: Any, args: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            seen.update((layer, p.dtype, output.dtype) for p in student.parameters())

    for layer in layers:
        layer.register_forward_hook(note)
    result = run(pipe, student, mixed_precision=precision, max_steps=6)
    assert seen == {(layer, torch.float32, dtype) for layer in layers}
    assert result.skipped < 6 and math.isfinite(result.loss)
    assert not torch.equal(student.final_projection[0].weight, before["final_projection.0.weight"])
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert student(torch.tensor([[5, 1]]))[0].dtype == torch.bfloat16


def test_gradient_checkpointing_learns_the_same(pipe: Any) -> None:
    forwards: list[int] = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    plain = run(pipe, max_steps=4, eval_every=1)
    calls = len(forwards)
    again = run(pipe, max_steps=4, eval_every=1, gradient_checkpointing=True)
    assert losses(again) == pytest.approx(losses(plain), rel=1e-6)
    assert len(forwards) == 2 * calls + 4 and not pipe.transformer.is_gradient_checkpointing


def poison(pipe: Any, updates: range) -> None:
    """Let the denoiser predict NaN in some updates of one batch."""
    calls = count()

    def hook(module: Any, args: Any, output: Any) -> Any:
        poisoned = torch.is_grad_enabled() and next(calls) in updates
        return (output[0] * torch.nan,) if poisoned else output

    pipe.transformer.register_forward_hook(hook)


@pytest.mark.filterwarnings("error::UserWarning")
def test_gradients_that_are_not_finite_are_skipped(pipe: Any) -> None:
    poison(pipe, range(2))
    result = run(pipe, max_steps=5, eval_every=1)
    assert (result.steps, result.skipped) == (5, 2)
    assert [e["skipped"] for e in result.history] == [1, 2, 2, 2, 2]
    assert [math.isfinite(loss) for loss in losses(result)] == [False, False, True, True, True]
    # The schedule waits.
    assert [e["learning_rate"] for e in result.history[:4]] == [0, 0, 0, QUICK["learning_rate"] / 2]


def test_ten_in_a_row_end_the_run_with_the_last_good_weights(tmp_path: Path) -> None:
    pipe = tiny_flux()
    student = tiny_student(pipe)
    poison(pipe, range(2, 99))
    with pytest.raises(DistillError, match="10 successive updates, up to number 12, are not"):
        run(pipe, student, output_dir=tmp_path, max_steps=14, eval_every=2)
    assert len(history_of(tmp_path)) == 5
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert not student.training and all(p.requires_grad for p in pipe.transformer.parameters())
    SlimT5Encoder.from_pretrained(tmp_path)


def test_the_papers_order_is_consecutive_along_one_trajectory() -> None:
    pipe, config = tiny_flux(), quick(**vars(DistillConfig.paper(batch_size=4)))
    reservoir = TrajectoryReservoir(pipe, PROMPTS, config, pipeline_kwargs=call_kwargs(pipe))
    samples: list[Any] = [batch for step in range(6) for batch in reservoir.batches(step)]
    times = [call.batched["timestep",][0].item() for call in samples]
    assert times[:3] == sorted(times[:3], reverse=True) == times[3:]
    assert samples[0].prompts == samples[2].prompts != samples[3].prompts
    guidance = {call.batched["guidance",][0].item() for call in samples}
    assert guidance <= set(config.guidance_scales)
    assert not samples[0].batched["pooled_projections",].any()
    assert reservoir.teacher_samples == reservoir.student_samples == 24


def test_a_sample_is_drawn_as_often_as_reuse_says() -> None:
    result = run(tiny_flux(), reuse=3.0, max_steps=18)
    assert (result.teacher_samples, result.student_samples) == (18 * 4 / 3, 18 * 4)


BAD_INPUT: list[tuple[dict[str, Any], str]] = [
    ({"prompts": []}, "list holds no prompts; expected"),
    ({"eval_prompts": []}, "list holds no prompts"),
    ({"student": "google/flan-t5-base"}, "student is a str"),
    ({"student": [None, None]}, "student is a list; expected one SlimT5Encoder"),
    ({"student": {"project_out_dim": 48}}, "48"),
    ({"student": {"vocab_size": 1024}}, "vocabulary"),
    ({"trackers": ("mlflow",)}, "trackers: mlflow; expected .* installed"),
    ({"samples_every": 2}, "samples_every needs eval_prompts.*an output_dir"),
    ({"spoil": lambda pipe, student, out: patch_pipeline(pipe, student)}, "shares its weights"),
    ({"spoil": lambda pipe, student, out: (out / "config.json").touch()}, "another run or model"),
    ({"spoil": lambda pipe, *_: setattr(pipe, "text_encoder_2", None)}, "is None: load it"),
    ({"spoil": lambda pipe, *_: pipe.transformer.half()}, "float16"),
    ({"spoil": lambda _, student, out: student.requires_grad_(False)}, "no weights to train"),
    ({"output_dir": __file__}, "test_train.py.* can't be made a folder: .*exists"),
    ({"output_dir": "a\0b"}, "can't be made a folder: .*null"),
    ({"push_to_hub": "a b", "output_dir": None}, "push_to_hub: 'a b'"),
]


@pytest.mark.parametrize("arguments, message", BAD_INPUT, ids=[message for _, message in BAD_INPUT])
def test_bad_input_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Before anything happens."""
    pipe, arguments = tiny_flux(), {"output_dir": tmp_path} | arguments
    student = arguments.pop("student", {})
    student = tiny_student(pipe, **student) if isinstance(student, dict) else student
    arguments.pop("spoil", lambda *_: None)(pipe, student, tmp_path)
    files, before = [*tmp_path.iterdir()], weights(modules_of(pipe))
    calls = calls_of(pipe.transformer)
    with pytest.raises(T5SlimError, match=message):
        run(pipe, student, **arguments)
    assert not calls and [*tmp_path.iterdir()] == files
    assert_same(weights(modules_of(pipe)), before)


@pytest.mark.parametrize("config", [{"max_steps": 3}, "config.yaml"])
def test_a_config_of_another_type_is_refused(config: Any) -> None:
    with pytest.raises(T5SlimError, match=r"config is .*; expected DistillConfig"):
        train(tiny_flux(), tiny_student(tiny_flux()), PROMPTS, config)


@pytest.mark.parametrize("which", ["student", "transformer"])
def test_what_was_made_in_inference_mode_is_refused(which: str) -> None:
    with torch.inference_mode():
        made = tiny_flux()
    pipe = made if which != "student" else tiny_flux()
    with torch.inference_mode(which == "student"):
        student = tiny_student(pipe)
    part = which if which == "student" else "vae"  # the first of its components
    with pytest.raises(DistillError, match=f"The {part} was made under torch.inference_mode"):
        run(pipe, student)


def test_home_and_progress_bars_are_the_environments(
    monkeypatch: Any, tmp_path: Path, capfd: Any
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    # As TQDM_DISABLE=1 does, when tqdm is imported.
    monkeypatch.setattr(trainer, "tqdm", partial(trainer.tqdm, disable=True))
    assert run(tiny_flux(), output_dir="~/run").output_dir == tmp_path / "run"
    assert "distil" not in capfd.readouterr().err
    SlimT5Encoder.from_pretrained(tmp_path / "run")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Accelerate reads the environment once for a process: here, once for a test."""
    AcceleratorState._reset_state(True)
    yield monkeypatch
    AcceleratorState._reset_state(True)


OTHER_LAUNCHES = {"MIXED_PRECISION": "bf16", "DYNAMO_BACKEND": "INDUCTOR"}
OTHER_LAUNCHES |= {"USE_FSDP": "true", "USE_PARALLELISM_CONFIG": "true"}


@pytest.mark.parametrize("variable, value", OTHER_LAUNCHES.items())
def test_a_launch_with_other_settings_is_refused(
    variable: str, value: str, environment: Any
) -> None:
    environment.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(DistillError, match=f"{variable}.*{value.lower()}.*expected '(no|false)'"):
        run(tiny_flux())
    assert not AcceleratorState._shared_state  # which would refuse, or compile, a second try


EARLIER: list[dict[str, Any]] = [{"mixed_precision": "fp16"}, {"dynamo_backend": "eager"}]
EARLIER += [{"parallelism_config": ParallelismConfig()}]


@pytest.mark.parametrize("settings", EARLIER, ids=str)
def test_an_earlier_accelerator_changes_nothing(settings: Any, environment: Any) -> None:
    changes = {"gradient_accumulation_steps": 2, "batch_size": 2, "mixed_precision": "bf16"}
    before = run(tiny_flux(), **changes)
    AcceleratorState._reset_state(True)
    environment.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    with suppress(ValueError):  # of one process, after it was noted in the state
        Accelerator(cpu=True, gradient_accumulation_steps=4, **settings)
    assert AcceleratorState._shared_state
    after = run(tiny_flux(), **changes)
    assert_same(weights(after.student), weights(before.student))


def test_a_launch_with_equal_settings_changes_nothing(environment: pytest.MonkeyPatch) -> None:
    changes = {"gradient_accumulation_steps": 2, "batch_size": 2, "mixed_precision": "bf16"}
    loss = run(tiny_flux(), **changes).loss
    environment.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    environment.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    environment.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # which the config decides
    AcceleratorState._reset_state(True)
    assert run(tiny_flux(), **changes).loss == loss
