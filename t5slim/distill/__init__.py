"""Distil a student through a pipeline's frozen denoiser.

`train` is the whole of it; the other names are its parts, for loops of one's own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import cache_teacher, cached_teacher
    from .config import DistillConfig
    from .metrics import VelocityGap, velocity_gap
    from .objective import Objective
    from .prompts import generate_prompts, split_held_out
    from .report import DistillResult
    from .reservoir import TrajectoryReservoir
    from .trainer import train
    from .trajectory import Trajectory, capture

__all__ = [
    "DistillConfig",
    "DistillResult",
    "Objective",
    "Trajectory",
    "TrajectoryReservoir",
    "VelocityGap",
    "cache_teacher",
    "cached_teacher",
    "capture",
    "generate_prompts",
    "split_held_out",
    "train",
    "velocity_gap",
]

# Resolved on first use (PEP 562), so that the settings are read without loading the trainer.
_MODULES = {
    "cache": ("cache_teacher", "cached_teacher"),
    "config": ("DistillConfig",),
    "metrics": ("VelocityGap", "velocity_gap"),
    "objective": ("Objective",),
    "prompts": ("generate_prompts", "split_held_out"),
    "report": ("DistillResult",),
    "reservoir": ("TrajectoryReservoir",),
    "trainer": ("train",),
    "trajectory": ("Trajectory", "capture"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
