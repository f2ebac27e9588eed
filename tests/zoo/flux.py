"""FLUX.1 and what shares its transformer: Chroma, Bria, VisualCloze."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from tiny import call_kwargs, tiny_flux

from .case import Case


def flux(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    return cls(**tiny_flux().components)


def flux_call(**more: Any) -> dict[str, Any]:
    return call_kwargs(tiny_flux(), steps=2) | more


CASES = [Case("FluxPipeline", flux, flux_call)]
