"""The velocity gap: how much of what the denoiser reads from the prompt the student loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import DistillError
from ..slot import find_text_slot
from .checks import Prompts, check_student, load_prompts
from .fallback import predict_through_pipeline
from .gap import GapReport, GapTable
from .losses import VelocityLoss, distances_between
from .pipeline import images_per_prompt, teacher_of
from .replay import NO_PROMPT, Rows, predict, split_walk
from .states import evaluating
from .teacher import PromptTable, encode_prompts, tokenize_empty
from .trace import NotAGather
from .walk import Walk, capture


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
        batch_size: prompts that are walked together. If `pipeline_kwargs` holds something for each
            of them, such as a list of control images, it must be the number of prompts.

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


@dataclass(frozen=True)
class _Part:
    """Prompts that were walked together.

    Attributes:
        first: the place of the first of them among all prompts.
        numbers: those of their prompts that aren't empty.
        calls: the rows of each denoiser call, and the place of each row's prompt among all; None
            where all rows are those of the empty prompt. Or the walk, where the pipeline is no
            gather.
    """

    first: int
    numbers: list[int]
    calls: list[tuple[Rows, Tensor] | None] | Walk


class VelocityGap:
    """`velocity_gap` for one pipeline and set of prompts: walked once, then asked for each student.

    Holds the trajectories and the distances to the empty prompt, so that each call costs one
    denoiser pass for each step and prompt, a third of the first one's.

    Args:
        pipe: this and the following as for `velocity_gap`.
        prompts: that the student wasn't trained on.
        pipeline_kwargs: how the pipeline is called.
        seed: of the noise.
        batch_size: prompts that are walked together.
        paint: keep the pictures in which the teacher's trajectories end. Each prompt's noise is
            then that of `seed` alone, whatever its batch.

    Attributes:
        prompts: the prompts that are measured, each once.
        images: if `paint`, the teacher's picture of each (of several for one, all of them).
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Prompts,
        *,
        pipeline_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,
        batch_size: int = 16,
        paint: bool = False,
    ) -> None:
        self.prompts = load_prompts(prompts, "prompts")
        self.images: list[Image.Image] = []
        self._pipe = pipe
        self._images_per_prompt = images_per_prompt(pipeline_kwargs or {})
        self._table = PromptTable()
        self._parts: list[_Part] = []
        starts = range(0, len(self.prompts), batch_size)
        for i, start in enumerate(tqdm(starts, desc="walk for the velocity gap", leave=False)):
            batch = self.prompts[start : start + batch_size]
            walk = capture(
                pipe, batch, pipeline_kwargs=pipeline_kwargs,
                seed=[seed] * len(batch) if paint else seed + i,
                encode=self._table.teacher_rows, paint=paint,
            )  # fmt: skip
            if paint and len(walk.images) != len(batch):
                raise DistillError(
                    f"{type(pipe).__name__} made {len(walk.images)} pictures of {len(batch)} "
                    "prompts. Where there are none, as of video and sound, VelocityGap measures "
                    "without paint."
                )
            self.images += walk.images
            self._parts.append(self._part(walk, start))
        self._denominators = self._distances(self._empty_rows)
        if not self._denominators.sum() > 0:
            raise DistillError(
                "The denoiser predicts the same for these prompts as for an empty one, so that the "
                "gap would divide by zero. Are the prompts empty, or the denoiser untrained?"
            )
        self._teacher_spread = self._spread(self._teacher_rows)

    def __call__(self, student: nn.Module) -> float:
        """The gap of a student; its mode (train or eval) is as before when this returns."""
        return self.table(student).gap

    def table(self, student: nn.Module) -> GapTable:
        """The gap of a student by prompt and call; its mode is as before when this returns."""
        with evaluating(student):
            return GapTable(self._distances(self._encoded_by(student)), self._denominators)

    def report(self, student: nn.Module, *, parts: bool = False) -> GapReport:
        """The gap of a student, by thirds of the trajectory, and its spread.

        Args:
            student: its mode (train or eval) is as before when this returns.
            parts: also measure real tokens and padding apart, for three times the denoiser passes.
        """
        table = self.table(student)
        apart = self.of_tokens(student) if parts else (None, None)
        return GapReport(table.gap, table.of_thirds, self.spread(student), *apart)

    def of_tokens(self, student: nn.Module) -> tuple[float, float]:
        """The gaps if only the rows of the prompts' own tokens are the student's, and if only those
        of the padding are.
        """
        of_student = self._encoded_by(student)

        def mixed(real: bool) -> Callable[[list[int]], Tensor]:
            def rows(numbers: list[int]) -> Tensor:
                teacher = self._teacher_rows(numbers)
                students = (self._real_tokens(numbers) == real)[..., None]
                return torch.where(students, of_student(numbers).to(teacher.dtype), teacher)

            return rows

        with evaluating(student):
            tables = [
                GapTable(self._distances(mixed(real)), self._denominators) for real in (True, False)
            ]
        return tables[0].gap, tables[1].gap

    def spread(self, student: nn.Module) -> float | None:
        """See `GapReport`."""
        if not self._teacher_spread:
            return None
        with evaluating(student):
            return math.sqrt(self._spread(self._encoded_by(student)) / self._teacher_spread)

    def _encoded_by(self, student: nn.Module) -> Callable[[list[int]], Tensor]:
        return lambda numbers: encode_prompts(student, self._table, numbers, self._device)

    # --- distances ---

    @torch.no_grad()
    def _distances(self, rows_of: Callable[[list[int]], Tensor]) -> Tensor:
        """(P, C), as in `GapTable`, if the text is what `rows_of` says of prompts by number."""
        loss = VelocityLoss()
        first = self._parts[0].calls
        calls = len(first.denoiser_calls if isinstance(first, Walk) else first)
        totals = torch.zeros(len(self.prompts), calls, dtype=torch.float64)
        for part in self._parts:
            replay = self._replay_walk if isinstance(part.calls, Walk) else self._replay_rows
            for i, places, prediction, target in replay(part, rows_of):
                losses = loss(prediction, target).to("cpu", torch.float64)
                totals[:, i].index_add_(0, places, losses * target[0].numel())
        return totals

    def _replay_rows(
        self, part: _Part, rows_of: Callable[[list[int]], Tensor]
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        assert not isinstance(part.calls, Walk)
        rows = rows_of(part.numbers)
        index_of = {number: i for i, number in enumerate(part.numbers)}
        for i, kept in enumerate(part.calls):
            if kept is not None:
                call, places = kept
                index = torch.tensor([index_of[n] for n in call.prompts], device=self._device)
                yield i, places, predict(self._pipe, call, rows[index]), call.target

    def _replay_walk(
        self, part: _Part, rows_of: Callable[[list[int]], Tensor]
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        walk = part.calls
        assert isinstance(walk, Walk)

        def encode(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
            teacher = self._table.teacher_rows(teacher_of(self._pipe), input_ids, attention_mask)
            numbers = self._table.numbers(input_ids, attention_mask)
            empty = torch.tensor([n == self._empty for n in numbers], device=teacher.device)
            return torch.where(empty[:, None, None], teacher, rows_of(numbers))

        calls = walk.denoiser_calls
        predictions = predict_through_pipeline(self._pipe, walk, encode, range(len(calls)))
        for i, prediction in predictions.items():
            target = calls[i].target
            yield i, self._places(part.first, walk, len(target)), prediction, target

    def _places(self, first: int, walk: Walk, rows: int) -> Tensor:
        """(R,), the place of each row's prompt among all.

        Several images of a prompt stand together; the branches of guidance follow each other.
        """
        return first + torch.arange(rows) // self._images_per_prompt % len(walk.prompts)

    def nearest_other(self, student: nn.Module) -> float | None:
        """How far the student's rows of a prompt are from those of the nearest other one that was
        walked with it, over the same of the teacher's, as a mean over the prompts; 0: a collapse
        of each into another. None for a single prompt.
        """
        with evaluating(student):
            of_student = self._nearest(self._encoded_by(student))
        of_teacher = self._nearest(self._teacher_rows)
        return (of_student / of_teacher).mean().item() if len(of_teacher) else None

    @torch.no_grad()
    def encode_first(self, encoder: Callable[..., Any]) -> Tensor:
        """An encoder's rows (B, S, D) for the prompts that were walked first: to time it."""
        return encode_prompts(encoder, self._table, self._parts[0].numbers, self._device)

    @torch.no_grad()
    def _nearest(self, rows_of: Callable[[list[int]], Tensor]) -> Tensor:
        """(P,), of the prompts that were walked with others."""
        nearest = []
        for part in self._parts:
            if len(part.numbers) > 1:
                _, mask = self._table.batch(part.numbers, self._device)
                distances = distances_between(rows_of(part.numbers), mask)
                nearest.append(distances.fill_diagonal_(math.inf).amin(1).cpu())
        return torch.cat(nearest) if nearest else torch.empty(0)

    @torch.no_grad()
    def _spread(self, rows_of: Callable[[list[int]], Tensor]) -> float:
        """Sum over parts, positions and channels of the squared distance to the prompts' mean."""
        total = 0.0
        for part in self._parts:
            rows = rows_of(part.numbers).float()
            _, mask = self._table.batch(part.numbers, self._device)
            counts = torch.ones_like(rows[..., :1]) if mask is None else mask[..., None].to(rows)
            mean = (rows * counts).sum(0) / counts.sum(0).clamp(min=1)
            total += ((rows - mean).square() * counts).sum().item()
        return total

    # --- prompts ---

    def _part(self, walk: Walk, first: int) -> _Part:
        self._empty, self._of_empty = self._encode_empty_prompt(walk)
        self._device = self._of_empty.device
        numbers = {
            number
            for call in walk.slot_calls
            for number in self._table.numbers(call.input_ids, call.attention_mask)
        }
        try:
            calls = split_walk(self._pipe, walk, self._table)
        except NotAGather:
            return _Part(first, sorted(numbers - {self._empty}), walk)
        kept = [self._prompted(call, self._places(first, walk, len(call))) for call in calls]
        numbers = {number for call in kept if call is not None for number in call[0].prompts}
        return _Part(first, sorted(numbers), kept)

    def _prompted(self, rows: Rows, places: Tensor) -> tuple[Rows, Tensor] | None:
        kept = [i for i, n in enumerate(rows.prompts) if n not in (NO_PROMPT, self._empty)]
        if not kept:
            return None
        return (rows if len(kept) == len(rows) else rows.select(kept)), places[kept]

    def _teacher_rows(self, numbers: list[int]) -> Tensor:
        """(B, S, D), remembered."""
        return self._table.rows(teacher_of(self._pipe), numbers, self._device)

    def _empty_rows(self, numbers: list[int]) -> Tensor:
        """(B, S, D), those of the empty prompt for each; it may have less of them."""
        missing = self._table.batch(numbers, self._device)[0].shape[1] - len(self._of_empty)
        return F.pad(self._of_empty, (0, 0, 0, missing)).expand(len(numbers), -1, -1)

    def _real_tokens(self, numbers: list[int]) -> Tensor:
        """(B, S) bool: where a prompt has a token and no padding."""
        ids, mask = self._table.batch(numbers, self._device)
        if mask is not None:
            return mask.bool()
        tokenizer = getattr(self._pipe, find_text_slot(self._pipe).tokenizer_name)
        return ids != tokenizer.pad_token_id

    def _encode_empty_prompt(self, walk: Walk) -> tuple[int, Tensor]:
        """Number of the empty prompt, tokenized as the walk's prompts are, and the teacher's rows,
        (S, D).
        """
        call = walk.slot_calls[0]
        ids = call.input_ids
        if any(other.input_ids.shape[1] != ids.shape[1] for other in walk.slot_calls):
            ids = ids[:, :1]  # the pipeline doesn't pad, and its empty prompt is the end alone
        ids, mask = tokenize_empty(self._pipe, ids, call.attention_mask)
        rows = self._table.teacher_rows(teacher_of(self._pipe), ids, mask)
        return self._table.numbers(ids, mask)[0], rows[0]
