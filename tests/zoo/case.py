"""One pipeline class of diffusers with a T5: how it is built tiny, how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from packaging.version import Version
from tiny import PROMPTS, finish


@dataclass(frozen=True)
class Case:
    """A pipeline class, real and tiny.

    Attributes:
        name: of the class in diffusers.
        build: makes the pipeline, on the CPU, in float32: `build(cls)`.
        call: makes the arguments of a call beside prompt, generator and output_type, with images
            and all; at most 3 steps.
        route: how a student is led through it: "gather" (its embeddings are put where the teacher's
            stood), "fallback" (through the pipeline's own code), or "none" (it can't be distilled
            for).
        why: for "fallback" and "none": a part of what the library says of it.
        prompts: how many of `tiny.PROMPTS` go through it together, as some pipelines take one only;
            or which.
        student: sizes of the student, where the pipeline asks for more than its width.
        since: the version of diffusers from which the pipeline works beside transformers 5.
    """

    name: str
    build: Callable[[type[DiffusionPipeline]], DiffusionPipeline]
    call: Callable[[], dict[str, Any]] = field(default=dict)
    route: str = "gather"
    why: str = ""
    prompts: int | tuple[str, ...] = 2
    student: dict[str, int] = field(default_factory=dict)
    since: str = "0"

    @property
    def cls(self) -> type[DiffusionPipeline] | None:
        """None where this version of diffusers doesn't have it, or not one that works."""
        if Version(diffusers.__version__) < Version(self.since):
            return None
        return getattr(diffusers, self.name, None)

    def pipe(self) -> DiffusionPipeline:
        assert self.cls is not None
        torch.manual_seed(0)
        return finish(self.build(self.cls))

    @property
    def texts(self) -> list[str]:
        return PROMPTS[: self.prompts] if isinstance(self.prompts, int) else list(self.prompts)
