"""The loop of updates of a distillation, and what it does between them."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import broadcast  # type: ignore[import-untyped]
from torch import Tensor
from tqdm.auto import tqdm

from ..encoder import SlimT5Encoder
from ..errors import DistillError
from .checkpoints import Checkpoint, save_checkpoint
from .config import DistillConfig
from .examples import Examples
from .learner import Learner
from .metrics import VelocityGap
from .objective import Objective
from .pipeline import teacher_of
from .prompts import PromptSource
from .records import CHECKPOINTS, Records
from .result import DistillResult
from .samples import Samples
from .sharding import is_sharded
from .teacher import PromptTable
from .tracking import Trackers, history_entry, peak_memory_gib, reset_peak_memory

_SECONDS_BETWEEN_LOSSES = 5.0


@dataclass(frozen=True)
class _Lesson:
    """What a run has of one pipeline: what to learn from, how, and how well it was learned."""

    examples: Examples
    objective: Objective
    measure: VelocityGap | None


class Loop:
    """The loop of updates. Of several pipelines, updates take turns.

    Args:
        accelerator: distributes the students.
        pipes: with their teachers, frozen, on one device.
        students: in float32, on that device.
        config: the settings.
        source: of the prompts.
        kwargs_of: how each pipeline is called.
        held_out: prompts to measure on, or None.
        folder: of the run, or None.
        facts: of the run, from `run_facts`.

    Attributes:
        records: of each student.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipes: Sequence[Any],
        students: list[SlimT5Encoder],
        config: DistillConfig,
        source: PromptSource,
        kwargs_of: Sequence[dict[str, Any]],
        held_out: list[str] | None,
        folder: Path | None,
        facts: dict[str, Any],
    ) -> None:
        self._accelerator = accelerator
        self._config = config
        self._device = torch.device(pipes[0]._execution_device)
        self._folder = folder if accelerator.is_main_process else None
        self._step = 0
        self._seconds = 0.0
        self._rate = 0.0  # of the last update
        self._prompts_per_update = facts["prompts_per_update"]
        self._samples: Samples | None = None
        if config.samples_every and held_out is not None and self._measures(pipes[0]):
            painted = held_out[: config.sample_prompts]
            self._samples = Samples(pipes[0], painted, kwargs_of[0], config.seed)
        process = (accelerator.process_index, accelerator.num_processes)
        tables: dict[int, PromptTable] = {}  # by teacher: pipelines may share one
        self._lessons = []
        for pipe, kwargs in zip(pipes, kwargs_of, strict=True):
            measure = None
            if held_out is not None and self._measures(pipe):
                measure = VelocityGap(pipe, held_out, pipeline_kwargs=kwargs)
            table = tables.setdefault(id(teacher_of(pipe)), PromptTable())
            examples = Examples(pipe, source, config, kwargs, table, process)
            self._lessons.append(_Lesson(examples, Objective(pipe, table, config), measure))
        self._learners = [Learner(accelerator, s, config, self._device) for s in students]
        # Sum and number since the last evaluation; on the device, as reading waits for it. For the
        # bar, the first student's is read every few seconds.
        self._losses = torch.zeros(2, len(students), device=self._device)
        self._loss, self._loss_read = math.nan, -math.inf
        reset_peak_memory(self._device)
        folders = [self._folder] * len(students)
        if self._folder is not None and len(students) > 1:
            folders = [self._folder / f"student-{i}" for i in range(len(students))]
            Records(self._folder, facts)
        self.records = [Records(folder, facts) for folder in folders]
        self._results = [DistillResult(s, f) for s, f in zip(students, folders, strict=True)]
        self._trackers = Trackers(accelerator, folder, facts, len(students))

    def _measures(self, pipe: Any) -> bool:
        # A denoiser in parts is called by all processes, or by none.
        return self._accelerator.is_main_process or is_sharded(pipe)

    def updates(self, interrupted: Callable[[], int | None]) -> None:
        """Train until `max_steps` or `max_seconds`, whichever comes first."""
        config = self._config
        bar = tqdm(
            total=self._expected_steps(), initial=self._step, desc="distil", unit="update",
            smoothing=0, disable=not self._accelerator.is_main_process,
        )  # fmt: skip
        with self._trackers.started(self._step), bar:
            finished = self._step >= config.max_steps or self._out_of_time()
            while not finished:
                start = time.perf_counter()
                self._update()
                self._seconds += time.perf_counter() - start
                self._step += 1
                finished = self._step >= config.max_steps or self._out_of_time()
                if finished or self._step % config.eval_every == 0:
                    bar.set_description("evaluate")
                    self._evaluate(finished)
                    bar.set_description("distil", refresh=False)
                if config.samples_every and (finished or self._step % config.samples_every == 0):
                    self._paint_samples()
                signal_number = int(self._highest(interrupted() or 0))
                if finished or signal_number or self._step % config.checkpoint_every == 0:
                    self._save_checkpoint()
                if signal_number:
                    self._stop(signal_number)
                bar.total = self._expected_steps()
                if not bar.disable:
                    bar.set_postfix(self._postfix(), refresh=False)
                bar.update()

    def finish(self) -> list[DistillResult]:
        """Give the students their averaged weights."""
        for learner in self._learners:
            learner.finish()
        return self._results

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        counters = checkpoint.counters
        self._step, self._seconds = checkpoint.step, counters["seconds"]
        self._losses.copy_(torch.tensor(counters["losses"]))
        for i, learner in enumerate(self._learners):
            prefix = f"{i}."
            tensors = {
                name.removeprefix(prefix): tensor
                for name, tensor in checkpoint.tensors.items()
                if name.startswith(prefix)
            }
            learner.restore(tensors, counters["learners"][i])
            result = self._results[i]
            result.history = self.records[i].resume_history(checkpoint.step)
            result.restore(counters["results"][i])
        finished = self._step >= self._config.max_steps or self._out_of_time()
        for lesson, state in zip(self._lessons, counters["examples"], strict=True):
            lesson.examples.restore(state, walk=not finished)

    # --- one update ---

    def _update(self) -> None:
        config, update = self._config, self._step
        lesson = self._lessons[update % len(self._lessons)]
        weights = lesson.objective.weights_at(update)
        batches = lesson.examples.batches(update, walked="velocity" in weights)
        steps = config.gradient_accumulation_steps
        for number, batch in enumerate(batches, start=1):
            for i, learner in enumerate(self._learners):
                # Dropout is a function of the update, too, so that no generator needs to be saved,
                # and the students of a series drop out as each would by itself.
                self._seed(update, number)
                loss = lesson.objective.loss(learner.encode, batch, weights)
                learner.backward(loss, last=number == steps)
                finite = loss.detach().isfinite()
                self._losses[0, i] += torch.where(finite, loss.detach(), 0)
                self._losses[1, i] += finite
        self._rate = config.learning_rate_at(update, self._seconds)
        for learner in self._learners:
            learner.step(update, self._rate)
            if learner.skipped_in_a_row >= config.max_skipped_updates:
                self._give_up(learner)

    def _seed(self, update: int, number: int) -> None:
        place = update * self._config.gradient_accumulation_steps + number
        processes, index = self._accelerator.num_processes, self._accelerator.process_index
        seed = (self._config.seed << 40) + place * processes + index
        if self._device.type == "cpu":
            # Without the other devices, for which torch.manual_seed takes a third of a millisecond.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def _give_up(self, learner: Learner) -> None:
        where = "" if self._folder is None else f", and {self._folder} the last checkpoint"
        raise DistillError(
            f"The gradients of {learner.skipped_in_a_row} updates in a row, up to number "
            f"{self._step + 1}, are not finite. The student holds the weights before them{where}. "
            "Try a smaller learning_rate, or mixed_precision='bf16' instead of 'fp16'."
        )

    # --- when to stop ---

    def _highest(self, value: float) -> float:
        """The highest value of any process."""
        if self._accelerator.num_processes == 1:
            return value
        values = self._accelerator.gather(torch.tensor([value], device=self._device))
        return values.max().item()

    def _out_of_time(self) -> bool:
        if self._config.max_seconds is None:
            return False
        if self._accelerator.num_processes > 1:
            seconds = torch.tensor(self._seconds, dtype=torch.float64, device=self._device)
            self._seconds = broadcast(seconds).item()
        return self._seconds >= self._config.max_seconds

    def _expected_steps(self) -> int:
        """Updates in all, for the bar: whatever ends the run first, its ETA is the run's."""
        config = self._config
        if config.max_seconds is None or not self._step:
            return config.max_steps
        in_time = round(self._step * config.max_seconds / self._seconds)
        return min(config.max_steps, max(self._step, in_time))

    def _stop(self, signal_number: int) -> None:
        how = "" if self._folder is None else (
            f" Its checkpoint is written: call train again with resume=True and "
            f"output_dir={str(self._folder)!r}, and it goes on."
        )  # fmt: skip
        message = f"Distillation was stopped after update {self._step}.{how}"
        if signal_number == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(message)

    # --- what it leaves behind ---

    def _evaluate(self, finished: bool) -> None:
        sums, counts = self._accelerator.reduce(self._losses, "sum")
        losses = sums / counts  # NaN, if none was finite
        self._losses.zero_()
        memory = self._highest(peak_memory_gib(self._device))
        measures = [lesson.measure for lesson in self._lessons if lesson.measure is not None]
        for i, (learner, result) in enumerate(zip(self._learners, self._results, strict=True)):
            self._update_result(i)
            result.loss = losses[i].item()
            result.peak_memory_gib = max(memory, result.peak_memory_gib)
            if measures:
                # Real tokens and padding apart are two more rounds, and so for the end.
                result.reports = [m.report(learner.average, parts=finished) for m in measures]
                result.raw_gap = result.gap
                if learner.average is not learner.student:
                    result.raw_gap = sum(m(learner.student) for m in measures) / len(measures)
            entry = history_entry(
                result,
                learning_rate=self._rate,
                grad_norms=learner.take_grad_norms(),
                prompts_per_update=self._prompts_per_update,
                students=len(self._learners),
            )
            result.history.append(entry)
            self.records[i].add(result)
            self._trackers.log(entry, i)
            if not finished:  # `train` saves the last one, in the student's own dtype
                self.records[i].save_student(learner.average)
        self._accelerator.wait_for_everyone()

    def _paint_samples(self) -> None:
        if self._samples is not None and self._samples.pictures:
            for i, (learner, records) in enumerate(zip(self._learners, self.records, strict=True)):
                sheet = self._samples.sheet(learner.average, f"student, update {self._step:,}")
                records.add_samples(sheet, self._step)
                self._trackers.show(sheet, self._step, i)
        self._accelerator.wait_for_everyone()

    def _update_result(self, i: int) -> None:
        result = self._results[i]
        result.steps, result.seconds = self._step, self._seconds
        result.skipped = self._learners[i].skipped
        result.teacher_rows = sum(lesson.examples.teacher_rows for lesson in self._lessons)
        result.student_rows = sum(lesson.examples.student_rows for lesson in self._lessons)

    def _save_checkpoint(self) -> None:
        if self._folder is not None:
            tensors: dict[str, Tensor] = {}
            counters: dict[str, Any] = {
                "seconds": self._seconds,
                "losses": self._losses.tolist(),
                "examples": [lesson.examples.state() for lesson in self._lessons],
                "learners": [],
                "results": [],
            }
            for i, learner in enumerate(self._learners):
                self._update_result(i)
                own, plain = learner.state()
                tensors |= {f"{i}.{name}": tensor for name, tensor in own.items()}
                counters["learners"].append(plain)
                counters["results"].append(self._results[i].facts())
            save_checkpoint(
                self._folder / CHECKPOINTS, self._step, tensors, counters,
                self._config.keep_checkpoints,
            )  # fmt: skip
        self._accelerator.wait_for_everyone()

    def _postfix(self) -> dict[str, str]:
        now = time.monotonic()
        if now - self._loss_read > _SECONDS_BETWEEN_LOSSES:
            self._loss_read = now
            sums, counts = self._losses[:, 0].tolist()
            self._loss = sums / counts if counts else self._results[0].loss
        gaps = [result.gap for result in self._results if result.gap is not None]
        shown = {"loss": f"{self._loss:.3g}"}
        if gaps:
            shown["gap"] = " ".join(f"{gap:.4f}" for gap in gaps)
        return shown


@contextmanager
def interruptible() -> Iterator[Callable[[], int | None]]:
    """Yields a function that says which of SIGINT and SIGTERM came, if one did.

    The update under way is finished first; a second signal does what it always does.
    """
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, before[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
