"""What a student costs: the same prompts under the teacher and under students, side by side."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import Comparison
    from .layers import Lens, lens
    from .measure import compare

_MODULES = {"Comparison": "comparison", "Lens": "layers", "compare": "measure", "lens": "layers"}

__all__ = ["Comparison", "Lens", "compare", "lens"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
