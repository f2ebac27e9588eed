"""Replace T5-XXL in diffusers text-to-image pipelines with a distilled student."""

from __future__ import annotations

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Not lazy: importing the encoder is what registers students with AutoModel, and what lets diffusers
# find their class when it loads a saved pipeline (it looks in sys.modules only).
from .contextless import ContextlessEncoder
from .encoder import ProjectionAdapter, SlimT5Config, SlimT5Encoder
from .errors import (
    AlreadyPatchedError,
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
    from .published import students

__all__ = [
    "AlreadyPatchedError",
    "CheckpointError",
    "ConfigError",
    "ContextlessEncoder",
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
    "students",
    "unpatch_pipeline",
]

# Resolved on first use (PEP 562), so that `import t5slim` loads neither diffusers nor the trainer.
_PACKAGES = ("distill", "evaluate")
_LAZY = {
    "patch_pipeline": "t5slim.patch",
    "students": "t5slim.published",
    "unpatch_pipeline": "t5slim.patch",
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"t5slim.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
