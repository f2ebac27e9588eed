"""Distillation as users start it, on real pipelines of tiny size."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_student
from transformers.modeling_outputs import BaseModelOutput

from t5slim import SlimT5Config, SlimT5Encoder, patch_pipeline
from t5slim.distill import DistillConfig, VelocityGap, train, velocity_gap
from t5slim.distill.examples import Batch, Examples
from t5slim.distill.pipeline import teacher_of
from t5slim.distill.prompts import prompt_source
from t5slim.distill.replay import Rows
from t5slim.distill.teacher import PromptTable
from t5slim.errors import DistillError, IncompatibleStudentError, NoT5SlotError

QUICK: dict[str, Any] = {
    "batch_size": 4, "reservoir_walks": 8, "warmup_steps": 2, "learning_rate": 5e-3,
    "ema_decay": 0.9, "objective": "velocity",
}  # fmt: skip


def quick(**changes: Any) -> DistillConfig:
    return DistillConfig(**{"max_steps": 3, **QUICK, **changes})


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# --- what it does --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pixart_sigma", "stable_audio"], ids=["gather", "fallback"])
def test_training_closes_the_gap(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    student = tiny_student(pipe)
    kwargs = call_kwargs(pipe, steps=2)
    prompts = PROMPTS[
        :2
    ]  # of which the gap is measured, too: does it learn, not does it generalise
    before = velocity_gap(pipe, student, prompts, pipeline_kwargs=kwargs)
    result = train(
        pipe, student, prompts, quick(max_steps=60), pipeline_kwargs=kwargs, eval_prompts=prompts
    )
    assert result.gap is not None and result.gap < 0.6 * before
    assert result.gap == pytest.approx(
        velocity_gap(pipe, result.student, prompts, pipeline_kwargs=kwargs), rel=1e-4
    )
    assert result.student is student and not student.training


def test_embedding_objective_asks_the_denoiser_nothing() -> None:
    pipe = TINY_PIPELINES["chroma"]()
    student = tiny_student(pipe)
    calls: list[Any] = []
    handle = pipe.transformer.register_forward_hook(lambda *args: calls.append(args))
    result = train(
        pipe, student, PROMPTS[:3], quick(objective="embedding", max_steps=40, eval_every=5),
        pipeline_kwargs=call_kwargs(pipe),
    )  # fmt: skip
    handle.remove()
    assert not calls and result.teacher_rows == result.student_rows == 0
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]


def test_frozen_stays_frozen_and_is_given_back_as_it_was() -> None:
    pipe = tiny_flux()
    pipe.transformer.proj_out.weight.requires_grad_(False)
    pipe.vae.train()
    modules = {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    before = {name: weights(module) for name, module in modules.items()}
    pipe(PROMPTS[0], **call_kwargs(pipe))  # which leaves attributes of its own
    attributes = set(vars(pipe))
    student = tiny_student(pipe)
    grads: list[bool] = []
    pipe.transformer.register_forward_hook(
        lambda module, *_: grads.append(any(p.requires_grad for p in module.parameters()))
    )
    rng = torch.get_rng_state()

    train(pipe, student, PROMPTS[:4], quick(), pipeline_kwargs=call_kwargs(pipe))

    assert grads and not any(grads)
    assert torch.equal(torch.get_rng_state(), rng)
    assert set(vars(pipe)) == attributes
    for name, module in modules.items():
        assert_same(module, before[name])
        assert all(parameter.grad is None for parameter in module.parameters())
        assert "forward" not in vars(module)
    frozen = [n for n, p in pipe.transformer.named_parameters() if not p.requires_grad]
    assert frozen == ["proj_out.weight"]
    assert pipe.vae.training and pipe.vae.encoder.training and not pipe.transformer.training


def test_every_weight_of_the_student_is_trained() -> None:
    pipe = tiny_flux()
    student = tiny_student(pipe)
    before = weights(student)
    train(pipe, student, PROMPTS[:4], quick(weight_decay=0.0), pipeline_kwargs=call_kwargs(pipe))
    assert not [n for n, t in student.state_dict().items() if torch.equal(t, before[n])]


def test_master_weights_are_float32_and_the_students_dtype_returns() -> None:
    pipe = tiny_flux()
    student = tiny_student(pipe).to(torch.bfloat16)
    dtypes: set[torch.dtype] = set()
    student.register_forward_pre_hook(
        lambda module, _: dtypes.update(p.dtype for p in module.parameters() if module.training)
    )
    train(pipe, student, PROMPTS[:4], quick(), pipeline_kwargs=call_kwargs(pipe))
    assert dtypes == {torch.float32}
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert student(torch.tensor([[5, 1]]))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_autocast_trains(checkpointing: bool) -> None:
    pipe = tiny_flux()
    student = tiny_student(pipe)
    result = train(
        pipe, student, PROMPTS[:4],
        quick(mixed_precision="bf16", gradient_checkpointing=checkpointing, max_steps=4),
        pipeline_kwargs=call_kwargs(pipe),
    )  # fmt: skip
    assert result.loss > 0 and {p.dtype for p in student.parameters()} == {torch.float32}
    assert not pipe.transformer.is_gradient_checkpointing


def test_a_pipeline_in_bfloat16_teaches() -> None:
    pipe = tiny_flux().to(torch.bfloat16)
    student = tiny_student(pipe)
    before = student.final_projection[0].weight.clone()
    train(pipe, student, PROMPTS[:4], quick(), pipeline_kwargs=call_kwargs(pipe))
    assert not torch.equal(student.final_projection[0].weight, before)


def test_same_seed_same_student() -> None:
    students = []
    for seed in (0, 0, 1):
        pipe = tiny_flux()
        torch.rand(seed + 3)  # what was drawn before must not matter
        student = tiny_student(pipe)
        train(pipe, student, PROMPTS[:4], quick(seed=seed), pipeline_kwargs=call_kwargs(pipe))
        students.append(weights(student))
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    assert not all(torch.equal(students[0][name], students[2][name]) for name in students[0])


def test_average_and_last_weights_are_both_measured() -> None:
    pipe = tiny_flux()
    arguments: Any = {"pipeline_kwargs": call_kwargs(pipe), "eval_prompts": PROMPTS[4:]}
    averaged = train(pipe, tiny_student(pipe), PROMPTS[:4], quick(ema_decay=0.9), **arguments)
    plain = train(pipe, tiny_student(pipe), PROMPTS[:4], quick(ema_decay=0.0), **arguments)
    assert averaged.raw_gap == pytest.approx(plain.gap) and plain.raw_gap == plain.gap
    assert averaged.gap != averaged.raw_gap


# --- the order of examples -----------------------------------------------------------------------


def examples_of(
    pipe: Any, config: DistillConfig, process: tuple[int, int] = (0, 1)
) -> tuple[Examples, PromptTable]:
    table = PromptTable()
    source = prompt_source(PROMPTS)
    return Examples(pipe, source, config, call_kwargs(pipe), table, process), table


def draw(examples: Examples, updates: range | int, walked: bool = True) -> list[Batch]:
    numbers = range(updates) if isinstance(updates, int) else updates
    return [batch for update in numbers for batch in examples.batches(update, walked)]


def rows_of(batch: Batch) -> Rows:
    assert isinstance(batch.call, Rows)
    return batch.call


def test_paper_order_is_consecutive_along_one_walk() -> None:
    pipe = tiny_flux()
    examples, _ = examples_of(pipe, DistillConfig.paper(batch_size=4))
    drawn = [rows_of(batch) for batch in draw(examples, 6)]
    assert all(len(rows) == 4 for rows in drawn)
    times = [rows.batched["timestep",][0].item() for rows in drawn]
    assert times[:3] == sorted(times[:3], reverse=True) == times[3:]
    assert drawn[0].prompts == drawn[2].prompts != drawn[3].prompts
    guidance = {rows.batched["guidance",][0].item() for rows in drawn}
    assert guidance <= set(DistillConfig.paper().guidance_scales)
    assert not drawn[0].batched["pooled_projections",].any()
    assert examples.teacher_rows == examples.student_rows == 24


@pytest.mark.parametrize("reuse", [1.0, 3.0])
def test_reservoir_mixes_and_reuses(reuse: float) -> None:
    pipe = tiny_flux()
    config = quick(batch_size=4, reservoir_walks=8, reuse=reuse, empty_prompt_share=0.0)
    examples, _ = examples_of(pipe, config)
    batches = draw(examples, 18)
    drawn = [rows_of(batch) for batch in batches]
    assert all(len(rows) == 4 for rows in drawn)
    assert examples.teacher_rows == 18 * 4 / reuse  # each row is drawn `reuse` times on average
    assert len(examples._walks) == 2  # of 4 prompts each
    assert all(len(set(rows.prompts)) == 4 for rows in drawn[:3])  # one row of each lane
    assert any(len(set(rows.batched["timestep",].tolist())) > 1 for rows in drawn)
    assert any(len(set(rows.batched["guidance",].tolist())) > 1 for rows in drawn[6:]) or reuse > 1
    thirds = {(t, int(i)) for b in batches for t, i in zip(
        rows_of(b).batched["timestep",].tolist(), b.thirds, strict=True)}  # fmt: skip
    assert len(thirds) == 3  # of three steps, each is a third


@pytest.mark.parametrize("reservoir", [0, 16], ids=["consecutive", "reservoir"])
@pytest.mark.parametrize("name", sorted(TINY_PIPELINES))
def test_lanes_learn_the_same_however_they_are_spread(name: str, reservoir: int) -> None:
    """One batch of 4, two of 2, and two processes: the same rows in the same update."""
    pipe = TINY_PIPELINES[name]()

    def learned(batch_size: int, accumulation: int, processes: int) -> list[torch.Tensor]:
        config = quick(
            batch_size=batch_size, gradient_accumulation_steps=accumulation,
            reservoir_walks=reservoir,
        )  # fmt: skip
        updates: list[list[torch.Tensor]] = [[] for _ in range(5)]
        for index in range(processes):
            examples, _ = examples_of(pipe, config, (index, processes))
            for update, targets in enumerate(updates):
                for batch in examples.batches(update, walked=True):
                    assert batch.call is not None
                    targets += list(batch.call.target)
        sums = [sorted(t.double().abs().sum().item() for t in targets) for targets in updates]
        return [torch.tensor(values) for values in sums]

    for split in ((2, 2, 1), (2, 1, 2), (1, 4, 1)):
        for one, other in zip(learned(4, 1, 1), learned(*split), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reservoir", [0, 8], ids=["consecutive", "reservoir"])
def test_examples_go_on_from_their_counters(reservoir: int) -> None:
    pipe = tiny_flux()
    config = quick(reservoir_walks=reservoir)
    one, table = examples_of(pipe, config)
    draw(one, 7)
    other, other_table = examples_of(pipe, config)
    other.restore(json.loads(json.dumps(one.state())))
    assert other.state() == one.state()
    for a, b in zip(draw(one, range(7, 12)), draw(other, range(7, 12)), strict=True):
        assert torch.equal(rows_of(a).target, rows_of(b).target)
        assert torch.equal(a.thirds, b.thirds)  # type: ignore[arg-type]
        for key, tensor in rows_of(a).batched.items():
            assert torch.equal(tensor, rows_of(b).batched[key])
        ids = [t.batch(x.prompts, x.device)[0] for t, x in ((table, a), (other_table, b))]
        assert torch.equal(*ids)


def test_guidance_of_the_user_holds_where_the_denoiser_takes_none() -> None:
    pipe = tiny_flux(guidance_embeds=False)
    (batch,) = draw(examples_of(pipe, quick())[0], 1)
    assert ("guidance",) not in rows_of(batch).batched


def test_teacher_encodes_each_prompt_once() -> None:
    pipe = tiny_flux()
    encoded: list[int] = []
    teacher = teacher_of(pipe)
    handle = teacher.encoder.register_forward_hook(lambda m, args, out: encoded.append(len(out[0])))
    examples, _ = examples_of(pipe, quick(empty_prompt_share=0.3))
    draw(examples, 30)
    # In batches of 8, which are filled up: the seven prompts, and the empty one, came in few walks.
    asked, walked = len(encoded), examples.teacher_rows
    assert set(encoded) == {8} and asked <= 4 and walked > 60
    draw(examples, range(30, 60))
    handle.remove()
    assert len(encoded) == asked and examples.teacher_rows > walked


def test_batches_without_the_denoiser_hold_each_prompt_in_turn() -> None:
    pipe = TINY_PIPELINES["pixart_sigma"]()
    examples, table = examples_of(pipe, quick(batch_size=2, empty_prompt_share=0.0))
    batches = draw(examples, len(PROMPTS) // 2, walked=False)
    assert all(batch.call is None for batch in batches) and examples.teacher_rows == 0
    ids, mask = table.batch([n for batch in batches for n in batch.prompts], batches[0].device)
    assert mask is not None and len(ids.unique(dim=0)) == len(PROMPTS)


# --- the measure ---------------------------------------------------------------------------------


class Repeats(torch.nn.Module):
    """Says of every prompt what the teacher says of one."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.rows.expand(len(input_ids), -1, -1))


@pytest.mark.parametrize("name", sorted(TINY_PIPELINES))
def test_gap_is_0_for_the_teacher_and_1_for_an_empty_prompt(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    teacher = teacher_of(pipe)
    gap = VelocityGap(pipe, PROMPTS[:3], pipeline_kwargs=call_kwargs(pipe), batch_size=2)
    assert gap(copy.deepcopy(teacher)) < 1e-8
    tokenizer = pipe.tokenizer_3 if name == "sd3" else getattr(pipe, "tokenizer_2", pipe.tokenizer)
    empty = tokenizer([""], padding="max_length", max_length=12, return_tensors="pt")
    masked = name in ("chroma", "pixart_sigma", "stable_audio")
    with torch.no_grad():
        rows = teacher(empty.input_ids, empty.attention_mask if masked else None)[0]
    assert gap(Repeats(rows)) == pytest.approx(1.0, rel=1e-5)
    student = tiny_student(pipe).train()
    assert gap(student) > 0.01 and student.training


def test_gap_doesnt_depend_on_the_batch_much_and_not_on_the_call() -> None:
    pipe = tiny_flux()
    student = tiny_student(pipe)
    measure = VelocityGap(pipe, PROMPTS[:4], pipeline_kwargs=call_kwargs(pipe))
    assert measure(student) == measure(student)
    assert measure(student) == velocity_gap(
        pipe, student, PROMPTS[:4], pipeline_kwargs=call_kwargs(pipe)
    )


def test_gap_of_a_patched_pipeline_is_refused() -> None:
    pipe = tiny_flux()
    student = tiny_student(pipe)
    patch_pipeline(pipe, student)
    with pytest.raises(DistillError, match="unpatch_pipeline"):
        velocity_gap(pipe, student, PROMPTS[:1], pipeline_kwargs=call_kwargs(pipe))


def test_gap_of_a_denoiser_that_ignores_the_prompt() -> None:
    pipe = tiny_flux()
    torch.nn.init.zeros_(pipe.transformer.context_embedder.weight)
    with pytest.raises(DistillError, match="same for these prompts as for an empty one"):
        VelocityGap(pipe, PROMPTS[:2], pipeline_kwargs=call_kwargs(pipe))


# --- files ---------------------------------------------------------------------------------------


def test_output_dir_holds_the_student_and_its_story(tmp_path: Path) -> None:
    pipe = tiny_flux()
    student = tiny_student(pipe)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([PROMPTS[0] + "  ", "", *PROMPTS[1:4]]) + "\n", encoding="utf-8")
    out = tmp_path / "runs" / "first"
    result = train(
        pipe, student, file, quick(max_steps=5, eval_every=2),
        pipeline_kwargs=call_kwargs(pipe), eval_prompts=PROMPTS[4:], output_dir=out,
    )  # fmt: skip
    assert {path.name for path in out.iterdir()} >= {
        "config.json", "model.safetensors", "history.jsonl", "distillation.json",
    }  # fmt: skip
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    loaded = SlimT5Encoder.from_pretrained(out)
    assert_same(loaded, weights(student))
    assert sum(p.numel() for p in loaded.parameters()) == sum(
        p.numel() for p in student.parameters()
    )
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert lines == result.history and [line["step"] for line in lines] == [2, 4, 5]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and result.seconds == seconds[-1]
    facts = json.loads((out / "distillation.json").read_text())
    assert facts["pipelines"][0]["pipeline"] == "FluxPipeline" and facts["prompts"]["prompts"] == 4
    assert facts["config"]["max_steps"] == 5 and facts["result"]["gap"] == result.gap


def test_max_seconds_ends_the_run(tmp_path: Path) -> None:
    pipe = tiny_flux()
    result = train(
        pipe, tiny_student(pipe), PROMPTS[:4], quick(max_steps=10**6, max_seconds=0.5),
        pipeline_kwargs=call_kwargs(pipe),
    )  # fmt: skip
    assert 0 < result.steps < 10**5 and result.seconds >= 0.5


# --- bad input -----------------------------------------------------------------------------------


def test_gradients_that_are_not_finite_stop_and_keep_the_last_good_weights(
    tmp_path: Path,
) -> None:
    pipe = tiny_flux()
    student = tiny_student(pipe)
    calls: list[int] = []

    def poison(module: Any, args: Any, output: Any) -> Any:
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) >= 4:
                return (output[0] * torch.nan,)
        return output

    handle = pipe.transformer.register_forward_hook(poison)
    out = tmp_path / "run"
    with pytest.raises(DistillError, match="2 updates in a row, up to number 5, are not finite"):
        train(
            pipe, student, PROMPTS[:4], quick(max_steps=10, eval_every=3, max_skipped_updates=2),
            pipeline_kwargs=call_kwargs(pipe), output_dir=out,
        )  # fmt: skip
    handle.remove()
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    assert not student.training and all(p.requires_grad for p in pipe.transformer.parameters())
    assert len((out / "history.jsonl").read_text().splitlines()) == 1
    SlimT5Encoder.from_pretrained(out)


BAD_INPUT = """no prompts, blank prompts, empty file, missing file, not strings, empty eval,
student is the teacher, patched pipeline, not a student, other width, other vocabulary,
frozen student, another run, output is a file, unknown pipeline kwarg, no T5, float16 denoiser"""


@pytest.mark.parametrize("case", [case.strip() for case in BAD_INPUT.split(",")])
def test_bad_input_is_refused_before_anything_happens(case: str, tmp_path: Path) -> None:
    pipe = tiny_flux()
    student: Any = tiny_student(pipe)
    prompts: Any = PROMPTS[:2]
    arguments: dict[str, Any] = {"pipeline_kwargs": call_kwargs(pipe)}
    error: type[Exception] = DistillError
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    out = tmp_path / "out"
    if case == "no prompts":
        prompts, message = [], "prompts: a list without a prompt"
    elif case == "blank prompts":
        prompts, message = ["", " \n"], "without a prompt"
    elif case == "empty file":
        prompts, message = tmp_path / "empty.txt", "empty.txt without a prompt"
        prompts.write_text("\n\n")
    elif case == "missing file":
        prompts, message = "a red circle", "no such file"
    elif case == "not strings":
        prompts, message = ["a", 3], "holds 3; expected strings"
    elif case == "empty eval":
        arguments["eval_prompts"], message = [], "eval_prompts: a list without"
    elif case == "student is the teacher":
        student = pipe.text_encoder_2
        message = "T5EncoderModel; expected a SlimT5Encoder"
    elif case == "patched pipeline":
        patch_pipeline(pipe, student)
        message = "shares its weights"
    elif case == "not a student":
        student, message = "google/flan-t5-base", "student is a str"
    elif case == "other width":
        student = SlimT5Encoder(SlimT5Config(vocab_size=256, project_out_dim=48, **small))
        error, message = IncompatibleStudentError, "48"
    elif case == "other vocabulary":
        student = SlimT5Encoder(SlimT5Config(vocab_size=1024, project_out_dim=32, **small))
        error, message = IncompatibleStudentError, "vocabulary"
    elif case == "frozen student":
        student.requires_grad_(False)
        message = "No parameter of the student"
    elif case == "another run":
        out.mkdir()
        (out / "history.jsonl").write_text("{}")
        message = "another run or model"
    elif case == "output is a file":
        out.write_text("x")
        message = "which is a file"
    elif case == "unknown pipeline kwarg":
        arguments["pipeline_kwargs"], message = {"hight": 16}, "'hight'"
    elif case == "no T5":
        pipe.register_modules(text_encoder_2=pipe.text_encoder)
        error, message = NoT5SlotError, "no T5"
    else:
        pipe.transformer.half()
        message = "float16"
    existed = out.exists()
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    before = [weights(module) for module in modules]
    calls: list[Any] = []
    pipe.transformer.register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(error, match=message):
        train(pipe, student, prompts, quick(), output_dir=out, **arguments)
    assert not calls and out.exists() == existed
    for module, state in zip(modules, before, strict=True):
        assert_same(module, state)
        assert case in ("frozen student", "patched pipeline") or all(
            p.requires_grad for p in module.parameters()
        )
