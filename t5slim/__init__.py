"""Replace T5-XXL in diffusers text-to-image pipelines with a distilled student."""

from __future__ import annotations

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Not lazy: importing the encoder is what registers students with AutoModel, and what lets diffusers
# find their class when it loads a saved pipeline (it looks in sys.modules only).
from .encoder import ProjectionAdapter, SlimT5Config, SlimT5Encoder
from .errors import (
    CheckpointError,
    ConfigError,
    DistillError,
    EvaluateError,
    HubAccessError,
    IncompatibleStudentError,
    NoT5SlotError,
    PatchError,
    T5SlimError,
)

if TYPE_CHECKING:
    from . import distill as distill
    from . import evaluate as evaluate
    from .patch import patch_pipeline, unpatch_pipeline

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DistillError",
    "EvaluateError",
    "HubAccessError",
    "IncompatibleStudentError",
    "NoT5SlotError",
    "PatchError",
    "ProjectionAdapter",
    "SlimT5Config",
    "SlimT5Encoder",
    "T5SlimError",
    "patch_pipeline",
    "unpatch_pipeline",
]


def __getattr__(name: str) -> Any:
    """Resolve on first use (PEP 562): `import t5slim` loads neither diffusers nor the trainer."""
    if name in ("distill", "evaluate"):
        return import_module(f"t5slim.{name}")
    if name in ("patch_pipeline", "unpatch_pipeline"):
        return getattr(import_module("t5slim.patch"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "distill", "evaluate"})
