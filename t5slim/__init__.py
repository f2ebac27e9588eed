"""Replace T5-XXL in diffusers text-to-image pipelines with a distilled student."""

__version__ = "0.1.0"

from importlib import import_module
from typing import Any

# Not lazy: it registers students with transformers, and diffusers finds them in sys.modules only.
from .encoder import ProjectionAdapter, SlimT5Config, SlimT5Encoder
from .errors import (
    CheckpointError,
    ConfigError,
    DistillError,
    HubAccessError,
    IncompatibleStudentError,
    NoT5SlotError,
    PatchError,
    T5SlimError,
)
from .patch import patch_pipeline, students, unpatch_pipeline

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DistillError",
    "HubAccessError",
    "IncompatibleStudentError",
    "NoT5SlotError",
    "PatchError",
    "ProjectionAdapter",
    "SlimT5Config",
    "SlimT5Encoder",
    "T5SlimError",
    "patch_pipeline",
    "students",
    "unpatch_pipeline",
]


def __getattr__(name: str) -> Any:
    """Import `distill` and `evaluate` on first use (PEP 562): they load diffusers."""
    if name in ("distill", "evaluate"):
        return import_module(f"t5slim.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
