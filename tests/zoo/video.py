"""Video with a T5: LTX, CogVideoX, Mochi, Cosmos, Latte..."""

from __future__ import annotations

from .case import Case

CASES: list[Case] = []
