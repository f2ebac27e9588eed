"""Start a run that a file describes: check what is cheap, load what is not, train or plan."""

from __future__ import annotations

import copy
import inspect
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]

from ..errors import DistillError
from ..slot import fill_slot, find_text_slot, free_memory, restore_slot, slot_entry
from .cached import cache_teacher, cached_teacher
from .checks import check_launch
from .draws import WalkShape, prompts_of_run
from .examples import Examples
from .pipeline import DENOISERS, check_pipeline_kwargs
from .plan import CachePlan, Plan, first_prompts, make_plan
from .prompts import PromptList, PromptSchedule, load_prompts, prompt_source, split_held_out
from .records import METADATA_FILE, check_output_dir, check_same_run, run_facts
from .result import DistillResult
from .sources import load_student
from .states import frozen
from .teacher import PromptTable
from .tracking import tracker_names
from .trainer import train

if TYPE_CHECKING:
    from .run import DistillRun

RUN_FILE = "run.yaml"


class Launch:
    """A run that is about to start, in this process.

    Prompts and students are read, and everything that doesn't need the pipeline is checked, as this
    is made.

    Args:
        run: what it was told.
    """

    def __init__(self, run: DistillRun) -> None:
        self._run = run
        self._kwargs = dict(run.pipeline_kwargs)
        self._folder = Path(run.output_dir)
        # Not PartialState, which is deaf to ACCELERATE_USE_CPU.
        self._accelerator = Accelerator()
        check_launch(self._accelerator)
        if not run.resume:
            check_output_dir(self._folder)
        tracker_names(run.config, self._folder)
        self._cls = run.pipeline.pipeline_class()
        self._slot = find_text_slot(self._cls)
        check_pipeline_kwargs(self._cls, self._kwargs)
        self._prompts = prompt_source(run.prompts)
        self._held_out = None
        if run.holds_out:
            options = dict(run.eval_prompts)
            self._prompts, self._held_out = split_held_out(
                self._prompts, options.pop("held_out"), **options
            )
        elif run.eval_prompts is not None:
            self._held_out = load_prompts(run.eval_prompts, "eval_prompts")
        if isinstance(self._prompts, PromptSchedule):
            self._prompts.check_updates(run.config.max_steps)
        self._students = [load_student(source, run.config.seed) for source in run.students]

    def train(self) -> DistillResult | list[DistillResult]:
        """See `DistillRun`."""
        run = self._run
        with self._pipeline() as pipe, self._recorded():
            results = train(
                pipe, self._students, self._prompts, run.config, pipeline_kwargs=self._kwargs,
                eval_prompts=self._held_out, output_dir=self._folder, resume=run.resume,
                push_to_hub=run.push_to_hub,
            )  # fmt: skip
        return results if isinstance(run.student, list) else results[0]

    def plan(self) -> Plan:
        """See `DistillRun`."""
        run = self._run
        if run.teacher_cache is None:
            return self._plan(self._load())
        processes = self._accelerator.num_processes
        few = first_prompts(self._prompts, run.config, processes)
        with tempfile.TemporaryDirectory(prefix="t5slim-") as folder:
            pipe = self._load(self._not_for_text)
            start = time.perf_counter()
            cache = cache_teacher(pipe, few, folder, pipeline_kwargs=self._kwargs)
            seconds = time.perf_counter() - start
            del pipe
            pipe = self._load([self._slot.name])
            with cached_teacher(pipe, cache):
                plan = self._plan(pipe)
            drawn = prompts_of_run(self._prompts, run.config, processes, plan.walk_shape)
            count = len({*drawn, *(self._held_out or ()), ""})
            place = Path(run.teacher_cache).absolute()
            place = next(parent for parent in (place, *place.parents) if parent.exists())
            cost = CachePlan(
                prompts=count,
                bytes=count * cache.bytes_on_disk // len(cache),
                free_bytes=shutil.disk_usage(place).free,
                seconds=count * seconds / len(cache) / processes,
            )
        return replace(plan, cache=cost)

    def _plan(self, pipe: Any) -> Plan:
        return make_plan(
            pipe, self._students, self._prompts, self._run.config, pipeline_kwargs=self._kwargs,
            eval_prompts=self._held_out,
        )  # fmt: skip

    # --- the pipeline ---

    @property
    def _not_for_text(self) -> list[str]:
        """Components that a prompt is encoded without."""
        parameters = inspect.signature(self._cls).parameters
        return [name for name in (*DENOISERS, "vae") if name in parameters]

    def _load(self, without: list[str] | tuple[str, ...] = ()) -> Any:
        free_memory()  # of the pipeline before, which was loaded with other parts
        return self._run.pipeline.load(self._cls, self._accelerator.device, without)

    @contextmanager
    def _pipeline(self) -> Iterator[Any]:
        """The pipeline, with its T5 or with the rows of all prompts that the run will draw.

        T5 and the denoiser are never in memory together then. What is drawn depends on how often
        the denoiser is called, so that it is loaded first; again after T5, if T5 is needed.
        """
        run, accelerator = self._run, self._accelerator
        if run.teacher_cache is None:
            yield self._load()
            return
        pipe = self._load([self._slot.name])
        shape = self._without_teacher(pipe)
        prompts = prompts_of_run(self._prompts, run.config, accelerator.num_processes, shape)
        prompts += self._held_out or []
        share = prompts[accelerator.process_index :: accelerator.num_processes] or [""]

        def fill(pipe: Any) -> None:
            cache_teacher(pipe, share, run.teacher_cache or "", pipeline_kwargs=self._kwargs)

        try:
            fill(pipe)  # without T5, this asks whether all is there
            complete = True
        except DistillError:
            complete = False
        # Outside of the `except`, whose error keeps the pipeline alive.
        if not all(gather_object([complete])):
            del pipe
            pipe = self._load(self._not_for_text)
            fill(pipe)
            del pipe
            pipe = self._load([self._slot.name])
        accelerator.wait_for_everyone()
        with cached_teacher(pipe, run.teacher_cache):
            yield pipe

    def _without_teacher(self, pipe: Any) -> WalkShape:
        """What can be asked of a pipeline without T5, with a student in its place.

        Is this the run that goes on, and what does a walk ask the denoiser?
        """
        run = self._run
        denoiser = next(d for name in DENOISERS if (d := getattr(pipe, name, None)) is not None)
        guest: Any = copy.deepcopy(self._students[0])
        guest.to(device=pipe._execution_device, dtype=denoiser.dtype)
        entry = slot_entry(pipe, self._slot)
        fill_slot(pipe, self._slot, guest)
        try:
            if run.resume:
                facts = run_facts(
                    [pipe], self._students, run.config, [self._kwargs], self._prompts,
                    self._held_out, self._accelerator.num_processes,
                )  # fmt: skip
                check_same_run(self._folder, facts)
            if "velocity" not in run.config.terms:
                return WalkShape(0, (), whole=False)
            single = replace(
                run.config, objective="velocity", batch_size=1, gradient_accumulation_steps=1
            )
            with frozen(pipe, gradient_checkpointing=False):
                table, prompts = PromptTable(), PromptList(["a"])
                return Examples(pipe, prompts, single, self._kwargs, table).walk()
        finally:
            restore_slot(pipe, self._slot, None, entry)

    # --- the record ---

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """`run.yaml` in the folder of a run that starts; not if it fails before it has begun."""
        begun = self._folder / METADATA_FILE
        path = self._folder / RUN_FILE
        # Of a run that goes on, how it was begun stays.
        if begun.exists() or not self._accelerator.is_main_process:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_text(self._run.to_yaml(), encoding="utf-8")
        try:
            yield
        finally:
            if not begun.exists():
                path.unlink()
                with suppress(OSError):  # it holds something else
                    self._folder.rmdir()
