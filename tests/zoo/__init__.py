"""Every pipeline class of diffusers that has a T5, tiny and real; see `case.py`."""

from .cases import CASES as CASES
