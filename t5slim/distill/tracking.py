"""What a run tells while it goes on: its scalars, and the trackers that show them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.tracking import (  # type: ignore[import-untyped]
    LOGGER_TYPE_TO_CLASS,
    get_available_trackers,
)
from accelerate.utils import LoggerType, is_tensorboard_available  # type: ignore[import-untyped]
from PIL import Image

from ..errors import DistillError
from .config import DistillConfig
from .result import DistillResult

LOWER, HIGHER, NEAR_1, OTHER = "lower_is_better", "higher_is_better", "near_1_is_better", "other"

# Every scalar of a run, and where it should go: trackers show it in the group of that name. Names
# are keys of history.jsonl and don't change; a unit, where there is one, is in the name. Of several
# pipelines, there are also velocity_gap_pipeline_0, velocity_gap_pipeline_1, ...
SCALARS = {
    "loss": LOWER,  # mean since the entry before
    "velocity_gap": LOWER,  # 0 to 1 and more: of the averaged weights, on the held-out prompts
    "velocity_gap_raw": LOWER,  # of the last weights
    "velocity_gap_first_third": LOWER,  # of the trajectory, where there is only noise
    "velocity_gap_middle_third": LOWER,
    "velocity_gap_last_third": LOWER,
    "velocity_gap_real_tokens": LOWER,  # if only their rows are the student's; in the last entry
    "velocity_gap_padding": LOWER,
    "embedding_spread": NEAR_1,  # between prompts, over the teacher's; 0: a collapse
    "grad_norm_mean": OTHER,  # since the entry before, before clipping
    "grad_norm_max": OTHER,
    "learning_rate": OTHER,  # of the last update
    "skipped_updates": LOWER,  # since the start
    "prompts_per_second": HIGHER,  # of training time, since the entry before, over all processes
    "denoiser_rows_per_second": HIGHER,  # the teacher's and all students'
    "peak_memory_gib": LOWER,  # since the start, of the device that uses most
    "seconds": OTHER,  # of training, since the start
    "teacher_rows": OTHER,  # that the denoiser predicted, since the start
    "student_rows": OTHER,
}
# What depends on the clock or the machine; all else is the same in a run that was resumed.
CLOCK_SCALARS = ("seconds", "prompts_per_second", "denoiser_rows_per_second", "peak_memory_gib")


def history_entry(
    result: DistillResult,
    *,
    learning_rate: float,
    grad_norms: tuple[float, float] | None,
    prompts_per_update: int,
    students: int,
) -> dict[str, Any]:
    """The scalars of a student after an evaluation, with the number of updates as `step`.

    Args:
        result: as it is now; its history ends with the evaluation before.
        learning_rate: of the last update.
        grad_norms: mean and highest norm since then; None if no gradient was finite.
        prompts_per_update: over all processes.
        students: that are trained together.
    """
    before = {"step": 0, "seconds": 0.0, "teacher_rows": 0, "student_rows": 0}
    before |= result.history[-1] if result.history else {}
    seconds = result.seconds - before["seconds"]
    updates = result.steps - before["step"]
    rows = result.teacher_rows - before["teacher_rows"]
    rows += students * (result.student_rows - before["student_rows"])
    report = result.report
    first, middle, last = (None, None, None) if report is None else report.thirds
    mean, highest = grad_norms or (None, None)
    values = {
        "loss": result.loss,
        "velocity_gap": result.gap,
        "velocity_gap_raw": result.raw_gap,
        "velocity_gap_first_third": first,
        "velocity_gap_middle_third": middle,
        "velocity_gap_last_third": last,
        "velocity_gap_real_tokens": report and report.real_tokens,
        "velocity_gap_padding": report and report.padding,
        "embedding_spread": report and report.spread,
        "grad_norm_mean": mean,
        "grad_norm_max": highest,
        "learning_rate": learning_rate,
        "skipped_updates": result.skipped,
        "prompts_per_second": updates * prompts_per_update / seconds,
        "denoiser_rows_per_second": rows / seconds,
        "peak_memory_gib": result.peak_memory_gib,
        "seconds": result.seconds,
        "teacher_rows": result.teacher_rows,
        "student_rows": result.student_rows,
    }
    if len(result.reports) > 1:
        values |= {f"velocity_gap_pipeline_{i}": one.gap for i, one in enumerate(result.reports)}
    return {"step": result.steps} | {k: v for k, v in values.items() if v is not None}


def tracker_names(config: DistillConfig, folder: Path | None) -> list[str]:
    """The trackers of a run.

    Raises:
        DistillError: one that was asked for isn't installed, or needs a folder.
    """
    if config.trackers is None:
        return ["tensorboard"] if folder is not None and is_tensorboard_available() else []
    for name in config.trackers:
        if LoggerType(name) not in get_available_trackers():
            raise DistillError(
                f"trackers holds {name!r}, which isn't installed: pip install {name}"
            )
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and folder is None:
            raise DistillError(f"trackers holds {name!r}, which writes files: pass an output_dir.")
    return list(config.trackers)


class Trackers:
    """The trackers of a run; nothing where accelerate has none.

    Args:
        accelerator: made with `log_with=tracker_names(...)`. Its main process writes.
        folder: of the run.
        facts: of the run, from `run_facts`, for Weights & Biases to show.
        students: how many there are. What is told of one of several ends in its number.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path | None,
        facts: Mapping[str, Any],
        students: int,
    ) -> None:
        self._accelerator = accelerator
        self._folder = folder
        self._facts = facts
        self._endings = [f"/student-{i}" if students > 1 else "" for i in range(students)]

    @contextmanager
    def started(self, step: int) -> Iterator[None]:
        """Open them; afterwards close them.

        Args:
            step: updates that were made before, if the run goes on.
        """
        facts = dict(self._facts)
        wandb = {"id": facts["run_id"], "resume": "allow", "config": facts}
        if self._folder is not None:
            wandb |= {"name": self._folder.name, "dir": str(self._folder)}
        # What TensorBoard was shown of updates that are made again is taken back.
        tensorboard = {"purge_step": step + 1} if step else {}
        self._accelerator.init_trackers(
            "t5slim", init_kwargs={"wandb": wandb, "tensorboard": tensorboard}
        )
        try:
            yield
        finally:
            # Not by `end_training`, which ends the process group, too: a notebook couldn't train a
            # second time.
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def log(self, entry: Mapping[str, Any], student: int) -> None:
        """Show an entry of a student's history."""
        named = {
            f"{SCALARS.get(name, LOWER)}/{name}{self._endings[student]}": value
            for name, value in entry.items()
            if name != "step"
        }
        self._accelerator.log(named, step=entry["step"])

    def show(self, picture: Image.Image, step: int, student: int) -> None:
        """Show a sheet of sample pictures."""
        named = {f"samples{self._endings[student]}": np.asarray(picture)[None]}
        for tracker in self._accelerator.trackers:
            if hasattr(tracker, "log_images"):  # not all have a place for pictures
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(named, step=step, **layout)


def peak_memory_gib(device: torch.device) -> float:
    """The highest use of `device` since `reset_peak_memory`, in GiB; where the device doesn't count
    it (CPU, MPS), that of this process since it started.
    """
    module = torch.get_device_module(device)
    if hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def reset_peak_memory(device: torch.device) -> None:
    """Forget the highest use so far: T5-XXL may have been loaded and freed again."""
    module = torch.get_device_module(device)
    if hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)
