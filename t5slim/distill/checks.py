"""What a distillation needs, asked before anything expensive and before anything changes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compatibility import check_compatible
from ..encoder import SlimT5Encoder
from ..errors import DistillError
from .config import DistillConfig
from .walk import DENOISERS, teacher_of

Prompts = Sequence[str] | str | os.PathLike[str]


def load_prompts(prompts: Prompts, name: str) -> list[str]:
    """A list of prompts, or the lines of a text file, without surrounding white space and blank
    ones.
    """
    if isinstance(prompts, (str, os.PathLike)):
        path = Path(prompts)
        if not path.is_file():
            raise DistillError(
                f"{name} is {str(prompts)!r}, and there is no such file. Pass a list of prompts, "
                "or the path of a text file with one on each line."
            )
        lines = path.read_text(encoding="utf-8").splitlines()
        source = f"the file {path}"
    else:
        lines = list(prompts)
        source = "a list"
        for line in lines:
            if not isinstance(line, str):
                raise DistillError(f"{name} holds {line!r}; expected strings.")
    kept = [line.strip() for line in lines if line.strip()]
    if not kept:
        raise DistillError(f"{name} is {source} without a prompt in it; at least one is needed.")
    return kept


def check_student(pipe: Any, student: nn.Module) -> None:
    """Refuse a student that doesn't fit the pipeline, or that is the teacher itself."""
    memory = {parameter.data_ptr() for parameter in student.parameters()}
    if any(parameter.data_ptr() in memory for parameter in teacher_of(pipe).parameters()):
        raise DistillError(
            f"The student is the teacher, or shares its weights: the text slot of this "
            f"{type(pipe).__name__} must hold the T5 that is to be learned from. If the pipeline "
            "was patched, call t5slim.unpatch_pipeline(pipe) first."
        )
    if isinstance(student, SlimT5Encoder):
        check_compatible(student.config, pipe)


def check_trainable(pipe: Any, student: Any, config: DistillConfig) -> None:
    """Refuse a student that can't learn, or can't from this pipeline."""
    if not isinstance(student, SlimT5Encoder):
        raise DistillError(
            f"student is a {type(student).__name__}; expected a SlimT5Encoder. To make one of a "
            "small T5, see SlimT5Encoder.from_t5."
        )
    check_student(pipe, student)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise DistillError("No parameter of the student requires a gradient: it can't learn.")
    dtypes = [getattr(getattr(pipe, name, None), "dtype", None) for name in DENOISERS]
    scaled = config.mixed_precision == "fp16"
    if "velocity" in config.terms and torch.float16 in dtypes and not scaled:
        # The gradients of a mean over 100,000 elements are below float16's smallest number, 6e-8.
        raise DistillError(
            f"The denoiser of this {type(pipe).__name__} is in float16, through which gradients "
            'vanish. Load the pipeline in bfloat16 or float32, or set mixed_precision="fp16", '
            "which scales the loss."
        )
