"""Distil a student, or several, in the place of the T5 of a pipeline, or of several."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import ProjectConfiguration  # type: ignore[import-untyped]

from ..checkpoint import check_no_lora
from ..encoder import SlimT5Encoder
from ..errors import DistillError
from .checkpoints import load_checkpoint
from .checks import check_launch, check_trainable
from .config import DistillConfig
from .loop import Loop, interruptible
from .pipeline import check_pipeline_kwargs
from .prompts import Prompts, PromptSchedule, load_prompts, prompt_source
from .records import (
    CHECKPOINTS,
    check_output_dir,
    check_same_run,
    make_repositories,
    repository_names,
    run_facts,
)
from .result import DistillResult
from .states import frozen, master_weights
from .tracking import tracker_names

PipelineKwargs = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


@overload
def train(
    pipe: Any,
    student: SlimT5Encoder,
    prompts: Prompts,
    config: DistillConfig | None = None,
    *,
    pipeline_kwargs: PipelineKwargs = None,
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
    pipeline_kwargs: PipelineKwargs = None,
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
    pipeline_kwargs: PipelineKwargs = None,
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
        pipe: a pipeline with a T5 in its text slot, on the device to train on. Or several, for one
            student that serves all of them: updates take turns between them, and each has its own
            walks. Of one teacher (the same module in all of them), each prompt is encoded once.
        student: with the vocabulary of that T5 and the width of its rows. Trained in place. Several
            share the teacher's walks: a series of sizes for less than the price of its runs, with
            the same results.
        prompts: a list, or a text file with one prompt on each line; blank ones are dropped.
        config: the settings; `DistillConfig.paper()` has those of the paper.
        pipeline_kwargs: how the pipeline is called: `height`, `width`, `num_inference_steps`,
            `guidance_scale`, `max_sequence_length`, `negative_prompt`...: what the student should
            be good at. `num_inference_steps` may be smaller than in use: 20 in the paper. For
            several pipelines, a list with those of each, or the same for all.
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
    pipes = list(pipe) if isinstance(pipe, Sequence) else [pipe]
    kwargs_of = _kwargs_of_each(pipes, pipeline_kwargs)
    students = list(student) if isinstance(student, Sequence) else [student]
    source = prompt_source(prompts)
    if isinstance(source, PromptSchedule):
        source.check_updates(config.max_steps)
    held_out = None if eval_prompts is None else load_prompts(eval_prompts, "eval_prompts")
    if not students:
        raise DistillError("There is no student to distil: the list of them is empty.")
    for teacher, kwargs in zip(pipes, kwargs_of, strict=True):
        for one in students:
            check_trainable(teacher, one, config)
        check_pipeline_kwargs(teacher, kwargs)
    device = _device_of(pipes)
    folder = None if output_dir is None else Path(output_dir)
    for one in students if folder is not None or push_to_hub else ():
        check_no_lora(one)
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
    facts = run_facts(
        pipes, students, config, kwargs_of, source, held_out, accelerator.num_processes
    )
    checkpoint = None
    if folder is not None and resume:
        facts = check_same_run(folder, facts)
        checkpoint = load_checkpoint(folder / CHECKPOINTS)
    elif folder is not None:
        check_output_dir(folder)
    repositories = repository_names(push_to_hub, folder, len(students))
    if accelerator.is_main_process:
        repositories = make_repositories(repositories)

    with ExitStack() as stack:
        for teacher in pipes:
            stack.enter_context(frozen(teacher, config.gradient_checkpointing))
        for one in students:
            stack.enter_context(master_weights(one, device))
        # Dropout draws from the global generators: seeded here, and given back as they were.
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        loop = Loop(
            accelerator, pipes, students, config, source, kwargs_of, held_out, folder, facts
        )
        if checkpoint is not None:
            loop.restore(checkpoint)
        loop.updates(stack.enter_context(interruptible()))
        results = loop.finish()
    # With the students in their own dtype again.
    for result, records in zip(results, loop.records, strict=True):
        records.finish(result)
    if accelerator.is_main_process:
        for result, records, repository in zip(results, loop.records, repositories, strict=False):
            records.push(result, repository)
    return results if isinstance(student, Sequence) else results[0]


def _kwargs_of_each(pipes: Sequence[Any], pipeline_kwargs: PipelineKwargs) -> list[dict[str, Any]]:
    """How each pipeline is called."""
    if not pipes:
        raise DistillError("There is no pipeline to learn from: the list of them is empty.")
    if pipeline_kwargs is None or isinstance(pipeline_kwargs, Mapping):
        return [dict(pipeline_kwargs or {}) for _ in pipes]
    if len(pipeline_kwargs) != len(pipes):
        raise DistillError(
            f"pipeline_kwargs is a list of {len(pipeline_kwargs)} for {len(pipes)} pipelines; "
            "expected as many, or one mapping for all."
        )
    return [dict(kwargs) for kwargs in pipeline_kwargs]


def _device_of(pipes: Sequence[Any]) -> torch.device:
    """The device that all pipelines are on."""
    devices = [torch.device(pipe._execution_device) for pipe in pipes]
    if len(set(devices)) > 1:
        where = ", ".join(f"{type(p).__name__} on {d}" for p, d in zip(pipes, devices, strict=True))
        raise DistillError(f"Expected all pipelines on one device, got {where}.")
    return devices[0]
