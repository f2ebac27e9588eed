"""Distil a student, or several, in the place of a pipeline's T5."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import broadcast  # type: ignore[import-untyped]
from torch import Tensor
from tqdm.auto import tqdm

from ..encoder import SlimT5Encoder
from ..errors import DistillError
from .checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from .checks import check_trainable
from .config import DistillConfig
from .examples import Examples
from .learner import Learner
from .metrics import VelocityGap
from .objective import Objective
from .prompts import Prompts, PromptSchedule, PromptSource, load_prompts, prompt_source
from .records import CHECKPOINTS, Records, check_output_dir, check_same_run, run_facts
from .states import cpu_attention, frozen, master_weights
from .teacher import PromptTable
from .walk import check_pipeline_kwargs


@dataclass
class DistillResult:
    """What a distillation came to.

    Attributes:
        student: the student that was passed, trained: averaged weights, in its dtype, in eval mode.
        steps: updates made.
        skipped: of them, those left out because a gradient wasn't finite.
        seconds: training time, without evaluations and checkpoints.
        teacher_rows: batch rows that the denoiser predicted for the teacher, over all processes.
        student_rows: batch rows that it predicted for this student (and went backwards through).
        loss: mean over the updates since the last entry of `history`.
        gap: velocity gap of the student on `eval_prompts`; None without.
        raw_gap: the same with the last weights instead of the averaged ones.
        history: an entry for each evaluation: step, seconds, teacher_rows, student_rows, loss,
            gap. The file `history.jsonl` holds the same.
    """

    student: SlimT5Encoder
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    teacher_rows: int = 0
    student_rows: int = 0
    loss: float = math.nan
    gap: float | None = None
    raw_gap: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


@overload
def train(
    pipe: Any,
    student: SlimT5Encoder,
    prompts: Prompts,
    config: DistillConfig | None = None,
    *,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    eval_prompts: Prompts | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> DistillResult: ...
@overload
def train(
    pipe: Any,
    student: Sequence[SlimT5Encoder],
    prompts: Prompts,
    config: DistillConfig | None = None,
    *,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    eval_prompts: Prompts | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> list[DistillResult]: ...
def train(
    pipe: Any,
    student: SlimT5Encoder | Sequence[SlimT5Encoder],
    prompts: Prompts,
    config: DistillConfig | None = None,
    *,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    eval_prompts: Prompts | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> DistillResult | list[DistillResult]:
    """Distil `student` to take the place of the T5 in `pipe`. No images are needed, only prompts.

    The pipeline is the teacher: it is run on the prompts as a user would run it, and the student
    learns to make its denoiser predict the same. Teacher, denoiser and everything else in the
    pipeline are frozen; the student's encoder and projection are trained in float32, whatever the
    student's dtype.

        result = train(pipe, student, "prompts.txt", pipeline_kwargs={"height": 512, "width": 512})
        patch_pipeline(pipe, result.student)

    On several GPUs, start with `accelerate launch`, each process with the pipeline on its own
    device.

    A run with an `output_dir` can be killed at any moment. Called again with `resume=True` and
    otherwise the same, it goes on from its last checkpoint, to bitwise the same weights (where the
    device computes the same twice). On SIGTERM and Ctrl-C it writes one first.

    Args:
        pipe: a pipeline with a T5 in its text slot, on the device to train on.
        student: with the vocabulary of that T5 and the width of its rows. Trained in place. Several
            share the teacher's walks: a series of sizes for less than the price of its runs, with
            the same results.
        prompts: a list, or a text file with one prompt on each line; blank ones are dropped.
        config: the settings; `DistillConfig.paper()` has those of the paper.
        pipeline_kwargs: how the pipeline is called: `height`, `width`, `num_inference_steps`,
            `guidance_scale`, `max_sequence_length`, `negative_prompt`...: what the student should
            be good at. `num_inference_steps` may be smaller than in use: 20 in the paper.
        eval_prompts: prompts to measure the velocity gap on every `config.eval_every` updates, as a
            list or file. They should not be among `prompts`.
        output_dir: where to save the student (at each evaluation and in the end) with
            `history.jsonl`, `distillation.json` and `checkpoints/`. Loaded with
            `SlimT5Encoder.from_pretrained(output_dir)`. Of several students, each has a folder in
            it: `student-0`, `student-1`...
        resume: go on with the run in `output_dir`; start it, if there is none yet.

    Returns:
        A `DistillResult`, whose `student` is the one passed; of several students, a list of them.

    Raises:
        DistillError: no prompts; a student that is the teacher; an `output_dir` that holds another
            run, or can't be written; `pipeline_kwargs` that the pipeline doesn't take; or too many
            gradients in a row that are not finite. The student then holds the last good weights.
        NoT5SlotError: the pipeline has no T5.
        IncompatibleStudentError: the student has another vocabulary, or rows of another width.
        ConfigError: see `DistillConfig`.
        KeyboardInterrupt: after a checkpoint was written.
    """
    config = config or DistillConfig()
    kwargs = dict(pipeline_kwargs or {})
    students = list(student) if isinstance(student, Sequence) else [student]
    source = prompt_source(prompts)
    if isinstance(source, PromptSchedule):
        source.check_updates(config.max_steps)
    held_out = None if eval_prompts is None else load_prompts(eval_prompts, "eval_prompts")
    if not students:
        raise DistillError("There is no student to distil: the list of them is empty.")
    for one in students:
        check_trainable(pipe, one, config)
    check_pipeline_kwargs(pipe, kwargs)
    accelerator = Accelerator()
    facts = run_facts(pipe, students, config, kwargs, source, held_out, accelerator.num_processes)
    folder = None if output_dir is None else Path(output_dir)
    if resume and folder is None:
        raise DistillError("resume=True needs the output_dir of the run that is to go on.")
    checkpoint = None
    if folder is not None and resume:
        check_same_run(folder, facts)
        checkpoint = load_checkpoint(folder / CHECKPOINTS)
    elif folder is not None:
        check_output_dir(folder)

    device = torch.device(pipe._execution_device)
    with ExitStack() as stack:
        stack.enter_context(frozen(pipe, config.gradient_checkpointing))
        for one in students:
            stack.enter_context(master_weights(one, device))
        # Dropout draws from the global generators: seeded here, and given back as they were.
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        run = _Run(accelerator, pipe, students, config, source, kwargs, held_out, folder, facts)
        if checkpoint is not None:
            run.restore(checkpoint)
        run.updates(stack.enter_context(_interruptible()))
        results = run.finish()
    for result, records in zip(results, run.records, strict=True):
        records.save_student(result.student)  # in its own dtype again
    return results if isinstance(student, Sequence) else results[0]


class _Run:
    """The loop of updates."""

    def __init__(
        self,
        accelerator: Accelerator,
        pipe: Any,
        students: list[SlimT5Encoder],
        config: DistillConfig,
        source: PromptSource,
        pipeline_kwargs: dict[str, Any],
        held_out: list[str] | None,
        folder: Path | None,
        facts: dict[str, Any],
    ) -> None:
        self._accelerator = accelerator
        self._config = config
        self._device = torch.device(pipe._execution_device)
        self._folder = folder if accelerator.is_main_process else None
        self._step = 0
        self._seconds = 0.0
        self._measure = None
        if held_out is not None and accelerator.is_main_process:
            self._measure = VelocityGap(pipe, held_out, pipeline_kwargs=pipeline_kwargs)
        process = (accelerator.process_index, accelerator.num_processes)
        table = PromptTable()
        self._examples = Examples(pipe, source, config, pipeline_kwargs, table, process)
        self._objective = Objective(pipe, table, config)
        self._learners = [Learner(accelerator, s, config, self._device) for s in students]
        # Sum and number since the last evaluation; on the device, as reading would wait for it.
        self._losses = torch.zeros(2, len(students), device=self._device)
        self._results = [DistillResult(student) for student in students]
        folders = [self._folder] * len(students)
        if self._folder is not None and len(students) > 1:
            folders = [self._folder / f"student-{i}" for i in range(len(students))]
            Records(self._folder, facts)
        self.records = [Records(folder, facts) for folder in folders]

    def updates(self, interrupted: Callable[[], int | None]) -> None:
        """Train until `max_steps` or `max_seconds`, whichever comes first."""
        config = self._config
        bar = tqdm(
            total=config.max_steps, initial=self._step, desc="distil", unit="update",
            disable=not self._accelerator.is_main_process,
        )  # fmt: skip
        with bar:
            finished = self._step >= config.max_steps or self._out_of_time()
            while not finished:
                start = time.perf_counter()
                self._update()
                self._seconds += time.perf_counter() - start
                self._step += 1
                finished = self._step >= config.max_steps or self._out_of_time()
                if finished or self._step % config.eval_every == 0:
                    self._evaluate(finished)
                signal_number = self._agreed(interrupted() or 0)
                if finished or signal_number or self._step % config.checkpoint_every == 0:
                    self._save_checkpoint()
                if signal_number:
                    self._stop(signal_number)
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
            for name, value in counters["results"][i].items():
                setattr(result, name, value)
        self._examples.restore(counters["examples"])

    # --- one update ---

    def _update(self) -> None:
        config, update = self._config, self._step
        weights = self._objective.weights_at(update)
        batches = self._examples.batches(update, walked="velocity" in weights)
        steps = config.gradient_accumulation_steps
        for number, batch in enumerate(batches, start=1):
            for i, learner in enumerate(self._learners):
                # Dropout is a function of the update, too, so that no generator needs to be saved,
                # and the students of a series drop out as each would by itself.
                self._seed(update, number)
                with cpu_attention(self._device, config.autocast_dtype):
                    loss = self._objective.loss(learner.encode, batch, weights)
                    learner.backward(loss, last=number == steps)
                finite = loss.detach().isfinite()
                self._losses[0, i] += torch.where(finite, loss.detach(), 0)
                self._losses[1, i] += finite
        rate = config.learning_rate_at(update, self._seconds)
        for learner in self._learners:
            learner.step(update, rate)
            if learner.skipped_in_a_row >= config.max_skipped_updates:
                self._give_up(learner)

    def _seed(self, update: int, number: int) -> None:
        place = update * self._config.gradient_accumulation_steps + number
        processes, index = self._accelerator.num_processes, self._accelerator.process_index
        torch.manual_seed((self._config.seed << 40) + place * processes + index)

    def _give_up(self, learner: Learner) -> None:
        where = "" if self._folder is None else f", and {self._folder} the last checkpoint"
        raise DistillError(
            f"The gradients of {learner.skipped_in_a_row} updates in a row, up to number "
            f"{self._step + 1}, are not finite. The student holds the weights before them{where}. "
            "Try a smaller learning_rate, or mixed_precision='bf16' instead of 'fp16'."
        )

    # --- when to stop ---

    def _agreed(self, value: float) -> int:
        """The highest value of any process: all must stop at the same update."""
        if self._accelerator.num_processes == 1:
            return int(value)
        values = self._accelerator.gather(torch.tensor([int(value)], device=self._device))
        return int(values.max())

    def _out_of_time(self) -> bool:
        if self._config.max_seconds is None:
            return False
        if self._accelerator.num_processes > 1:
            seconds = torch.tensor(self._seconds, dtype=torch.float64, device=self._device)
            self._seconds = broadcast(seconds).item()
        return self._seconds >= self._config.max_seconds

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
        for i, (learner, result) in enumerate(zip(self._learners, self._results, strict=True)):
            self._update_result(i)
            result.loss = losses[i].item()
            if self._measure is not None:
                result.gap = self._measure(learner.average)
                if finished:
                    averaged = learner.average is not learner.student
                    result.raw_gap = self._measure(learner.student) if averaged else result.gap
            names = ("seconds", "teacher_rows", "student_rows", "skipped", "loss", "gap")
            entry = {"step": result.steps, **{name: getattr(result, name) for name in names}}
            result.history.append(entry)
            self.records[i].add(entry, _plain(result))
            if not finished:  # `train` saves the last one, in the student's own dtype
                self.records[i].save_student(learner.average)
        self._accelerator.wait_for_everyone()

    def _update_result(self, i: int) -> None:
        result = self._results[i]
        result.steps, result.seconds = self._step, self._seconds
        result.skipped = self._learners[i].skipped
        result.teacher_rows = self._examples.teacher_rows
        result.student_rows = self._examples.student_rows

    def _save_checkpoint(self) -> None:
        if self._folder is not None:
            tensors: dict[str, Tensor] = {}
            counters: dict[str, Any] = {
                "seconds": self._seconds,
                "losses": self._losses.tolist(),
                "examples": self._examples.state(),
                "learners": [],
                "results": [],
            }
            for i, learner in enumerate(self._learners):
                self._update_result(i)
                own, plain = learner.state()
                tensors |= {f"{i}.{name}": tensor for name, tensor in own.items()}
                counters["learners"].append(plain)
                counters["results"].append(_plain(self._results[i]))
            save_checkpoint(
                self._folder / CHECKPOINTS, self._step, tensors, counters,
                self._config.keep_checkpoints,
            )  # fmt: skip
        self._accelerator.wait_for_everyone()

    def _postfix(self) -> dict[str, str]:
        loss = self._results[0].loss
        gaps = [result.gap for result in self._results if result.gap is not None]
        shown = {"loss": f"{loss:.3g}"}
        if gaps:
            shown["gap"] = " ".join(f"{gap:.4f}" for gap in gaps)
        return shown


def _plain(result: DistillResult) -> dict[str, Any]:
    return {k: v for k, v in vars(result).items() if k not in ("student", "history")}


@contextmanager
def _interruptible() -> Iterator[Callable[[], int | None]]:
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
