"""Facts about a pipeline class, measured on the tiny real pipeline of its case."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from tiny import tiny_student
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import t5slim
from t5slim.distill import capture
from t5slim.distill.pipeline import teacher_of
from t5slim.distill.replay import EmbeddingsOf, Samples, predictions, split_trajectory
from t5slim.distill.teacher import TeacherEmbeddings, encode_prompts
from t5slim.errors import DistillError
from t5slim.slot import TextSlot

from .case import Case

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Facts:
    """Of one pipeline class."""

    name: str
    slot: str
    encoder: str  # its class
    route: str  # "gather", "fallback" or "none"
    why: str  # not "gather", in the library's words
    calls: int  # of the denoiser, in a trajectory
    patched: bool  # the student changes what comes out; unpatched, it is the same again, bitwise
    replayed: bool  # with the teacher's own embeddings, each prediction is bitwise the recorded one
    gradient: float  # norm of the loss' gradient in the student's weights

    @property
    def group(self) -> str:
        """The beginning of the line in docs/pipelines.md that its class shares with its like."""
        encoder = self.encoder.removesuffix("EncoderModel")
        route = f"{self.route}: {self.why}" if self.why else self.route
        return f"| {route} | `{self.slot}` | {encoder} |"


def measure(case: Case) -> Facts:
    """Patch and unpatch; capture; replay by the route that the library takes; lead a gradient."""
    pipe, call = case.pipe(), case.call()
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    slot, student = TextSlot(pipe), tiny_student(pipe, **case.student)
    encoder, original = type(slot.encoder).__name__, latents(pipe, case, call)
    t5slim.patch_pipeline(pipe, student, keep_teacher=True)
    students = latents(pipe, case, call)
    t5slim.unpatch_pipeline(pipe)
    again = latents(pipe, case, call)
    patched = not torch.equal(students, original) and torch.equal(again, original)
    about = (case.name, slot.name, encoder)
    teacher = TeacherEmbeddings()
    seeds = range(len(case.texts))  # a noise for each prompt, as in training
    try:
        trajectory = capture(pipe, case.texts, pipeline_kwargs=call, seed=seeds, teacher=teacher)
    except DistillError as reason:
        return Facts(*about, "none", str(reason), 0, patched, False, 0.0)
    calls = split_trajectory(trajectory)
    gather = isinstance(calls[0], Samples)

    def indices(prompts: tuple[int, ...]) -> list[int]:
        return [max(i, 0) for i in prompts]  # a zeroed text has the index -1

    def predicted(embeddings_of: EmbeddingsOf) -> list[Tensor]:
        return [*predictions(pipe, calls, embeddings_of)]

    with torch.no_grad():
        replayed = predicted(lambda i: teacher.get(teacher_of(pipe), indices(i), CPU))
    own = predicted(lambda i: encode_prompts(student, teacher, indices(i), CPU))
    losses = [(p - call.target).square().mean() for p, call in zip(own, calls, strict=True)]
    equal = all(torch.equal(p, call.target) for p, call in zip(replayed, calls, strict=True))
    torch.stack(losses).mean().backward()
    # Not to clip, but for the norm and its check.
    norm = clip_grad_norm_(student.parameters(), math.inf, error_if_nonfinite=True).item()
    route, why = ("gather", "") if gather else ("fallback", calls[0].trajectory.reason)
    return Facts(*about, route, why, len(calls), patched, equal, norm)


def latents(pipe: Any, case: Case, call: dict[str, Any]) -> Tensor:
    """The latents that the pipeline generates from the case's prompts, from the same noise."""
    torch.manual_seed(0)  # some draw beside their generator
    takes = list(inspect.signature(type(pipe).__call__).parameters)
    texts = case.texts[0] if case.prompts == 1 else case.texts
    more = {
        "prompt" if "prompt" in takes else takes[1]: texts,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    if "content_prompt" in call:  # VisualCloze's second one
        more["content_prompt"] = [call["content_prompt"]] * len(case.texts)
    output = pipe(**call | {name: value for name, value in more.items() if name in takes})[0]
    if isinstance(output, (list, tuple)):
        output = torch.stack([torch.as_tensor(part) for part in output])
    return torch.as_tensor(output).float()
