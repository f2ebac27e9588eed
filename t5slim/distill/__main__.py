"""`t5slim distill`: a run from a YAML file, with arguments that override it; or its dry run."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]
from jsonargparse import Namespace

from ..encoder import SlimT5Config, SlimT5Encoder
from ..errors import ConfigError, DistillError
from ..hub import local_path, write_atomic
from ..slot import TextSlot
from .arguments import Prompts, command_parser, exit_on_error, parse_arguments
from .config import DistillConfig
from .objective import FISHER_SAMPLES
from .pipeline import DENOISERS, check_pipeline_kwargs
from .prompts import PromptSource, split_held_out
from .report import METADATA, check_output_dir
from .teacher import cache_teacher, cached_teacher
from .trainer import check_launch, train


def parse(arguments: Sequence[str] | None) -> tuple[Namespace, DistillConfig, str]:
    """Parse the arguments into the run, its settings, and both as YAML."""
    parser = command_parser("t5slim distill")
    add = parser.add_argument
    add("--dry_run", action="store_true", help="measure time and memory, and leave nothing behind")
    add("--student", type=dict[str, Any], required=True, help="from_pretrained, from_t5 or preset")
    add("--prompts", type=Prompts, required=True, help="file, list or mapping: see docs/prompts.md")
    add("--eval_prompts", type=Prompts | None, default={"held_out": 0.01, "count": 64})
    add("--output_dir", type=str, required=True)
    add("--teacher_cache", type=str | None, help="folder of T5's embeddings of all prompts")
    skip: set[str | int] = {"pipe", "student", "prompts", "config", "eval_prompts", "output_dir"}
    parser.add_function_arguments(train, skip=skip | {"optimizer"})
    settings = parser.add_class_arguments(DistillConfig)
    run, text = parse_arguments(parser, arguments)
    return run, DistillConfig(**{name: run[name] for name in settings}), text


def load_student(source: dict[str, Any], seed: int) -> SlimT5Encoder | SlimT5Config:
    """The student that a mapping describes; of a preset, its config. The seed is for `from_t5`."""
    torch.manual_seed(seed)
    try:
        match source:
            case {"from_pretrained": name, **options}:
                return SlimT5Encoder.from_pretrained(name, **options)
            case {"from_t5": name, **options}:
                return SlimT5Encoder.from_t5(name, **options)
            case {"preset": name, **options}:
                return SlimT5Config.preset(name, **options)
        raise TypeError("expected from_pretrained, from_t5 or preset")
    except TypeError as error:  # also of an option
        raise ConfigError(f"student: {source}; {error}.") from error


def load_without_t5(run: Namespace, accelerator: Accelerator) -> Any:
    """Load all but T5, after it has encoded what `teacher_cache` lacks of the prompts."""
    slot = TextSlot(run.pipeline.cls)
    others = [name for name in (*DENOISERS, "vae") if name in slot.component_types()]
    prompts = run.prompts.all() + (run.eval_prompts or [])
    if not run.dry_run:  # in which each process has a folder of its own
        prompts = prompts[accelerator.process_index :: accelerator.num_processes] or [""]

    def encode(*without: str) -> None:
        pipe = run.pipeline.load(without)
        cache_teacher(pipe, prompts, run.teacher_cache, pipeline_kwargs=run.pipeline_kwargs)

    try:
        encode(slot.name, *others)  # without T5, this only looks whether all prompts are there
    except DistillError:
        encode(*others)
    clear_device_cache(garbage_collection=True)
    accelerator.wait_for_everyone()
    return run.pipeline.load([slot.name])


def measure(run: Namespace, config: DistillConfig, pipe: Any, student: Any, processes: int) -> str:
    """Make four updates without velocity and four with it, and extrapolate to the run."""
    together = config.batch_size * config.gradient_accumulation_steps * processes
    settings: Any = {"max_steps": 8, "embedding_phase": 0.5, "velocity_every": 1, "reuse": 1e9}
    others = {*config.objective} - {"embedding"}  # which all go back through the denoiser
    losses = {"embedding": 1.0} | ({"velocity": 1.0} if others else {})
    settings |= {"objective": losses, "samples_every": 0, "trackers": ()}
    trial = replace(config, eval_every=1, **settings)
    result = train(pipe, student, run.prompts, trial, pipeline_kwargs=run.pipeline_kwargs)
    seconds = [b - a for a, b in pairwise([0.0, *(e["seconds"] for e in result.history)])]
    embedding, velocity = median(seconds[1:4]), median(seconds[5:])
    captures = result.student_samples / 4 / (config.reuse * max(1, result.teacher_samples))
    through = sum("velocity" in config.weights_at(step) for step in range(config.max_steps))
    update = velocity + captures * (seconds[4] - velocity)  # with its share of the trajectories
    total, peak = (config.max_steps - through) * embedding, result.peak_memory_gib
    if "fisher" in config.objective:  # measured before the first update
        through += min(-(-FISHER_SAMPLES // together), config.max_steps)
    total += through * update
    lines = [f"peak memory  {peak:.2f} GiB, before the reservoir is full"] if peak else []
    also = f", with velocity and its trajectories {update:.3g} s" if through else ""
    lines += [f"update       {embedding:.3g} s{also}"]
    lines += [f"run          about {timedelta(seconds=round(total))}, beside T5 and evaluations"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    with exit_on_error(), ExitStack() as stack:
        run, config, text = parse(arguments)
        check_launch(config)
        accelerator = Accelerator(mixed_precision="no")
        folder = Path(local_path(run.output_dir))
        if not run.resume:
            check_output_dir(folder, False, {})
        check_pipeline_kwargs(run.pipeline.cls, run.pipeline_kwargs)
        student = load_student(run.student, config.seed)
        run.prompts = PromptSource(run.prompts)
        match run.eval_prompts:
            case {"held_out": share, **rest} if rest.keys() <= {"count"}:
                count = run.eval_prompts.get("count", 64)
                run.prompts, run.eval_prompts = split_held_out(run.prompts, share, count)
            case dict() | list() | str():
                run.eval_prompts = PromptSource(run.eval_prompts).all()
        if run.dry_run:
            few = run.prompts.all()[: config.batch_size]
            run.prompts, run.eval_prompts = PromptSource(few), None
            run.teacher_cache = run.teacher_cache and stack.enter_context(TemporaryDirectory())

        if run.teacher_cache is None:
            pipe = run.pipeline.load()
        else:
            pipe = load_without_t5(run, accelerator)
            stack.enter_context(cached_teacher(pipe, run.teacher_cache))
        if run.dry_run:
            outcome: Any = measure(run, config, pipe, student, accelerator.num_processes)
        else:
            if accelerator.is_main_process and not (folder / METADATA).exists():
                write_atomic(folder / "run.yaml", text.encode())
            names = ("pipeline_kwargs", "eval_prompts", "output_dir", "resume", "push_to_hub")
            outcome = train(pipe, student, run.prompts, config, **{n: run[n] for n in names})
        if accelerator.is_main_process:
            print(outcome)


if __name__ == "__main__":
    main()
