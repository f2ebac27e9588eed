"""What holds for a pipeline class: measured on the tiny real pipeline of its case."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from tiny import tiny_student
from torch import Tensor

import t5slim
from t5slim.distill import capture
from t5slim.distill.calls import call_encoder
from t5slim.distill.fallback import predict_through_pipeline
from t5slim.distill.pipeline import teacher_of
from t5slim.distill.replay import predict, split_walk
from t5slim.distill.teacher import PromptTable, encode_prompts
from t5slim.distill.trace import NotAGather
from t5slim.distill.walk import Walk
from t5slim.errors import DistillError
from t5slim.slot import find_text_slot

from .case import Case

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Facts:
    """Of one pipeline class; `row` is its line in docs/pipelines.md.

    Attributes:
        name: of the class.
        slot: the component that holds its T5.
        encoder: the class of it.
        route: "gather", "fallback" or "none".
        why: why not "gather", in the library's words.
        calls: denoiser calls of a walk.
        patched: the student changes what comes out, and unpatching gives the same again, bitwise.
        replayed: with the teacher's own rows, each call's prediction is bitwise the recorded one.
        gradient: norm of the loss' gradient in the student's weights.
    """

    name: str
    slot: str
    encoder: str
    route: str
    why: str
    calls: int
    patched: bool
    replayed: bool
    gradient: float

    @property
    def row(self) -> str:
        def tick(holds: bool) -> str:
            return "yes" if holds else "no"

        cells = (
            f"`{self.name}`", f"`{self.slot}`", self.encoder.removesuffix("EncoderModel"),
            tick(self.patched), tick(self.calls > 0), tick(self.replayed),
            tick(self.gradient > 0), self.route, self.why,
        )  # fmt: skip
        return "| " + " | ".join(cells) + " |"


def measure(case: Case) -> Facts:
    """Patch and unpatch; capture; replay by the route that the library takes; lead a gradient."""
    pipe, call = case.pipe(), case.call()
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    slot = find_text_slot(pipe)
    encoder = type(getattr(pipe, slot.name)).__name__
    student = tiny_student(pipe, **case.student)

    teachers = latents(pipe, case, call)
    t5slim.patch_pipeline(pipe, student, keep_teacher=True)
    students = latents(pipe, case, call)
    t5slim.unpatch_pipeline(pipe)
    patched = not torch.equal(students, teachers) and torch.equal(
        latents(pipe, case, call), teachers
    )
    table = PromptTable()
    try:
        walk = capture(
            pipe,
            case.texts,
            pipeline_kwargs=call,
            seed=range(len(case.texts)),  # a noise for each prompt, as in training
            encode=table.teacher_rows,
        )
    except DistillError as reason:
        return Facts(case.name, slot.name, encoder, "none", str(reason), 0, patched, False, 0.0)
    calls = len(walk.denoiser_calls)
    try:
        replayed, gradient = _gather(pipe, walk, table, student)
        route, why = "gather", ""
    except NotAGather as reason:
        replayed, gradient = _fallback(pipe, walk, student)
        route, why = "fallback", str(reason)
    return Facts(case.name, slot.name, encoder, route, why, calls, patched, replayed, gradient)


def latents(pipe: Any, case: Case, call: dict[str, Any]) -> Tensor:
    """What the pipeline makes of the case's prompts, from the same noise."""
    torch.manual_seed(0)  # some draw beside their generator
    if "content_prompt" in call:  # VisualCloze's second one
        call = call | {"content_prompt": [call["content_prompt"]] * len(case.texts)}
    takes = list(inspect.signature(type(pipe).__call__).parameters)
    more = {
        "prompt" if "prompt" in takes else takes[1]: list(case.texts)
        if len(case.texts) > 1
        else case.texts[0],
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    output = pipe(**call, **{name: value for name, value in more.items() if name in takes})[0]
    if isinstance(output, (list, tuple)):
        output = torch.stack([torch.as_tensor(part) for part in output])
    return torch.as_tensor(output).float()


def _gather(pipe: Any, walk: Walk, table: PromptTable, student: Any) -> tuple[bool, float]:
    calls = split_walk(pipe, walk, table)
    replayed, losses = True, []
    for rows in calls:
        prompts = [max(number, 0) for number in rows.prompts]  # of a zeroed text: any
        with torch.no_grad():
            same = predict(pipe, rows, table.rows(teacher_of(pipe), prompts, CPU))
        replayed = replayed and torch.equal(same, rows.target)
        embeddings = encode_prompts(student, table, prompts, CPU)
        losses.append((predict(pipe, rows, embeddings) - rows.target).square().mean())
    return replayed, _gradient(losses, student)


def _fallback(pipe: Any, walk: Walk, student: Any) -> tuple[bool, float]:
    every = range(len(walk.denoiser_calls))
    teachers = iter([call.rows for call in walk.slot_calls])
    with torch.no_grad():
        same = predict_through_pipeline(pipe, walk, lambda ids, mask: next(teachers), every)
    replayed = all(torch.equal(same[i], walk.denoiser_calls[i].target) for i in every)
    theirs = predict_through_pipeline(
        pipe, walk, lambda ids, mask: call_encoder(student, ids, mask), every
    )
    losses = [(theirs[i] - walk.denoiser_calls[i].target).square().mean() for i in every]
    return replayed, _gradient(losses, student)


def _gradient(losses: list[Tensor], student: Any) -> float:
    gradients = torch.autograd.grad(
        torch.stack(losses).mean(), list(student.parameters()), allow_unused=True
    )
    found = [gradient for gradient in gradients if gradient is not None]
    assert all(gradient.isfinite().all() for gradient in found)
    return float(torch.stack([gradient.norm() for gradient in found]).norm())
