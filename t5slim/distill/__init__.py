"""Distil a student through a pipeline's frozen denoiser.

`train` is the whole of it; the other names are its parts, for loops of one's own.
"""

from .config import DistillConfig
from .metrics import VelocityGap, velocity_gap
from .objective import Objective
from .prompts import generate_prompts, split_held_out
from .report import DistillResult
from .reservoir import TrajectoryReservoir
from .teacher import cache_teacher, cached_teacher
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
