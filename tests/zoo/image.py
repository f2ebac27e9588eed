"""Other pictures: PixArt, HunyuanDiT, AuraFlow, DeepFloyd IF, Kandinsky 3..."""

from __future__ import annotations

from .case import Case

CASES: list[Case] = []
