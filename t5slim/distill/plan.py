"""What a run will take, before it is started: memory, denoiser rows, disk and time."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]

from ..encoder import SlimT5Encoder
from ..slot import free_memory
from .checks import check_trainable
from .config import DistillConfig
from .draws import WalkShape, lanes_of, turns
from .examples import Examples
from .memory import Part, checkpoint_bytes, pipeline_parts, show_bytes, student_parts
from .pipeline import check_pipeline_kwargs
from .prompts import PromptList, Prompts, PromptSchedule, PromptSource, load_prompts, prompt_source
from .states import frozen
from .teacher import PromptTable
from .trainer import train

_MEASURED = 3  # updates, after one that warms up


@dataclass(frozen=True)
class CachePlan:
    """What filling the teacher's cache takes.

    Attributes:
        prompts: different ones.
        bytes: of their rows on disk.
        free_bytes: of that disk.
        seconds: to encode them.
    """

    prompts: int
    bytes: int
    free_bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.prompts:,} prompts, {show_bytes(self.bytes)} on a disk with "
            f"{show_bytes(self.free_bytes)} free, about {_show_seconds(self.seconds)}"
        )


@dataclass(frozen=True)
class Plan:
    """What a run will take; `print(plan)` shows a table.

    Attributes:
        pipeline: its class.
        device: that it is on, in this process.
        processes: that the run is spread over. Memory is that of the main one.
        parts: what takes memory all the time; activations come on top.
        peak_bytes: of memory: the highest in the updates that were measured, and what fills up
            later. None on the CPU.
        updates: of the student.
        prompts: drawn, with repetitions.
        teacher_rows: batch rows that the denoiser will predict for the teacher.
        student_rows: that it will predict for the students, and go backwards through.
        eval_rows: that it will predict in evaluations, at most.
        checkpoint_bytes: of each.
        checkpoints: that are kept.
        seconds_per_update: without walks, measured.
        seconds_per_walk: of a round of walks, measured.
        seconds: of the whole run, without checkpoints and sample pictures.
        walk_shape: what a walk asks the denoiser.
        cache: what filling the teacher's cache will take; None without one.
    """

    pipeline: str
    device: str
    processes: int
    parts: tuple[Part, ...]
    peak_bytes: int | None
    updates: int
    prompts: int
    teacher_rows: int
    student_rows: int
    eval_rows: int
    checkpoint_bytes: int
    checkpoints: int
    seconds_per_update: float
    seconds_per_walk: float
    seconds: float
    walk_shape: WalkShape
    cache: CachePlan | None = None

    @property
    def bytes(self) -> int:
        """Memory of all parts that are on the device at once."""
        there = sum(part.bytes for part in self.parts if part.waits is None)
        return there + max((p.bytes for p in self.parts if p.waits == "whole"), default=0)

    def __str__(self) -> str:
        processes = f", {self.processes} processes" if self.processes > 1 else ""
        table = [(f"{self.pipeline} on {self.device}{processes}", "parameters", "memory")]
        for part in self.parts:
            waits = f", offloaded {part.waits}" if part.waits else ""
            count = "" if part.parameters is None else f"{part.parameters:,}"
            table.append((f"  {part.name}{waits}", count, show_bytes(part.bytes)))
        table.append(("  together, without activations", "", show_bytes(self.bytes)))
        if self.peak_bytes is not None:
            table.append(("  with them, measured", "", show_bytes(self.peak_bytes)))
        rows = [
            ("updates", f"{self.updates:,}"),
            ("prompts drawn", f"{self.prompts:,}"),
            ("denoiser rows for the teacher", f"{self.teacher_rows:,}"),
            ("  for the student, also backwards", f"{self.student_rows:,}"),
            ("  for evaluations, at most", f"{self.eval_rows:,}"),
            ("checkpoints", f"{self.checkpoints} of {show_bytes(self.checkpoint_bytes)}"),
            ("teacher's cache", str(self.cache)) if self.cache else ("", ""),
            ("a round of walks, measured", f"{self.seconds_per_walk:.3g} s"),
            ("an update, measured", f"{self.seconds_per_update:.3g} s"),
            ("the run", f"about {_show_seconds(self.seconds)}"),
        ]
        width = max(len(name) for name, *_ in table)
        lines = [f"{name:<{width}}{count:>16}{size:>12}" for name, count, size in table]
        lines += ["", *(f"{name:<{width}}  {value}" for name, value in rows if name)]
        return "\n".join(lines)


def _show_seconds(seconds: float) -> str:
    return str(timedelta(seconds=math.ceil(seconds)))


def make_plan(
    pipe: Any,
    student: SlimT5Encoder | Sequence[SlimT5Encoder],
    prompts: Prompts,
    config: DistillConfig | None = None,
    *,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    eval_prompts: Prompts | None = None,
) -> Plan:
    """What `train`, called with the same, will take.

    Bytes are counted on the loaded modules, prompts and rows by the order in which the run will
    draw them, time in a few updates of a copy of the student. Nothing is written, and pipeline and
    student are as before when this returns.

    Args: those of `train`.

    Raises: what `train` raises before it starts.
    """
    config = config or DistillConfig()
    kwargs = dict(pipeline_kwargs or {})
    students = list(student) if isinstance(student, Sequence) else [student]
    source = prompt_source(prompts)
    held_out = [] if eval_prompts is None else load_prompts(eval_prompts, "eval_prompts")
    if isinstance(source, PromptSchedule):
        source.check_updates(config.max_steps)
    for one in students:
        check_trainable(pipe, one, config)
    check_pipeline_kwargs(pipe, kwargs)
    accelerator = Accelerator()
    processes = accelerator.num_processes
    device = torch.device(pipe._execution_device)

    few = PromptList(first_prompts(source, config, processes))
    walks = _Walks(WalkShape(0, (), whole=False), 0.0, 0, 0.0)
    if "velocity" in config.terms:
        walks = _measure_walks(pipe, few, config, kwargs, accelerator)
    drawn = list(turns(config, processes, walks.shape))
    rounds = sum(turn.walked for turn in drawn)
    update_seconds, peak_gib = _measure_updates(pipe, students, few, config, kwargs, walks)

    lanes, parallel = lanes_of(config, processes), lanes_of(config, 1)
    depth = min(rounds, max(1, config.reservoir_walks // lanes))
    fill = {
        f"trajectories ({depth * lanes} walks)": depth * walks.bytes,
        f"held-out trajectories ({len(held_out)} walks)": len(held_out) * walks.bytes // parallel,
    }
    # Those that are measured have one round in the reservoir, and no held-out prompts.
    later = sum(fill.values()) - walks.bytes
    # Walked once, then asked of the empty prompt, and of each student's averaged and last weights;
    # at the end also of its tokens and of its padding.
    evaluations = math.ceil(config.max_steps / config.eval_every) * (1 + bool(config.ema_decay)) + 2
    eval_rows = len(held_out) * (
        walks.shape.teacher_rows + sum(walks.shape.calls) * (1 + evaluations * len(students))
    )
    seconds = rounds * walks.seconds + update_seconds * config.max_steps
    seconds = min(seconds, config.max_seconds or math.inf) + eval_rows * walks.seconds_per_row
    return Plan(
        pipeline=type(pipe).__name__,
        device=str(device),
        processes=processes,
        parts=(
            *pipeline_parts(pipe),
            *student_parts(students, config),
            *(Part(name, size) for name, size in fill.items() if size),
        ),
        peak_bytes=None if device.type == "cpu" else int(peak_gib * 2**30) + later,
        updates=config.max_steps,
        prompts=lanes * sum(turn.first_draw is not None for turn in drawn),
        teacher_rows=lanes * rounds * walks.shape.teacher_rows,
        student_rows=lanes * len(students) * sum(turn.student_rows for turn in drawn),
        eval_rows=eval_rows,
        checkpoint_bytes=checkpoint_bytes(students, config),
        checkpoints=config.keep_checkpoints,
        seconds_per_update=update_seconds,
        seconds_per_walk=walks.seconds,
        seconds=seconds,
        walk_shape=walks.shape,
    )


def first_prompts(prompts: PromptSource, config: DistillConfig, processes: int) -> list[str]:
    """The prompts of a run's first two rounds: those that `make_plan` measures with."""
    draws = range(2 * lanes_of(config, processes))
    found = (prompts.prompt(draw, config.seed, 0) for draw in draws)
    return list(dict.fromkeys(found))


# --- measured ---


@dataclass(frozen=True)
class _Walks:
    """A round of walks, on one process."""

    shape: WalkShape
    seconds: float
    bytes: int
    seconds_per_row: float


def _measure_walks(
    pipe: Any,
    prompts: PromptSource,
    config: DistillConfig,
    kwargs: dict[str, Any],
    accelerator: Accelerator,
) -> _Walks:
    process = (accelerator.process_index, accelerator.num_processes)
    with frozen(pipe, gradient_checkpointing=False):
        examples = Examples(pipe, prompts, config, kwargs, PromptTable(), process)
        examples.walk()  # warms up
        _synchronize(pipe)
        start = time.perf_counter()
        shape = examples.walk()
        _synchronize(pipe)
        seconds = time.perf_counter() - start
    rows = lanes_of(config, 1) * shape.teacher_rows
    return _Walks(shape, seconds, examples.walk_bytes, seconds / rows)


def _measure_updates(
    pipe: Any,
    students: Sequence[SlimT5Encoder],
    prompts: PromptSource,
    config: DistillConfig,
    kwargs: dict[str, Any],
    walks: _Walks,
) -> tuple[float, float]:
    """Seconds of an update, without walks, and the peak memory in GiB.

    Terms of the objective come and go: of each set of them some updates are made, and the mean
    over the run's is returned.
    """
    kinds = Counter(
        tuple(name for name, term in config.terms.items() if term.weight_at(update))
        for update in range(config.max_steps)
    )
    free_memory()
    seconds = peak = 0.0
    for terms, count in kinds.items():
        changes: dict[str, Any] = {
            "objective": {name: config.terms[name].weight for name in terms},
            "max_steps": 1 + _MEASURED, "max_seconds": None, "eval_every": 1, "samples_every": 0,
            "trackers": (),
        }  # fmt: skip
        results = train(
            pipe, [copy.deepcopy(one) for one in students], prompts, replace(config, **changes),
            pipeline_kwargs=kwargs,
        )  # fmt: skip
        first, last = results[0].history[0], results[0].history[-1]  # the first one warms up
        walked = (last["teacher_rows"] - first["teacher_rows"]) * walks.seconds_per_row
        measured = last["seconds"] - first["seconds"] - walked
        seconds += max(0.0, measured) / _MEASURED * count / config.max_steps
        peak = max(peak, results[0].peak_memory_gib)
    return seconds, peak


def _synchronize(pipe: Any) -> None:
    device = torch.device(pipe._execution_device)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
