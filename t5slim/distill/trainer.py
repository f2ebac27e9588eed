"""Distil a student in the place of a pipeline's T5."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import broadcast  # type: ignore[import-untyped]
from torch import Tensor
from tqdm.auto import tqdm

from ..encoder import SlimT5Encoder
from ..errors import DistillError
from .calls import autocast
from .checks import (
    HISTORY_FILE,
    METADATA_FILE,
    Prompts,
    check_output_dir,
    check_trainable,
    load_prompts,
)
from .config import DistillConfig
from .examples import EmbeddingExamples, VelocityExamples
from .metrics import VelocityGap
from .states import cpu_attention, frozen, master_weights
from .walk import check_pipeline_kwargs


@dataclass
class DistillResult:
    """What a distillation came to.

    Attributes:
        student: the student that was passed, trained: averaged weights, in its dtype, in eval mode.
        steps: updates made.
        seconds: training time, without evaluations and checkpoints.
        teacher_rows: batch rows that the denoiser predicted for the teacher, over all processes.
        student_rows: batch rows that it predicted for the student (and went backwards through).
        loss: mean over the updates since the last entry of `history`.
        gap: velocity gap of the student on `eval_prompts`; None without.
        raw_gap: the same with the last weights instead of the averaged ones.
        history: an entry for each evaluation: step, seconds, teacher_rows, student_rows, loss,
            gap. The file `history.jsonl` holds the same.
    """

    student: SlimT5Encoder
    steps: int = 0
    seconds: float = 0.0
    teacher_rows: int = 0
    student_rows: int = 0
    loss: float = math.nan
    gap: float | None = None
    raw_gap: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def train(
    pipe: Any,
    student: SlimT5Encoder,
    prompts: Prompts,
    config: DistillConfig | None = None,
    *,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    eval_prompts: Prompts | None = None,
    output_dir: str | os.PathLike[str] | None = None,
) -> DistillResult:
    """Distil `student` to take the place of the T5 in `pipe`. No images are needed, only prompts.

    The pipeline is the teacher: it is run on the prompts as a user would run it, and the student
    learns to make its denoiser predict the same. Teacher, denoiser and everything else in the
    pipeline are frozen; the student's encoder and projection are trained in float32, whatever the
    student's dtype.

        result = train(pipe, student, "prompts.txt", pipeline_kwargs={"height": 512, "width": 512})
        patch_pipeline(pipe, result.student)

    On several GPUs, start with `accelerate launch`, each process with the pipeline on its own
    device.

    Args:
        pipe: a pipeline with a T5 in its text slot, on the device to train on.
        student: with the vocabulary of that T5 and the width of its rows. Trained in place.
        prompts: a list, or a text file with one prompt on each line; blank ones are dropped.
        config: the settings; `DistillConfig.paper()` has those of the paper.
        pipeline_kwargs: how the pipeline is called: `height`, `width`, `num_inference_steps`,
            `guidance_scale`, `max_sequence_length`, `negative_prompt`...: what the student should
            be good at. `num_inference_steps` may be smaller than in use: 20 in the paper.
        eval_prompts: prompts to measure the velocity gap on every `config.eval_every` updates, as a
            list or file. They should not be among `prompts`.
        output_dir: where to save the student (at each evaluation and in the end) with
            `history.jsonl` and `distillation.json`. Loaded with
            `SlimT5Encoder.from_pretrained(output_dir)`.

    Returns:
        A `DistillResult`; its `student` is the one passed.

    Raises:
        DistillError: no prompts; a student that is the teacher; an `output_dir` that holds another
            run; `pipeline_kwargs` that the pipeline doesn't take; or a loss that is not finite any
            more, and then the student and `output_dir` hold the last good weights.
        NoT5SlotError: the pipeline has no T5.
        IncompatibleStudentError: the student has another vocabulary, or rows of another width.
        ConfigError: see `DistillConfig`.
    """
    config = config or DistillConfig()
    kwargs = dict(pipeline_kwargs or {})
    prompts = load_prompts(prompts, "prompts")
    held_out = None if eval_prompts is None else load_prompts(eval_prompts, "eval_prompts")
    check_trainable(pipe, student, config)
    check_pipeline_kwargs(pipe, kwargs)
    folder = None if output_dir is None else check_output_dir(Path(output_dir))

    accelerator = Accelerator()
    device = torch.device(pipe._execution_device)
    with ExitStack() as stack:
        stack.enter_context(frozen(pipe, config.gradient_checkpointing))
        stack.enter_context(master_weights(student, device))
        # Dropout draws from the global generators: seeded here, and given back as they were.
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(config.seed + accelerator.process_index)

        measure = None
        if held_out is not None and accelerator.is_main_process:
            measure = VelocityGap(pipe, held_out, pipeline_kwargs=kwargs)
        examples_class = VelocityExamples if config.objective == "velocity" else EmbeddingExamples
        facts = _facts(pipe, student, config, kwargs, prompts, held_out)
        run = _Run(accelerator, student, config, measure, folder, facts)
        shard = prompts[accelerator.process_index :: accelerator.num_processes] or prompts
        seed = config.seed + 7919 * accelerator.process_index
        run.updates(run.timed(lambda: examples_class(pipe, shard, config, kwargs, seed)), device)
    return run.finish()


class _Run:
    """The loop of updates, and what it leaves behind."""

    def __init__(
        self,
        accelerator: Accelerator,
        student: SlimT5Encoder,
        config: DistillConfig,
        measure: VelocityGap | None,
        folder: Path | None,
        facts: dict[str, Any],
    ) -> None:
        self._accelerator = accelerator
        self._student = student
        self._config = config
        self._measure = measure
        self._folder = folder if accelerator.is_main_process else None
        # What is measured, saved and returned; without averaging, the trained student itself.
        self._average = copy.deepcopy(student).eval() if config.ema_decay else student
        self._losses: list[float] = []
        self._facts = facts
        self.result = DistillResult(student)
        self._write_metadata()

    def timed(self, work: Callable[[], Any]) -> Any:
        """Do work that counts as training time."""
        start = time.perf_counter()
        done = work()
        self.result.seconds += time.perf_counter() - start
        return done

    def updates(self, examples: VelocityExamples | EmbeddingExamples, device: torch.device) -> None:
        """Train until `max_steps` or `max_seconds`, whichever comes first."""
        config, result, accelerator = self._config, self.result, self._accelerator
        trained = [p for p in self._student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=config.weight_decay)
        # device_placement: the student is on the pipeline's device, which need not be accelerate's.
        model, optimizer = accelerator.prepare(
            self._student.train(), optimizer, device_placement=[False, False]
        )

        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else None

        def encode(*args: Any, **kwargs: Any) -> Any:
            with autocast(device, dtype):
                return model(*args, **kwargs)

        def update() -> float:
            # Set here, not by a scheduler: accelerate steps a prepared one num_processes times.
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(result.steps, result.seconds)
            with cpu_attention(device, dtype):
                loss = examples.loss(encode).mean()
                accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            if not torch.isfinite(norm):
                raise DistillError(
                    f"The gradient of update {result.steps + 1} is not finite (loss "
                    f"{loss.item()}). The student holds the weights before that update, and "
                    "output_dir its last checkpoint. Try a smaller learning_rate."
                )
            optimizer.step()
            optimizer.zero_grad()
            self._update_average()
            return loss.item()

        bar = tqdm(
            total=config.max_steps, desc="distil", unit="update",
            disable=not accelerator.is_main_process,
        )  # fmt: skip
        with bar:
            finished = False
            while not finished:
                self._losses.append(self.timed(update))
                result.steps += 1
                result.teacher_rows = examples.teacher_rows * accelerator.num_processes
                result.student_rows = examples.student_rows * accelerator.num_processes
                finished = result.steps >= config.max_steps or self._out_of_time(device)
                if finished or result.steps % config.eval_every == 0:
                    self._evaluate(finished)
                gap = "-" if result.gap is None else f"{result.gap:.4f}"
                recent = self._losses[-100:] or [result.loss]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.3g}", gap=gap, refresh=False)
                bar.update()
        # `accelerate launch --mixed_precision` wraps the student's forward, and unwrapping would
        # leave its bound method on the instance, which a copy of the student would share.
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        vars(self._student).pop("forward", None)

    def finish(self) -> DistillResult:
        """Give the student its averaged weights, and write what remains to be written."""
        if self._average is not self._student:
            with torch.no_grad():
                for parameter, average in self._pairs():
                    parameter.copy_(average)
        if self._folder is not None:
            self._student.save_pretrained(self._folder)
        return self.result

    def _evaluate(self, finished: bool) -> None:
        result = self.result
        result.loss = sum(self._losses) / len(self._losses)
        self._losses.clear()
        if self._measure is not None:
            result.gap = self._measure(self._average)
            if finished:
                averaged = self._average is not self._student
                result.raw_gap = self._measure(self._student) if averaged else result.gap
        names = ("seconds", "teacher_rows", "student_rows", "loss", "gap")
        entry = {"step": result.steps, **{name: getattr(result, name) for name in names}}
        result.history.append(entry)
        if self._folder is not None:
            with open(self._folder / HISTORY_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            self._write_metadata()
            if not finished:  # `finish` saves the last one, in the student's own dtype
                self._average.save_pretrained(self._folder)
        self._accelerator.wait_for_everyone()

    def _write_metadata(self) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        outcome = {k: v for k, v in vars(self.result).items() if k not in ("student", "history")}
        text = json.dumps({**self._facts, "result": outcome}, indent=2, default=str) + "\n"
        temporary = self._folder / f".{METADATA_FILE}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self._folder / METADATA_FILE)

    def _update_average(self) -> None:
        if self._average is self._student:
            return
        # Short at first, so that the random start is forgotten as fast as it is trained away.
        decay = min(self._config.ema_decay, (1 + self.result.steps) / (10 + self.result.steps))
        with torch.no_grad():
            for parameter, average in self._pairs():
                average.lerp_(parameter, 1 - decay)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self._student.parameters(), self._average.parameters(), strict=True)

    def _out_of_time(self, device: torch.device) -> bool:
        if self._config.max_seconds is None:
            return False
        if self._accelerator.num_processes > 1:  # all must stop at the same update
            seconds = torch.tensor(self.result.seconds, dtype=torch.float64, device=device)
            self.result.seconds = broadcast(seconds).item()
        return self.result.seconds >= self._config.max_seconds


def _facts(
    pipe: Any,
    student: SlimT5Encoder,
    config: DistillConfig,
    pipeline_kwargs: dict[str, Any],
    prompts: list[str],
    eval_prompts: list[str] | None,
) -> dict[str, Any]:
    """What a reader of the checkpoint, or its model card, needs to know of its making."""
    packages = ("t5slim", "torch", "diffusers", "transformers", "accelerate")
    return {
        "pipeline": type(pipe).__name__,
        "pipeline_name_or_path": pipe.config.get("_name_or_path"),
        "student_base_model": getattr(student.config, "base_model", None),
        "config": config.to_dict(),
        "pipeline_kwargs": pipeline_kwargs,
        "num_prompts": len(prompts),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "num_eval_prompts": 0 if eval_prompts is None else len(eval_prompts),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return None
