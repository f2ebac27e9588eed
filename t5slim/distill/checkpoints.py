"""What a run is continued from: written whole or not at all, and checked before it is believed.

A checkpoint is a folder named by its update, with `state.safetensors` (weights, averages, moments)
and `state.json` (counters, and the SHA-256 of the former). No pickle: nothing in it is run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import DistillError

logger = logging.getLogger(__name__)

TENSORS_FILE = "state.safetensors"
COUNTERS_FILE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        step: updates made.
        tensors: by name, in host memory.
        counters: plain values.
    """

    step: int
    tensors: dict[str, Tensor]
    counters: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], counters: Mapping[str, Any], keep: int
) -> None:
    """Write a checkpoint, then remove all but the newest `keep`.

    Raises:
        DistillError: it can't be written; those that were there still are.
    """
    temporary, final = folder / f".{step:08d}.tmp", folder / f"{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*"):  # of a run that was killed while it wrote or removed
            shutil.rmtree(leftover)
        temporary.mkdir()
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary / TENSORS_FILE)
        content = {**counters, "step": step, "sha256": _sha256(temporary / TENSORS_FILE)}
        (temporary / COUNTERS_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if final.exists():  # a damaged one, which the run was not continued from
            _remove(final)
        os.replace(temporary, final)
        _sync(folder)
        for old in _checkpoints(folder)[:-keep]:
            _remove(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = [path.name for path in _checkpoints(folder)]
        raise DistillError(
            f"The checkpoint of update {step} can't be written to {str(folder)!r}: {error}. "
            + (f"That of update {int(kept[-1])} is whole. " if kept else "")
            + "Make room or write access there, and call train again with resume=True."
        ) from error


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if there is none.

    A damaged one is named in a warning, and the one before it is used.
    """
    for path in reversed(_checkpoints(folder)):
        try:
            counters = json.loads((path / COUNTERS_FILE).read_text(encoding="utf-8"))
            if _sha256(path / TENSORS_FILE) != counters["sha256"]:
                raise ValueError(f"{TENSORS_FILE} isn't what was written")
            tensors = load_file(path / TENSORS_FILE)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("The checkpoint %s is damaged and not used: %s", path, error)
            continue
        return Checkpoint(int(path.name), tensors, counters)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdigit())


def _remove(path: Path) -> None:
    """So that it isn't half there at any moment."""
    aside = path.with_name(f".{path.name}.old")
    os.replace(path, aside)
    shutil.rmtree(aside)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """To the disk before anything is renamed: no power cut may leave a name without content."""
    if os.name == "nt" and path.is_dir():
        return  # Windows syncs no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
