"""Every pipeline class of diffusers that has a T5, tiny and real; see `case.py`."""

from __future__ import annotations

from . import audio, flux, image, stable_diffusion_3, umt5, video
from .case import Case

_MODULES = (flux, stable_diffusion_3, image, umt5, video, audio)
CASES: dict[str, Case] = {case.name: case for module in _MODULES for case in module.CASES}

# Classes that no call can be made of here, and why.
NOT_COVERED: dict[str, str] = {}
