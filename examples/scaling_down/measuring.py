"""What the scaling-down study measures of a student: gap, errors by kind of row, pictures."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world import judge, world
from shapes_world.painting import CALL, captions, load_pipeline, paint

import t5slim
from t5slim.distill import GapTable, VelocityGap

ROWS = ("visual", "idle", "padding")
GAP_CAPTIONS = 4  # of each criterion, each with and without an idle sentence
STEPS = 4  # in which pictures are painted to be judged: the teacher's are right in one already


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
        table = self.gap.table(student)
        half = len(self._ids) // 2
        parts: dict[str, Any] = {"alone": slice(half), "with a sentence": slice(half, None)}
        for criterion in world.CRITERIA:
            parts[criterion] = torch.tensor([one == criterion for one in self._criteria])
        return {
            "gap": table.gap,
            "gap_of": {name: ratio(table, part) for name, part in parts.items()},
            # If only these rows are the student's, and all others the teacher's.
            "gap_of_rows": {kind: self.gap.table(Mixed(self, student, kind)).gap for kind in ROWS},
            "error_of_rows": self._errors(student),
            "spread": self.gap.spread(student),
            "nearest_other": self.gap.nearest_other(student),
            "right": self.right(student),
        }

    def right(self, student: nn.Module | None) -> dict[str, float]:
        """Shares of the pictures that show what the caption says, by criterion; and of letters."""
        if student is not None:
            t5slim.patch_pipeline(self.pipe, student, keep_teacher=True)
        try:
            pictures = paint(self.pipe, self._texts, num_inference_steps=STEPS)
        finally:
            if student is not None:
                t5slim.unpatch_pipeline(self.pipe)
        return judge.accuracy(self._scenes, pictures)

    @torch.no_grad()
    def _errors(self, student: nn.Module) -> dict[str, float]:
        """Squared distance of rows to the teacher's, over that of the teacher's to their mean."""
        rows, of_teacher = student(self._ids)[0], self.teacher(self._ids)[0]
        kinds = self.kinds(self._ids)
        around = (of_teacher - of_teacher.mean((0, 1))).square().sum(-1)
        errors = (rows - of_teacher).square().sum(-1)
        return {
            kind: (errors[kinds == i].sum() / around[kinds == i].sum()).item()
            for i, kind in enumerate(ROWS)
        }

    def kinds(self, input_ids: Tensor) -> Tensor:
        """(B, T), which of `ROWS` each token is. The sentence without a colour is idle; a full stop
        is of the one that follows."""
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
    """An encoder whose rows of one kind are a student's, and the others the teacher's."""

    def __init__(self, measure: Measure, student: nn.Module, kind: str) -> None:
        super().__init__()
        self._measure, self._kind = measure, ROWS.index(kind)
        self.student, self.teacher = student, measure.teacher

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        of_student = (self._measure.kinds(input_ids) == self._kind)[..., None]
        return (torch.where(of_student, self.student(input_ids)[0], self.teacher(input_ids)[0]),)


def ratio(table: GapTable, prompts: Tensor | slice) -> float:
    """The gap of some of the prompts."""
    return GapTable(table.distances[prompts], table.denominators[prompts]).gap


@functools.cache
def measure_of_this_process(count: int) -> Measure:
    return Measure(load_pipeline(), count)
