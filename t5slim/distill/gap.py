"""A velocity gap that was measured: where it comes from, by prompt, call and token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
class GapTable:
    """A velocity gap by prompt and by denoiser call.

    Attributes:
        distances: (P, C) float64, for each of P prompts and of C calls the squared distance of the
            predictions under the student and under the teacher, summed over their elements. Zero
            for the rows of an empty prompt.
        denominators: (P, C) float64, those of the empty prompt and the teacher.
    """

    distances: Tensor
    denominators: Tensor

    @property
    def gap(self) -> float:
        """The velocity gap."""
        return (self.distances.sum() / self.denominators.sum()).item()

    @property
    def of_prompts(self) -> Tensor:
        """(P,), the gap of each prompt; NaN for an empty one."""
        return self.distances.sum(1) / self.denominators.sum(1)

    @property
    def of_calls(self) -> Tensor:
        """(C,), the gap at each call, in the order of the trajectory; NaN for a call that reads the
        negative prompt alone.
        """
        return self.distances.sum(0) / self.denominators.sum(0)

    @property
    def of_thirds(self) -> tuple[float | None, float | None, float | None]:
        """The gap of the first, middle and last third of the calls; None for one without a step."""
        C = self.distances.shape[1]
        thirds = torch.tensor([3 * call // C for call in range(C)])
        sums = [
            (self.distances[:, thirds == i].sum(), self.denominators[:, thirds == i].sum())
            for i in range(3)
        ]
        first, middle, last = ((d / whole).item() if whole else None for d, whole in sums)
        return first, middle, last
