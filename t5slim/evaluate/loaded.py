"""The students that are looked at: by name, on the pipeline's device, beside its teacher."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compatibility import is_student
from ..distill.pipeline import teacher_of
from ..encoder import SlimT5Encoder
from ..errors import EvaluateError
from ..patch import patch_pipeline, unpatch_pipeline
from ..slot import find_text_slot
from .comparison import TEACHER

Students = Any  # a student, several, or several by name


@contextmanager
def teacher_in_slot(pipe: Any) -> Iterator[nn.Module | None]:
    """Yields the student that was in the pipeline, while the teacher is; None, if none was."""
    guest = getattr(pipe, find_text_slot(pipe).name)
    if not is_student(guest):
        yield None
        return
    unpatch_pipeline(pipe)
    try:
        yield guest
    finally:
        patch_pipeline(pipe, guest, keep_teacher=True)


def named_students(students: Students) -> dict[str, Any]:
    """Students by name.

    Raises:
        EvaluateError: none, two of one name, one named as the teacher, or something else.
    """
    if students is None:
        raise EvaluateError("There are no students to compare, and none is in the pipeline.")
    if isinstance(students, Mapping):
        named = dict(students)
    else:
        one = isinstance(students, (str, os.PathLike, nn.Module))
        given = [students] if one else list(students)
        names = [_name(student) or f"student {i}" for i, student in enumerate(given, start=1)]
        if len(set(names)) < len(names):
            names = [_place(student) or name for student, name in zip(given, names, strict=True)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise EvaluateError(
                f"Several students are called {', '.join(sorted(twice))}: pass a mapping of names "
                "to students."
            )
        named = dict(zip(names, given, strict=True))
    if not named or TEACHER in named:
        what = f"called {TEACHER!r}, as what they are compared with" if named else "given"
        raise EvaluateError(f"students: {'one is' if named else 'none is'} {what}.")
    for name, student in named.items():
        if not isinstance(student, (str, os.PathLike, nn.Module)):
            raise EvaluateError(
                f"student {name!r} is a {type(student).__name__}; expected an encoder, or the "
                "folder or Hub id of a student."
            )
    return named


def _name(student: Any) -> str:
    return os.path.basename(_place(student).rstrip("/"))


def _place(student: Any) -> str:
    """The folder or Hub id that it comes from; of one that comes from nowhere, nothing."""
    if isinstance(student, (str, os.PathLike)):
        return os.fspath(student)
    return getattr(getattr(student, "config", None), "name_or_path", None) or ""


@dataclass(frozen=True)
class Loaded:
    """Students by name, on the pipeline's device, and what each takes."""

    students: dict[str, nn.Module] = field(default_factory=dict)
    costs: dict[str, dict[str, float | None]] = field(default_factory=dict)


@contextmanager
def loaded_students(pipe: Any, named: Mapping[str, Any]) -> Iterator[Loaded]:
    """Yields the students, read where only a place is given; those that were passed are afterwards
    where they were, also if another can't be read.
    """
    loaded = Loaded()
    dtype: Any = teacher_of(pipe).dtype
    device = torch.device(pipe._execution_device)
    places: list[tuple[nn.Module, torch.device]] = []
    try:
        for name, student in named.items():
            costs: dict[str, float | None] = {}
            if isinstance(student, nn.Module):
                places.append((student, next(student.parameters()).device))
            else:
                start = time.perf_counter()
                student = SlimT5Encoder.from_pretrained(student, dtype=dtype)
                costs["load_s"] = time.perf_counter() - start
            loaded.students[name] = student.to(device)
            loaded.costs[name] = size_of(student) | costs
        yield loaded
    finally:
        for student, place in places:
            student.to(place)


def size_of(module: nn.Module) -> dict[str, float | None]:
    """What an encoder takes in memory, and on disk if it came from a folder."""
    tensors = list(module.parameters())
    folder = getattr(getattr(module, "config", None), "name_or_path", None) or ""
    files = list(Path(folder).glob("*.safetensors")) if os.path.isdir(folder) else []
    return {
        "parameters": sum(tensor.numel() for tensor in tensors),
        "weights_mib": sum(tensor.nbytes for tensor in tensors) / 2**20,
        "disk_mib": sum(file.stat().st_size for file in files) / 2**20 if files else None,
    }
