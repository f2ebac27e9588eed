"""What a distillation came to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..encoder import SlimT5Encoder
from .gap import GapReport, mean_report


@dataclass
class DistillResult:
    """What a distillation came to; `print(result)` shows a table.

    Attributes:
        student: the student that was passed, trained: averaged weights, in its dtype, in eval mode.
        output_dir: where it was saved, with the records of the run; None: nowhere.
        steps: updates made.
        skipped: of them, those left out because a gradient wasn't finite.
        seconds: training time, without evaluations, sample pictures and checkpoints.
        teacher_rows: batch rows that the denoiser predicted for the teacher, over all processes.
        student_rows: batch rows that it predicted for this student (and went backwards through).
        loss: mean over the updates since the last entry of `history`.
        reports: the velocity gap on `eval_prompts` for each pipeline, and where it comes from;
            empty without.
        raw_gap: velocity gap with the last weights instead of the averaged ones; None without. Of
            several pipelines, the mean of theirs.
        peak_memory_gib: the highest use of a device (without accelerator: of a process), in GiB.
        history: an entry for each evaluation, with the scalars of `tracking.SCALARS` by name. The
            file `history.jsonl` holds the same.
    """

    student: SlimT5Encoder = field(repr=False)
    output_dir: Path | None = None
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    teacher_rows: int = 0
    student_rows: int = 0
    loss: float = math.nan
    reports: list[GapReport] = field(default_factory=list)
    raw_gap: float | None = None
    peak_memory_gib: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def report(self) -> GapReport | None:
        """Where `gap` comes from: thirds of the trajectory, real tokens and padding, and how far
        prompts are apart. Of several pipelines, the mean of `reports`.
        """
        return mean_report(self.reports) if self.reports else None

    @property
    def gap(self) -> float | None:
        """Velocity gap of the student on `eval_prompts`; None without. Of several pipelines, the
        mean of theirs.
        """
        return None if self.report is None else self.report.gap

    def facts(self) -> dict[str, Any]:
        """All but the student, its place and the history, as plain values for JSON."""
        plain = {k: v for k, v in vars(self).items() if k not in _NOT_FACTS}
        return plain | {
            "gap": self.gap,
            "report": None if self.report is None else asdict(self.report),
            "reports": list(map(asdict, self.reports)),
        }

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from what `facts` returned."""
        for name in vars(self).keys() & facts.keys():
            setattr(self, name, facts[name])
        self.reports = [
            GapReport(**{**plain, "thirds": tuple(plain["thirds"])}) for plain in facts["reports"]
        ]

    def rows(self) -> list[tuple[str, str]]:
        """What there is to say, as (name, value) of a table."""
        rows = [
            ("updates", f"{self.steps:,}" + (f", {self.skipped:,} skipped" * bool(self.skipped)))
        ]
        if self.gap is not None:
            raw = "" if self.raw_gap in (None, self.gap) else f"; last weights {self.raw_gap:.4f}"
            rows.append(
                ("velocity gap (0: the teacher, 1: an empty prompt)", f"{self.gap:.4f}{raw}")
            )
        if len(self.reports) > 1:
            gaps = (f"{report.gap:.4f}" for report in self.reports)
            rows.append(("  of each pipeline", "  ".join(gaps)))
        if self.report is not None:
            r = self.report
            rows.append(("  of each third of the trajectory", "  ".join(map(_short, r.thirds))))
            if r.real_tokens is not None:
                apart = f"{_short(r.real_tokens)}  {_short(r.padding)}"
                rows.append(("  of real tokens, of padding", apart))
            rows.append(("spread between prompts (1: the teacher's)", _short(r.spread)))
        if self.seconds:
            time = str(timedelta(seconds=round(self.seconds)))
            teacher, student = self.teacher_rows, self.student_rows
            rate = (teacher + student) / self.seconds
            rows += [
                ("loss", f"{self.loss:.4g}"),
                ("training time", f"{time}, {self.steps / self.seconds:.3g} updates a second"),
                ("denoiser rows, of the teacher", f"{teacher:,}"),
                ("denoiser rows, of the student", f"{student:,}, both {rate:.3g} a second"),
                ("peak memory", f"{self.peak_memory_gib:.2f} GiB"),
            ]
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        if self.output_dir is not None:
            rows.append(("saved in", str(self.output_dir)))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


_NOT_FACTS = ("student", "output_dir", "history")


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
