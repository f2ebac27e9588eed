"""The velocity gap: how much of what the denoiser reads from the prompt the student loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DistillError
from .calls import call_encoder
from .checks import Prompts, check_student, load_prompts
from .fallback import predict_through_pipeline
from .losses import VelocityLoss
from .replay import NO_PROMPT, Rows, predict, split_walk
from .teacher import PromptTable, encode_prompts, tokenize_empty
from .trace import NotAGather
from .walk import Walk, capture, teacher_of


def velocity_gap(
    pipe: Any,
    student: nn.Module,
    prompts: Prompts,
    *,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> float:
    """How far the denoiser's predictions move when the student takes the teacher's place.

    gap = sum ||v(x_t, t, E_S(p)) - v(x_t, t, E_T(p))||^2 / sum ||v(x_t, t, E_T("")) - v(x_t, t,
    E_T(p))||^2

    over `prompts` and every step of the teacher's trajectory. 0: the denoiser can't tell the
    student from the teacher. 1: the student says no more than an empty prompt. It has no unit, and
    needs no image. Rows that carry the empty prompt itself (the unguided branch of classifier-free
    guidance) are left out.

    Args:
        pipe: a pipeline with the teacher in its text slot; its dtype is the precision of the
        measure.
        student: an encoder for that slot, on the pipeline's device.
        prompts: prompts that the student wasn't trained on, as a list or a text file.
        pipeline_kwargs: how the pipeline is called, as for `capture`.
        seed: of the noise that the trajectories start from.
        batch_size: prompts that are walked together.

    Returns:
        The gap. To measure several students, or one several times, keep a `VelocityGap` instead.

    Raises:
        NoT5SlotError: the pipeline has no T5.
        DistillError: no prompts; a pipeline with this very student in its slot; or a denoiser whose
            predictions don't depend on the prompt.
        IncompatibleStudentError: the student has another vocabulary, or rows of another width.
    """
    check_student(pipe, student)
    return VelocityGap(
        pipe, prompts, pipeline_kwargs=pipeline_kwargs, seed=seed, batch_size=batch_size
    )(student)


class VelocityGap:
    """`velocity_gap` for one pipeline and set of prompts: walked once, then asked for each student.

    Holds the trajectories and the distances to the empty prompt, so that each call costs one
    denoiser pass for each step and prompt, a third of the first one's.

    Args: those of `velocity_gap`, without the student.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Prompts,
        *,
        pipeline_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        prompts = load_prompts(prompts, "prompts")
        self._pipe = pipe
        self._table = PromptTable()
        self._parts: list[list[Rows] | Walk] = []  # a Walk where the pipeline is no gather
        for i, start in enumerate(range(0, len(prompts), batch_size)):
            walk = capture(
                pipe, prompts[start : start + batch_size],
                pipeline_kwargs=pipeline_kwargs, seed=seed + i, encode=self._table.teacher_rows,
            )  # fmt: skip
            self._empty, self._empty_rows = self._encode_empty_prompt(walk)
            try:
                calls = split_walk(pipe, walk, self._table)
            except NotAGather:
                self._parts.append(walk)
            else:
                self._parts.append([rows for call in calls if (rows := self._prompted(call))])
        self._denominator = self._distance(None)
        if not self._denominator > 0:
            raise DistillError(
                "The denoiser predicts the same for these prompts as for an empty one, so that the "
                "gap would divide by zero. Are the prompts empty, or the denoiser untrained?"
            )

    def __call__(self, student: nn.Module) -> float:
        """The gap of a student; its mode (train or eval) is as before when this returns."""
        training = student.training
        student.eval()
        try:
            return self._distance(student) / self._denominator
        finally:
            student.train(training)

    @torch.no_grad()
    def _distance(self, student: nn.Module | None) -> float:
        """Sum over all rows of the squared distance to the teacher's; None: of the empty prompt."""
        loss = VelocityLoss()
        total = 0.0
        for part in self._parts:
            pairs = (
                self._replay_walk(part, student)
                if isinstance(part, Walk)
                else self._replay_rows(part, student)
            )
            for prediction, target in pairs:
                total += loss(prediction, target).sum().item() * target[0].numel()
        return total

    def _replay_rows(
        self, calls: list[Rows], student: nn.Module | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = sorted({n for rows in calls for n in rows.prompts})
        device = calls[0].target.device
        if student is not None:
            embeddings = encode_prompts(student, self._table, numbers, device)
        else:
            embeddings = self._empty_rows.expand(len(numbers), -1, -1)
        places = {n: i for i, n in enumerate(numbers)}
        for rows in calls:
            index = torch.tensor([places[n] for n in rows.prompts], device=device)
            yield predict(self._pipe, rows, embeddings[index]), rows.target

    def _replay_walk(
        self, walk: Walk, student: nn.Module | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        slot_calls = iter(walk.slot_calls)

        def encode(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
            teacher = next(slot_calls).rows
            if student is None:
                rows = self._empty_rows.expand_as(teacher)
            else:
                rows = call_encoder(student, input_ids, attention_mask)
            numbers = self._table.numbers(input_ids, attention_mask)
            empty = torch.tensor([n == self._empty for n in numbers], device=teacher.device)
            return torch.where(empty[:, None, None], teacher, rows)

        calls = range(len(walk.denoiser_calls))
        predictions = predict_through_pipeline(self._pipe, walk, encode, calls)
        for i, prediction in predictions.items():
            yield prediction, walk.denoiser_calls[i].target

    def _prompted(self, rows: Rows) -> Rows | None:
        kept = [i for i, n in enumerate(rows.prompts) if n not in (NO_PROMPT, self._empty)]
        if not kept:
            return None
        return rows if len(kept) == len(rows) else rows.select(kept)

    def _encode_empty_prompt(self, walk: Walk) -> tuple[int, Tensor]:
        """Number of the empty prompt, tokenized as the walk's prompts are, and the teacher's rows,
        (S, D).
        """
        call = walk.slot_calls[0]
        ids, mask = tokenize_empty(self._pipe, call.input_ids, call.attention_mask)
        rows = self._table.teacher_rows(teacher_of(self._pipe), ids, mask)
        return self._table.numbers(ids, mask)[0], rows[0]
