"""Distil a student through a pipeline's frozen denoiser.

`train` is the whole of it; `capture` and `VelocityGap` are the parts that are of use by themselves.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DistillConfig, Term
    from .losses import EmbeddingLoss, RelationalLoss, VelocityLoss
    from .metrics import VelocityGap, velocity_gap
    from .trainer import DistillResult, train
    from .walk import Walk, capture

_MODULES = {
    "DistillConfig": "config",
    "DistillResult": "trainer",
    "EmbeddingLoss": "losses",
    "RelationalLoss": "losses",
    "Term": "config",
    "VelocityGap": "metrics",
    "VelocityLoss": "losses",
    "Walk": "walk",
    "capture": "walk",
    "train": "trainer",
    "velocity_gap": "metrics",
}

__all__ = [
    "DistillConfig",
    "DistillResult",
    "EmbeddingLoss",
    "RelationalLoss",
    "Term",
    "VelocityGap",
    "VelocityLoss",
    "Walk",
    "capture",
    "train",
    "velocity_gap",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
