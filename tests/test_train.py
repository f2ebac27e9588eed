"""Distillation as users start it, on real pipelines of tiny size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers.training import assert_same, calls_of, losses, pipeline_and_kwargs, quick, run, weights
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_student

from t5slim import SlimT5Encoder, patch_pipeline
from t5slim.distill import DistillConfig, Objective, TrajectoryReservoir, train, velocity_gap
from t5slim.distill.replay import Samples
from t5slim.errors import DistillError, IncompatibleStudentError, NoT5SlotError


def modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    return {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}


# --- what is learned -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pixart_sigma", "stable_audio", "bria"])
def test_training_closes_the_gap(name: str) -> None:
    """By copies of the embeddings, through the pipeline, and of prompts without padding."""
    pipe, kwargs = pipeline_and_kwargs(name, steps=2)
    student = tiny_student(pipe)
    prompts = PROMPTS[:2]  # measured on them, too: does it learn, not does it generalise
    objective = {"velocity": 1, "embedding": 10} if name == "bria" else "velocity"
    before = velocity_gap(pipe, student, prompts, pipeline_kwargs=kwargs)
    result = run(
        pipe, student, prompts, max_steps=60, pipeline_kwargs=kwargs, eval_prompts=prompts,
        objective=objective,
    )  # fmt: skip
    assert result.gap < 0.6 * before
    after = velocity_gap(pipe, result.student, prompts, pipeline_kwargs=kwargs)
    assert result.gap == pytest.approx(after, rel=1e-4)
    assert result.student is student and not student.training


def test_embedding_matching_never_calls_the_denoiser() -> None:
    pipe = TINY_PIPELINES["chroma"]()
    calls = calls_of(pipe.transformer)
    result = run(pipe, objective="embedding", max_steps=40, eval_every=5)
    assert not calls and result.teacher_samples == result.student_samples == 0
    assert losses(result)[-1] < 0.7 * losses(result)[0]


def test_a_loop_of_ones_own_learns_what_train_learns() -> None:
    pipe = tiny_flux()
    config = quick(
        max_steps=8, warmup_steps=0, lr_schedule="constant", ema_decay=0.0, eval_every=1,
        gradient_accumulation_steps=2, objective={"velocity": 1, "embedding": 10},
    )  # fmt: skip
    students = [tiny_student(pipe, dropout_rate=0.0) for _ in range(2)]
    kwargs = call_kwargs(pipe)
    result = train(pipe, students[0], PROMPTS, config, pipeline_kwargs=kwargs)

    student = students[1].train()
    reservoir = TrajectoryReservoir(pipe, PROMPTS, config, pipeline_kwargs=kwargs)
    objective = Objective(pipe, reservoir.teacher, config)
    optimizer = torch.optim.AdamW(student.parameters(), config.learning_rate, weight_decay=1e-3)
    own: list[float] = []
    for step in range(config.max_steps):
        weights = config.weights_at(step)
        batches = list(reservoir.batches(step, denoiser="velocity" in weights))
        terms = [objective(student, batch, weights) / len(batches) for batch in batches]
        sum(terms).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        own.append(sum(terms).item())

    assert own == pytest.approx(losses(result), rel=1e-5)
    for one, other in zip(students[0].parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_only_the_student_is_trained_and_the_pipeline_is_given_back_as_it_was() -> None:
    pipe = tiny_flux()
    frozen = pipe.transformer.proj_out.weight.requires_grad_(False)
    kept = pipe.transformer.x_embedder.weight
    kept.grad = torch.ones_like(kept)  # of somebody's own training: neither clipped nor zeroed
    pipe.vae.train()
    modules = modules_of(pipe)
    before = {name: weights(module) for name, module in modules.items()}
    pipe(PROMPTS[0], **call_kwargs(pipe))  # which leaves attributes of its own
    attributes = set(vars(pipe))
    student = tiny_student(pipe)
    untrained = weights(student)
    grads: list[bool] = []
    pipe.transformer.register_forward_hook(
        lambda module, *_: grads.append(any(p.requires_grad for p in module.parameters()))
    )
    random_state = torch.get_rng_state()

    run(pipe, student, weight_decay=0.0)

    trained = student.state_dict()
    assert not [name for name in trained if torch.equal(trained[name], untrained[name])]
    assert grads and not any(grads)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(vars(pipe)) == attributes
    for name, module in modules.items():
        assert_same(module.state_dict(), before[name])
        assert "forward" not in vars(module)
    parameters = [p for module in modules.values() for p in module.parameters()]
    assert [p for p in parameters if not p.requires_grad] == [frozen]
    assert [p for p in parameters if p.grad is not None] == [kept] and bool((kept.grad == 1).all())
    assert pipe.vae.training and pipe.vae.encoder.training and not pipe.transformer.training
    assert all(p.grad is None and p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("seed", [0, -1, 2**31 - 1])
def test_same_seed_same_student(seed: int) -> None:
    students = []
    for own in (seed, seed, 7):
        pipe = tiny_flux()
        torch.rand(own % 5)  # what was drawn before doesn't matter
        students.append(weights(run(pipe, seed=own).student))
    assert_same(students[0], students[1])
    assert not all(torch.equal(students[0][name], students[2][name]) for name in students[0])


def test_prompt_dropout_is_a_share_of_the_prompts() -> None:
    pipe = tiny_flux()
    prompts = [f"a star {i}" for i in range(400)]
    empty = pipe.tokenizer_2([""], padding="max_length", return_tensors="pt").input_ids
    config = quick(batch_size=400, reservoir_size=400, prompt_dropout=0.3)
    reservoir = TrajectoryReservoir(pipe, prompts, config, pipeline_kwargs=call_kwargs(pipe))
    (batch,) = reservoir.batches(0, denoiser=False)
    ids, _ = reservoir.teacher.tokens(batch.prompts, torch.device("cpu"))
    assert (ids == empty).all(1).float().mean().item() == pytest.approx(0.3, abs=0.07)


# --- updates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, *(0.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(4))]),
    ],
)
def test_learning_rate_warms_up_and_falls(schedule: Any, expected: list[float]) -> None:
    result = run(
        tiny_flux(), objective="embedding", max_steps=6, eval_every=1, learning_rate=1.0,
        lr_schedule=schedule,
    )  # fmt: skip
    assert [e["learning_rate"] for e in result.history] == pytest.approx(expected)


def test_the_users_optimizer_steps_with_clipped_gradients() -> None:
    pipe = tiny_flux()
    student = tiny_student(pipe)
    before = weights(student)
    result = run(
        pipe, student, optimizer=partial(torch.optim.SGD, lr=30.0), max_steps=1, warmup_steps=0,
        ema_decay=0.0, lr_schedule="constant", max_grad_norm=1e-4,
    )  # fmt: skip
    moved = [(p - before[name]).double().square().sum() for name, p in student.named_parameters()]
    assert sum(moved).sqrt().item() == pytest.approx(3e-3, rel=1e-2)  # learning rate times norm
    (entry,) = result.history
    assert entry["learning_rate"] == 30.0
    assert entry["grad_norm_mean"] == entry["grad_norm_max"] > 1e-4  # before clipping


def test_ema_is_the_average_of_the_weights() -> None:
    pipe = tiny_flux()

    def trained(steps: int, ema_decay: float) -> Any:
        return run(
            pipe, max_steps=steps, ema_decay=ema_decay, lr_schedule="constant", warmup_steps=0,
            eval_prompts=PROMPTS[4:],
        )  # fmt: skip

    first, second, averaged = trained(1, 0.0), trained(2, 0.0), trained(2, 0.999)
    # The decay rises: 0 in the first update, 2/11 in the second.
    one, two = (dict(result.student.named_parameters()) for result in (first, second))
    for name, weight in averaged.student.named_parameters():
        torch.testing.assert_close(weight, 2 / 11 * one[name] + 9 / 11 * two[name])
    assert averaged.gap_without_ema == pytest.approx(second.gap) != averaged.gap
    assert second.gap_without_ema == second.gap


@pytest.mark.parametrize(
    "precision, dtype, own",
    [
        ("no", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("fp16", torch.float16, torch.float32),
        ("fp16", torch.float16, torch.float16),
    ],
)
def test_master_weights_are_float32_under_autocast(
    precision: str, dtype: torch.dtype, own: torch.dtype
) -> None:
    """Whatever the dtypes of the pipeline and of the student, which returns."""
    pipe = tiny_flux().to(own)
    student = tiny_student(pipe).to(torch.bfloat16)
    before = weights(student)
    master: set[torch.dtype] = set()
    computed: dict[str, set[torch.dtype]] = {"student": set(), "denoiser": set()}

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                master.update(p.dtype for p in student.parameters())
                computed[name].add(output.dtype)

        return hook

    student.final_projection[0].register_forward_hook(note("student"))
    pipe.transformer.context_embedder.register_forward_hook(note("denoiser"))
    result = run(pipe, student, mixed_precision=precision, max_steps=6)
    assert master == {torch.float32} and computed == {"student": {dtype}, "denoiser": {dtype}}
    assert result.skipped < 6 and math.isfinite(result.loss)
    assert not torch.equal(student.final_projection[0].weight, before["final_projection.0.weight"])
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert student(torch.tensor([[5, 1]]))[0].dtype == torch.bfloat16


def test_gradient_checkpointing_learns_the_same() -> None:
    pipe = tiny_flux()
    forwards: list[int] = []
    block = pipe.transformer.transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: forwards.append(1))
    results, calls = [], []
    for checkpointing in (False, True):
        before = len(forwards)
        results.append(run(pipe, gradient_checkpointing=checkpointing, max_steps=4, eval_every=1))
        calls.append(len(forwards) - before)
    assert losses(results[0]) == pytest.approx(losses(results[1]), rel=1e-6)
    assert calls[1] == calls[0] + 4 and not pipe.transformer.is_gradient_checkpointing


@pytest.mark.parametrize("poisoned", [range(2, 5), range(2, 99)], ids=["some", "many"])
def test_gradients_that_are_not_finite_are_skipped(poisoned: range, tmp_path: Path) -> None:
    """Ten in a row end the run, with the last good weights."""
    pipe, calls = tiny_flux(), count()
    student = tiny_student(pipe)

    def poison(module: Any, args: Any, output: Any) -> Any:
        if torch.is_grad_enabled() and next(calls) in poisoned:
            return (output[0] * torch.nan,)
        return output

    pipe.transformer.register_forward_hook(poison)
    arguments: dict[str, Any] = {"output_dir": tmp_path, "max_steps": 14, "eval_every": 2}
    if len(poisoned) > 10:
        with pytest.raises(DistillError, match="10 successive updates, up to number 12, are not"):
            run(pipe, student, **arguments)
        assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 5
    else:
        result = run(pipe, student, **arguments)
        assert (result.steps, result.skipped) == (14, 3) and "14, 3 skipped" in str(result)
        assert [e["skipped"] for e in result.history[:4]] == [0, 2, 3, 3]
        assert [math.isfinite(loss) for loss in losses(result)[:3]] == [True, False, True]
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert not student.training and all(p.requires_grad for p in pipe.transformer.parameters())
    SlimT5Encoder.from_pretrained(tmp_path)


# --- the order of samples ------------------------------------------------------------------------


def drawn(pipe: Any, updates: int, **changes: Any) -> tuple[TrajectoryReservoir, list[Any]]:
    """A reservoir, and the samples of its updates."""
    config, kwargs = quick(**changes), call_kwargs(pipe)
    reservoir = TrajectoryReservoir(pipe, PROMPTS, config, pipeline_kwargs=kwargs)
    return reservoir, [b.call for step in range(updates) for b in reservoir.batches(step)]


def test_the_papers_order_is_consecutive_along_one_trajectory() -> None:
    settings = vars(DistillConfig.paper(batch_size=4))
    reservoir, samples = drawn(tiny_flux(), 6, **settings)
    assert all(isinstance(call, Samples) and len(call) == 4 for call in samples)
    times = [call.batched["timestep",][0].item() for call in samples]
    assert times[:3] == sorted(times[:3], reverse=True) == times[3:]
    assert samples[0].prompts == samples[2].prompts != samples[3].prompts
    guidance = {call.batched["guidance",][0].item() for call in samples}
    assert guidance <= set(DistillConfig.paper().guidance_scales)
    assert not samples[0].batched["pooled_projections",].any()
    assert reservoir.teacher_samples == reservoir.student_samples == 24


@pytest.mark.parametrize("reuse", [1.0, 3.0])
def test_a_reservoir_mixes_and_reuses(reuse: float) -> None:
    reservoir, samples = drawn(tiny_flux(), 18, reuse=reuse, prompt_dropout=0.0)
    # Each sample is drawn `reuse` times on average.
    assert reservoir.teacher_samples == 18 * 4 / reuse and reservoir.student_samples == 18 * 4
    assert all(len(set(call.prompts)) == 4 for call in samples[:3])  # one of each trajectory
    assert any(len(set(call.batched["timestep",].tolist())) > 1 for call in samples)
    assert any(len(set(call.batched["guidance",].tolist())) > 1 for call in samples) or reuse > 1


# --- what is refused -----------------------------------------------------------------------------


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "no prompts": ({"prompts": []}, "list holds no prompts; expected"),
    "empty eval": ({"eval_prompts": []}, "list holds no prompts"),
    "not a student": ({"student": "google/flan-t5-base"}, "student is a str"),
    "students": ({"student": [None, None]}, "one student.*examples/series and examples/joint"),
    "other width": ({"student": {"project_out_dim": 48}}, "48"),
    "other vocabulary": ({"student": {"vocab_size": 1024}}, "vocabulary"),
    "unknown argument": ({"pipeline_kwargs": {"hight": 16}}, "'hight'"),
    "no tracker": ({"trackers": ("mlflow",)}, "'mlflow', which isn't installed: pip install"),
    "no logs": ({"trackers": ("tensorboard",), "output_dir": None}, "pass an output_dir"),
    "no samples": ({"samples_every": 2}, "samples_every needs eval_prompts.*an output_dir"),
    "no name": ({"push_to_hub": True, "output_dir": None}, "after output_dir: pass one"),
    "the teacher": ({}, "T5EncoderModel; expected a SlimT5Encoder"),
    "patched pipeline": ({}, "shares its weights"),
    "frozen student": ({}, "No parameter of the student"),
    "another model": ({}, "another run or model"),
    "output is a file": ({}, "is a file; expected a folder"),
    "no T5": ({}, "no T5"),
    "float16 denoiser": ({}, "float16"),
}
SPOILED: dict[str, Callable[[Any, Any, Path], Any]] = {
    "patched pipeline": lambda pipe, student, out: patch_pipeline(pipe, student),
    "frozen student": lambda pipe, student, out: student.requires_grad_(False),
    "another model": lambda pipe, student, out: (out.mkdir(), (out / "config.json").touch()),
    "output is a file": lambda pipe, student, out: out.touch(),
    "no T5": lambda pipe, student, out: pipe.register_modules(text_encoder_2=pipe.text_encoder),
    "float16 denoiser": lambda pipe, student, out: pipe.transformer.half(),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_before_anything_happens(case: str, tmp_path: Path) -> None:
    arguments, message = BAD_INPUT[case]
    pipe, out = tiny_flux(), tmp_path / "out"
    student = arguments.get("student", {})
    student = tiny_student(pipe, **student) if isinstance(student, dict) else student
    student = pipe.text_encoder_2 if case == "the teacher" else student
    if case in SPOILED:
        SPOILED[case](pipe, student, out)
    existed, modules = out.exists(), modules_of(pipe)
    before = {name: weights(module) for name, module in modules.items()}
    calls = calls_of(pipe.transformer)
    with pytest.raises((DistillError, IncompatibleStudentError, NoT5SlotError), match=message):
        run(pipe, **{"output_dir": out} | arguments | {"student": student})
    assert not calls and out.exists() == existed
    for name, module in modules.items():
        assert_same(module.state_dict(), before[name])


# --- launches ------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Accelerate reads the environment once for a process: here, once for a test."""
    AcceleratorState._reset_state(True)
    yield monkeypatch
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "sets mixed precision to 'bf16'.*config to 'no'"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", r"dynamo backend.*student\.compile\(\)"),
    ],
)
def test_a_launch_with_other_settings_is_refused(
    variable: str, value: str, message: str, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv(variable, value)
    with pytest.raises(DistillError, match=message):
        run(tiny_flux())


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launch_that_shards_the_student_is_refused(
    kind: str, environment: pytest.MonkeyPatch
) -> None:
    # Which accelerate itself says of several GPUs only.
    found = property(lambda _: DistributedType(kind))
    environment.setattr("accelerate.Accelerator.distributed_type", found)
    with pytest.raises(DistillError, match=f"launched with {kind}, which shards"):
        run(tiny_flux())


def test_a_launch_with_equal_settings_changes_nothing(environment: pytest.MonkeyPatch) -> None:
    changes = {"gradient_accumulation_steps": 2, "batch_size": 2, "mixed_precision": "bf16"}
    one = run(tiny_flux(), **changes)
    environment.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    environment.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    environment.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # which the config decides
    other = run(tiny_flux(), **changes)
    assert one.history[-1]["grad_norm_max"] == other.history[-1]["grad_norm_max"]


def test_the_precision_of_an_earlier_accelerator_changes_nothing(
    environment: pytest.MonkeyPatch,
) -> None:
    plain = run(tiny_flux()).loss
    AcceleratorState._reset_state(True)
    Accelerator(mixed_precision="bf16")
    assert run(tiny_flux()).loss == plain
