"""Pipelines whose slot holds a UMT5: Wan and its kin, SkyReels, AuraFlow..."""

from __future__ import annotations

from .case import Case

CASES: list[Case] = []
