"""Measures of the scaling-down study: gap, errors by kind of token, images."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import t5slim
from t5slim.distill import VelocityGap
from t5slim.distill.metrics import GapReport

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world import judge, world
from shapes_world.generation import CALL, captions, generate, load_pipeline

TOKENS = ("visual", "idle", "padding")
GAP_CAPTIONS = 4  # of each criterion, each with and without an idle sentence
STEPS = 4  # of the images that are judged: the teacher's are right after one already


class Measure:
    """The same captions and noise for all."""

    def __init__(self, pipe: Any, count: int) -> None:
        self.pipe = pipe
        self.teacher = pipe.text_encoder_2
        self._scenes, self._texts = captions(count, held_out=True)
        parts = [
            captions(GAP_CAPTIONS, held_out=True, seed=2, chatter=share) for share in (0.0, 1.0)
        ]
        self._criteria = [scene.criterion for scenes, _ in parts for scene in scenes]
        texts = [text for _, texts in parts for text in texts]
        kwargs = CALL | {"num_inference_steps": 10}
        self.gap = VelocityGap(pipe, texts, pipeline_kwargs=kwargs)
        tokenizer = pipe.tokenizer_2
        length = CALL["max_sequence_length"]
        self._ids = tokenizer(
            texts, padding="max_length", max_length=length, return_tensors="pt"
        ).input_ids.to(pipe.device)
        self._stop = tokenizer.convert_tokens_to_ids(".")
        self._colors = set(tokenizer.convert_tokens_to_ids(list(world.COLORS)))
        self._ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}

    def __call__(self, student: nn.Module) -> dict[str, Any]:
        student.to(self.pipe.device).eval()
        report = self.gap.report(student)
        half = len(self._ids) // 2
        parts: dict[str, Any] = {"alone": slice(half), "with a sentence": slice(half, None)}
        for criterion in world.CRITERIA:
            parts[criterion] = torch.tensor([one == criterion for one in self._criteria])
        return {
            "gap": report.gap,
            "gap_of": {name: gap_of(report, part) for name, part in parts.items()},
            # If only these embeddings are the student's, and all others the teacher's.
            "gap_of_tokens": {kind: self.gap(Mixed(self, student, kind)) for kind in TOKENS},
            "error_of_tokens": self._errors(student),
            "spread": self._spread(student),
            "right": self.right(student),
        }

    def right(self, student: nn.Module | None) -> dict[str, float]:
        """Shares of the images that show what the caption says, by criterion; and of letters."""
        if student is not None:
            t5slim.patch_pipeline(self.pipe, student, keep_teacher=True)
        try:
            images = generate(self.pipe, self._texts, num_inference_steps=STEPS)
        finally:
            if student is not None:
                t5slim.unpatch_pipeline(self.pipe)
        return judge.accuracy(self._scenes, images)

    @torch.no_grad()
    def _errors(self, student: nn.Module) -> dict[str, float]:
        """Squared distance of the embeddings to the teacher's, over that of the teacher's to their
        mean."""
        of_student, of_teacher = student(self._ids)[0], self.teacher(self._ids)[0]
        kinds = self.kinds(self._ids)
        around = (of_teacher - of_teacher.mean((0, 1))).square().sum(-1)
        errors = (of_student - of_teacher).square().sum(-1)
        return {
            kind: (errors[kinds == i].sum() / around[kinds == i].sum()).item()
            for i, kind in enumerate(TOKENS)
        }

    @torch.no_grad()
    def _spread(self, student: nn.Module) -> float:
        """Standard deviation of the embeddings between captions, over the teacher's; 0: they have
        collapsed into one."""
        of_student, of_teacher = student(self._ids)[0], self.teacher(self._ids)[0]
        return (of_student.std(0).norm() / of_teacher.std(0).norm()).item()

    def kinds(self, input_ids: Tensor) -> Tensor:
        """(B, T), the index in `TOKENS` of each token's kind. A sentence without a colour is idle,
        and a full stop belongs to the sentence after it."""
        kinds = []
        for ids in input_ids.tolist():
            stop = ids.index(self._stop) if self._stop in ids else len(ids)
            visual_first = not self._colors.isdisjoint(ids[:stop])
            kinds.append(
                [
                    2 if token in self._ends else int((i < stop) != visual_first)
                    for i, token in enumerate(ids)
                ]
            )
        return torch.tensor(kinds, device=input_ids.device)


class Mixed(nn.Module):
    """An encoder whose embeddings of one kind are a student's, and all others the teacher's."""

    def __init__(self, measure: Measure, student: nn.Module, kind: str) -> None:
        super().__init__()
        self._measure, self._kind = measure, TOKENS.index(kind)
        self.student, self.teacher = student, measure.teacher

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        of_student = (self._measure.kinds(input_ids) == self._kind)[..., None]
        return (torch.where(of_student, self.student(input_ids)[0], self.teacher(input_ids)[0]),)


def gap_of(report: GapReport, prompts: Tensor | slice) -> float:
    """The gap of some of the prompts."""
    return GapReport(report.distances[prompts], report.denominators[prompts]).gap


@functools.cache
def measure_of_this_process(count: int) -> Measure:
    return Measure(load_pipeline(), count)
