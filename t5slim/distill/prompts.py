"""Prompts, as a list or as a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import DistillError

Prompts = Sequence[str] | str | os.PathLike[str]


def load_prompts(prompts: Prompts, name: str) -> list[str]:
    """A list of prompts, or the lines of a text file, without surrounding white space and blank
    ones.
    """
    if isinstance(prompts, (str, os.PathLike)):
        path = Path(prompts)
        if not path.is_file():
            raise DistillError(
                f"{name} is {str(prompts)!r}, and there is no such file. Pass a list of prompts, or the "
                "path of a text file with one on each line."
            )
        lines = path.read_text(encoding="utf-8").splitlines()
        source = f"the file {path}"
    else:
        lines = list(prompts)
        source = "a list"
        for line in lines:
            if not isinstance(line, str):
                raise DistillError(f"{name} holds {line!r}; expected strings.")
    kept = [line.strip() for line in lines if line.strip()]
    if not kept:
        raise DistillError(f"{name} is {source} without a prompt in it; at least one is needed.")
    return kept
