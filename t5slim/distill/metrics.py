"""The velocity gap: how much of what the denoiser reads from the prompt the student loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import DistillError
from ..slot import find_text_slot
from .checks import Prompts, check_student, load_prompts
from .fallback import predict_through_pipeline
from .losses import VelocityLoss
from .pipeline import teacher_of
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
class GapReport:
    """A velocity gap, and where it comes from.

    Attributes:
        gap: the velocity gap: 0 is the teacher, 1 an empty prompt.
        thirds: the gap of the first, middle and last third of the trajectory alone; None for a
            third without a step.
        spread: how far the student's rows are apart between prompts, over the same of the
            teacher's: 1 is the teacher's, 0 that all prompts are told the same (a collapse). The
            root of the rows' variance between the prompts that are walked together, at each
            position; of pipelines that mask the padding, without it. None for a single prompt.
        real_tokens: the gap if only the rows of the prompts' own tokens, with the one that ends
            them, are the student's, and those of the padding the teacher's. None if not asked for.
        padding: the gap if only the rows of the padding are the student's. Both together come to
            less or more than `gap`, as the denoiser isn't linear.
    """

    gap: float
    thirds: tuple[float | None, float | None, float | None]
    spread: float | None
    real_tokens: float | None = None
    padding: float | None = None


def mean_report(reports: Sequence[GapReport]) -> GapReport:
    """The mean over several pipelines; None where one of them has no value."""

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(reports) else None

    return GapReport(
        sum(report.gap for report in reports) / len(reports),
        tuple(map(mean, zip(*(report.thirds for report in reports), strict=True))),  # type: ignore[arg-type]
        mean(report.spread for report in reports),
        mean(report.real_tokens for report in reports),
        mean(report.padding for report in reports),
    )


@dataclass(frozen=True)
class _Part:
    """Prompts that were walked together.

    Attributes:
        numbers: those of their prompts that aren't empty.
        calls: the rows of each denoiser call, None where all are those of the empty prompt; or the
            walk, where the pipeline is no gather.
    """

    numbers: list[int]
    calls: list[Rows | None] | Walk


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
        self._parts: list[_Part] = []
        starts = range(0, len(prompts), batch_size)
        for i, start in enumerate(tqdm(starts, desc="walk for the velocity gap", leave=False)):
            walk = capture(
                pipe, prompts[start : start + batch_size],
                pipeline_kwargs=pipeline_kwargs, seed=seed + i, encode=self._table.teacher_rows,
            )  # fmt: skip
            self._parts.append(self._part(walk))
        self._denominators = self._distances(self._empty_rows)
        if not sum(self._denominators) > 0:
            raise DistillError(
                "The denoiser predicts the same for these prompts as for an empty one, so that the "
                "gap would divide by zero. Are the prompts empty, or the denoiser untrained?"
            )
        self._teacher_spread = self._spread(self._teacher_rows)

    def __call__(self, student: nn.Module) -> float:
        """The gap of a student; its mode (train or eval) is as before when this returns."""
        return self.report(student).gap

    def report(self, student: nn.Module, *, parts: bool = False) -> GapReport:
        """The gap of a student, by thirds of the trajectory, and its spread.

        Args:
            student: its mode (train or eval) is as before when this returns.
            parts: also measure real tokens and padding apart, for three times the denoiser passes.
        """

        def of_student(numbers: list[int]) -> Tensor:
            return encode_prompts(student, self._table, numbers, self._device)

        def mixed(real: bool) -> Callable[[list[int]], Tensor]:
            def rows(numbers: list[int]) -> Tensor:
                teacher = self._teacher_rows(numbers)
                students = (self._real_tokens(numbers) == real)[..., None]
                return torch.where(students, of_student(numbers).to(teacher.dtype), teacher)

            return rows

        with evaluating(student):
            distances = self._distances(of_student)
            spread = self._spread(of_student)
            apart = [sum(self._distances(mixed(real))) for real in (True, False) if parts]
        whole = sum(self._denominators)
        first, middle, last = (
            d / denominator if denominator else None
            for d, denominator in zip(distances, self._denominators, strict=True)
        )
        return GapReport(
            sum(distances) / whole,
            (first, middle, last),
            math.sqrt(spread / self._teacher_spread) if self._teacher_spread else None,
            *(distance / whole for distance in apart),
        )

    # --- distances ---

    @torch.no_grad()
    def _distances(self, rows_of: Callable[[list[int]], Tensor]) -> list[float]:
        """For each third of the trajectory, the sum over its rows of the squared distance to the
        teacher's prediction, if the text is what `rows_of` says of prompts by number.
        """
        loss = VelocityLoss()
        totals = [0.0, 0.0, 0.0]
        for part in self._parts:
            replay = self._replay_walk if isinstance(part.calls, Walk) else self._replay_rows
            for third, prediction, target in replay(part, rows_of):
                totals[third] += loss(prediction, target).sum().item() * target[0].numel()
        return totals

    def _replay_rows(
        self, part: _Part, rows_of: Callable[[list[int]], Tensor]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        assert not isinstance(part.calls, Walk)
        rows = rows_of(part.numbers)
        places = {number: i for i, number in enumerate(part.numbers)}
        for i, call in enumerate(part.calls):
            if call is not None:
                index = torch.tensor([places[n] for n in call.prompts], device=self._device)
                yield 3 * i // len(part.calls), predict(self._pipe, call, rows[index]), call.target

    def _replay_walk(
        self, part: _Part, rows_of: Callable[[list[int]], Tensor]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        walk = part.calls
        assert isinstance(walk, Walk)

        def encode(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
            teacher = self._table.teacher_rows(teacher_of(self._pipe), input_ids, attention_mask)
            numbers = self._table.numbers(input_ids, attention_mask)
            empty = torch.tensor([n == self._empty for n in numbers], device=teacher.device)
            return torch.where(empty[:, None, None], teacher, rows_of(numbers))

        calls = range(len(walk.denoiser_calls))
        predictions = predict_through_pipeline(self._pipe, walk, encode, calls)
        for i, prediction in predictions.items():
            yield 3 * i // len(calls), prediction, walk.denoiser_calls[i].target

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

    def _part(self, walk: Walk) -> _Part:
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
            return _Part(sorted(numbers - {self._empty}), walk)
        kept = [self._prompted(call) for call in calls]
        numbers = {number for call in kept if call is not None for number in call.prompts}
        return _Part(sorted(numbers), kept)

    def _prompted(self, rows: Rows) -> Rows | None:
        kept = [i for i, n in enumerate(rows.prompts) if n not in (NO_PROMPT, self._empty)]
        if not kept:
            return None
        return rows if len(kept) == len(rows) else rows.select(kept)

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
