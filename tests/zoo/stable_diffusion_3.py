"""Stable Diffusion 3, with guidance and without, from pictures, with ControlNets."""

from __future__ import annotations

from .case import Case

CASES: list[Case] = []
