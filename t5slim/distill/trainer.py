"""Distil a student, or several, in the place of a pipeline's T5."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import ProjectConfiguration, broadcast  # type: ignore[import-untyped]
from torch import Tensor
from tqdm.auto import tqdm

from ..encoder import SlimT5Encoder
from ..errors import DistillError
from .checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from .checks import check_launch, check_trainable
from .config import DistillConfig
from .examples import Examples
from .learner import Learner
from .metrics import VelocityGap
from .objective import Objective
from .prompts import Prompts, PromptSchedule, PromptSource, load_prompts, prompt_source
from .records import (
    CHECKPOINTS,
    Records,
    check_output_dir,
    check_same_run,
    make_repositories,
    repository_names,
    run_facts,
)
from .result import DistillResult
from .samples import Samples
from .sharding import is_sharded
from .states import frozen, master_weights
from .teacher import PromptTable
from .tracking import Trackers, history_entry, peak_memory_gib, reset_peak_memory, tracker_names
from .walk import check_pipeline_kwargs


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
    push_to_hub: bool | str = False,
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
    push_to_hub: bool | str = False,
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
    push_to_hub: bool | str = False,
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
            `history.jsonl`, `distillation.json` and `checkpoints/`; in the end also `README.md`, a
            model card, and `run.png`, a plot. Loaded with
            `SlimT5Encoder.from_pretrained(output_dir)`. Of several students, each has a folder in
            it: `student-0`, `student-1`...
        resume: go on with the run in `output_dir`; start it, if there is none yet.
        push_to_hub: upload the student in the end, with its model card: to this repository
            (`owner/name`), or, if True, to one that is named as `output_dir`. It is made before the
            training. Of several students, each has one: `owner/name-0`, `owner/name-1`...

    Returns:
        A `DistillResult`, whose `student` is the one passed; of several students, a list of them.

    Raises:
        DistillError: no prompts; a student that is the teacher; an `output_dir` that holds another
            run, or can't be written; `pipeline_kwargs` that the pipeline doesn't take; a tracker
            that isn't installed; or too many gradients in a row that are not finite. The student
            then holds the last good weights.
        NoT5SlotError: the pipeline has no T5.
        IncompatibleStudentError: the student has another vocabulary, or rows of another width.
        ConfigError: see `DistillConfig`.
        HubAccessError: the repository of `push_to_hub` can't be made or written.
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
    folder = None if output_dir is None else Path(output_dir)
    if resume and folder is None:
        raise DistillError("resume=True needs the output_dir of the run that is to go on.")
    if config.samples_every and (held_out is None or folder is None):
        raise DistillError(
            "samples_every needs eval_prompts, of which the first are painted, and an output_dir."
        )
    accelerator = Accelerator(
        log_with=tracker_names(config, folder) or None,
        project_config=ProjectConfiguration(
            logging_dir=None if folder is None else folder / "logs"
        ),
    )
    check_launch(accelerator)
    facts = run_facts(pipe, students, config, kwargs, source, held_out, accelerator.num_processes)
    checkpoint = None
    if folder is not None and resume:
        facts = check_same_run(folder, facts)
        checkpoint = load_checkpoint(folder / CHECKPOINTS)
    elif folder is not None:
        check_output_dir(folder)
    repositories = repository_names(push_to_hub, folder, len(students))
    if accelerator.is_main_process:
        repositories = make_repositories(repositories)

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
    # With the students in their own dtype again.
    for result, records in zip(results, run.records, strict=True):
        records.finish(result)
    if accelerator.is_main_process:
        for result, records, repository in zip(results, run.records, repositories, strict=False):
            records.push(result, repository)
    return results if isinstance(student, Sequence) else results[0]


_SECONDS_BETWEEN_LOSSES = 5.0


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
        self._rate = 0.0  # of the last update
        self._prompts_per_update = facts["prompts_per_update"]
        self._measure = self._samples = None
        # A denoiser in parts is called by all processes, or by none.
        if held_out is not None and (accelerator.is_main_process or is_sharded(pipe)):
            if config.samples_every:
                painted = held_out[: config.sample_prompts]
                self._samples = Samples(pipe, painted, pipeline_kwargs, config.seed)
            self._measure = VelocityGap(pipe, held_out, pipeline_kwargs=pipeline_kwargs)
        process = (accelerator.process_index, accelerator.num_processes)
        table = PromptTable()
        self._examples = Examples(pipe, source, config, pipeline_kwargs, table, process)
        self._objective = Objective(pipe, table, config)
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
                loss = self._objective.loss(learner.encode, batch, weights)
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
        torch.manual_seed((self._config.seed << 40) + place * processes + index)

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
        for i, (learner, result) in enumerate(zip(self._learners, self._results, strict=True)):
            self._update_result(i)
            result.loss = losses[i].item()
            result.peak_memory_gib = max(memory, result.peak_memory_gib)
            if self._measure is not None:
                # Real tokens and padding apart are two more rounds, and so for the end.
                result.report = self._measure.report(learner.average, parts=finished)
                result.gap = result.raw_gap = result.report.gap
                if learner.average is not learner.student:
                    result.raw_gap = self._measure(learner.student)
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
