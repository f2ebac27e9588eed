"""A distillation as a file says it: which pipeline, which student, which prompts, where to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import ConfigError
from . import yaml_file
from .config import DistillConfig
from .launch import Launch
from .plan import Plan
from .result import DistillResult
from .sources import PipelineSource, check_student_source

_HELD_OUT = {"held_out": 0.01, "count": 64}


@dataclass(frozen=True)
class DistillRun:
    """All that a distillation is told, in plain values: what `train` is called with, by name.

        run = DistillRun.load("run.yaml", ["config.max_steps=1000"])
        print(run.plan())
        run.train()

    Attributes:
        pipeline: a `PipelineSource`, or a mapping of its attributes.
        student: a mapping, or several for a series: `{from_pretrained: ...}` (a student),
            `{from_t5: google/flan-t5-base}` (a T5's encoder, with a fresh projection) or `{preset:
            base}` (all fresh), each with options: see `sources.load_student`.
        prompts: a file's path, a list, or a mapping: see `prompt_source`.
        output_dir: of the run, with its settings in `run.yaml`.
        eval_prompts: likewise, but with an end; or `{held_out: 0.01, count: 64}`, from `prompts`
            (see `split_held_out`); None: nothing is measured.
        pipeline_kwargs: how the pipeline is called.
        config: a `DistillConfig`, or a mapping of its attributes.
        teacher_cache: a folder for the teacher's rows. T5 then encodes all prompts that the run
            will draw, and leaves memory before the denoiser is loaded.
        resume: go on with the run in `output_dir`; start it, if there is none yet.
        push_to_hub: as for `train`.

    Raises:
        ConfigError: an unknown key, or a value that can't be right.
    """

    pipeline: PipelineSource
    student: Mapping[str, Any] | list[Mapping[str, Any]]
    prompts: Any
    output_dir: str
    eval_prompts: Any = field(default_factory=lambda: dict(_HELD_OUT))
    pipeline_kwargs: Mapping[str, Any] = field(default_factory=dict)
    config: DistillConfig = field(default_factory=DistillConfig)
    teacher_cache: str | None = None
    resume: bool = False
    push_to_hub: bool | str = False

    def __post_init__(self) -> None:
        for name, cls in (("pipeline", PipelineSource), ("config", DistillConfig)):
            value = getattr(self, name)
            if not isinstance(value, cls):
                object.__setattr__(self, name, yaml_file.construct(cls, value, name))
        if not self.students:
            raise ConfigError("student is an empty list; expected one or more.")
        for source in self.students:
            check_student_source(source)
        if self.prompts is None:
            raise ConfigError("prompts is null; expected a file, a list or a mapping.")
        for name in ("prompts", "eval_prompts"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, list, Mapping)):
                raise ConfigError(f"{name} is {value!r}; expected a file, a list or a mapping.")
        if self.holds_out:
            yaml_file.check_keys(self.eval_prompts, _HELD_OUT, "eval_prompts")
        if self.config.samples_every and self.eval_prompts is None:
            raise ConfigError(
                "config: samples_every needs eval_prompts, of which the first are painted."
            )
        if not isinstance(self.pipeline_kwargs, Mapping):
            raise ConfigError(f"pipeline_kwargs is {self.pipeline_kwargs!r}; expected a mapping.")
        for name in ("output_dir", "teacher_cache"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "output_dir"):
                raise ConfigError(f"{name} is {value!r}; expected the path of a folder.")
        if not isinstance(self.resume, bool):
            raise ConfigError(f"resume is {self.resume!r}; expected true or false.")
        if not isinstance(self.push_to_hub, (bool, str)):
            raise ConfigError(f"push_to_hub is {self.push_to_hub!r}; expected true or owner/name.")

    @property
    def students(self) -> list[Mapping[str, Any]]:
        """Of `student`: one, or several."""
        return list(self.student) if isinstance(self.student, list) else [self.student]

    @property
    def holds_out(self) -> bool:
        """Whether `eval_prompts` are a part of `prompts`."""
        return isinstance(self.eval_prompts, Mapping) and "held_out" in self.eval_prompts

    # --- in a file ---

    @classmethod
    def load(cls, path: str | os.PathLike[str], changes: Iterable[str] = ()) -> DistillRun:
        """Read a run from a YAML file.

        Args:
            path: the file. Paths in it start at the current folder.
            changes: each `key=value`, with dotted keys (`config.max_steps`, `student.0.preset`) and
                values in YAML.

        Raises:
            ConfigError: the file can't be read, or see above.
        """
        content = yaml_file.read(path)
        yaml_file.change(content, changes)
        return yaml_file.construct(cls, content, str(path))

    def to_yaml(self) -> str:
        """The run, with all defaults, as `load` reads it."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        plain |= {"pipeline": asdict(self.pipeline), "config": self.config.to_dict()}
        return yaml_file.write(plain)

    # --- what it is for ---

    def train(self) -> DistillResult | list[DistillResult]:
        """Distil as `train` does: in this process, or together with the others of a launch.

        Raises:
            T5SlimError: what is wrong, before anything expensive; or see `train`.
        """
        return Launch(self).train()

    def plan(self) -> Plan:
        """What `train` will take, as `make_plan` says it; nothing of it stays.

        With a `teacher_cache`, T5 encodes some prompts into a temporary folder, for the time that
        all of them will take.

        Raises: what `train` raises before it starts.
        """
        return Launch(self).plan()
