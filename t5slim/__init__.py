"""Replace T5-XXL in diffusers text-to-image pipelines with a distilled student."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import distill as distill
    from .encoder import ProjectionAdapter, SlimT5Config, SlimT5Encoder
    from .errors import (
        AlreadyPatchedError,
        CheckpointError,
        ConfigError,
        DistillError,
        HubAccessError,
        IncompatibleStudentError,
        NoT5SlotError,
        T5SlimError,
    )
    from .patch import patch_pipeline, unpatch_pipeline

__version__ = "0.1.0"

__all__ = [
    "AlreadyPatchedError",
    "CheckpointError",
    "ConfigError",
    "DistillError",
    "HubAccessError",
    "IncompatibleStudentError",
    "NoT5SlotError",
    "ProjectionAdapter",
    "SlimT5Config",
    "SlimT5Encoder",
    "T5SlimError",
    "patch_pipeline",
    "unpatch_pipeline",
]

# Resolved on first use (PEP 562): `import t5slim` itself loads neither diffusers nor the trainer.
_MODULES = dict.fromkeys(__all__, "t5slim.errors") | {
    "ProjectionAdapter": "t5slim.encoder",
    "SlimT5Config": "t5slim.encoder",
    "SlimT5Encoder": "t5slim.encoder",
    "patch_pipeline": "t5slim.patch",
    "unpatch_pipeline": "t5slim.patch",
}


def __getattr__(name: str) -> Any:
    if name == "distill":
        return import_module("t5slim.distill")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "distill"})
