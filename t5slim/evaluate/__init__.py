"""Quality and cost of students beside their teacher, on the same prompts and noise."""

from .compare import compare
from .result import Comparison

__all__ = ["Comparison", "compare"]
