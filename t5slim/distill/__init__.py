"""Distil a student through a pipeline's frozen denoiser.

`train` is the whole of it; `capture` and `VelocityGap` are the parts that are of use by themselves.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import TeacherCache
    from .cached import cache_teacher, cached_teacher, free_teacher
    from .config import DistillConfig, Term
    from .gap import GapReport, GapTable
    from .losses import EmbeddingLoss, RelationalLoss, VelocityLoss
    from .metrics import VelocityGap, velocity_gap
    from .plan import Plan, make_plan
    from .prompts import (
        GeneratedPrompts,
        PromptList,
        PromptMixture,
        PromptSchedule,
        split_held_out,
    )
    from .result import DistillResult
    from .run import DistillRun
    from .trainer import train
    from .walk import Walk, capture

_MODULES = {
    "DistillConfig": "config",
    "DistillResult": "result",
    "DistillRun": "run",
    "EmbeddingLoss": "losses",
    "RelationalLoss": "losses",
    "Term": "config",
    "GapReport": "gap",
    "GapTable": "gap",
    "GeneratedPrompts": "prompts",
    "Plan": "plan",
    "PromptList": "prompts",
    "PromptMixture": "prompts",
    "PromptSchedule": "prompts",
    "TeacherCache": "cache",
    "VelocityGap": "metrics",
    "VelocityLoss": "losses",
    "Walk": "walk",
    "cache_teacher": "cached",
    "cached_teacher": "cached",
    "capture": "walk",
    "free_teacher": "cached",
    "make_plan": "plan",
    "split_held_out": "prompts",
    "train": "trainer",
    "velocity_gap": "metrics",
}

__all__ = [
    "DistillConfig",
    "DistillResult",
    "DistillRun",
    "EmbeddingLoss",
    "GapReport",
    "GapTable",
    "GeneratedPrompts",
    "Plan",
    "PromptList",
    "PromptMixture",
    "PromptSchedule",
    "RelationalLoss",
    "TeacherCache",
    "Term",
    "VelocityGap",
    "VelocityLoss",
    "Walk",
    "cache_teacher",
    "cached_teacher",
    "capture",
    "free_teacher",
    "make_plan",
    "split_held_out",
    "train",
    "velocity_gap",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
