"""What takes memory in a run, counted on the loaded modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..encoder import SlimT5Encoder
from .cached import CachedTeacher
from .config import DistillConfig


@dataclass(frozen=True)
class Part:
    """What takes memory.

    Attributes:
        name: a component of the pipeline, or what training needs.
        bytes: of its tensors.
        parameters: how many, if it has any of its own.
        waits: under offload, it is in host memory: "whole" until it is called, or "in layers".
    """

    name: str
    bytes: int
    parameters: int | None = None
    waits: str | None = None


def pipeline_parts(pipe: Any) -> list[Part]:
    """What the pipeline's components take."""
    parts = []
    device = torch.device(pipe._execution_device)
    for name, module in pipe.components.items():
        if not isinstance(module, nn.Module):
            continue
        if isinstance(module, CachedTeacher):
            parts.append(Part(f"{name} (T5's cached rows)", 0, 0))
            continue
        tensors = [*module.parameters(), *module.buffers()]
        waits = None
        if any(tensor.device.type == "meta" for tensor in tensors):
            waits = "in layers"
        elif tensors[0].device.type != device.type:
            waits = "whole"
        size = sum(map(_bytes, tensors))
        kind = type(module).__name__
        count = sum(map(_elements, module.parameters()))
        parts.append(Part(f"{name} ({kind})", size, count, waits))
    return parts


def student_parts(students: Sequence[SlimT5Encoder], config: DistillConfig) -> list[Part]:
    """What the students and their training take."""
    parts = []
    for i, student in enumerate(students):
        name = f"student-{i}" if len(students) > 1 else "student"
        sizes = _training_bytes(student, config)
        count = sum(parameter.numel() for parameter in student.parameters())
        parts.append(Part(f"{name}, weights in float32", sizes.pop("weights"), count))
        parts += [Part(f"{name}, {what}", size) for what, size in sizes.items()]
    return parts


def checkpoint_bytes(students: Sequence[SlimT5Encoder], config: DistillConfig) -> int:
    """What a checkpoint holds of the students: all but the gradients."""
    sizes = [_training_bytes(student, config) for student in students]
    return sum(size for one in sizes for what, size in one.items() if what != "gradients")


def _training_bytes(student: SlimT5Encoder, config: DistillConfig) -> dict[str, int]:
    count = sum(parameter.numel() for parameter in student.parameters())
    trained = [p.numel() for p in student.parameters() if p.requires_grad]
    sizes = {"weights": 4 * count, "gradients": 4 * sum(trained)}
    sizes[f"moments of {config.optimizer}"] = sum(_moment_bytes(n, config) for n in trained)
    if config.ema_decay:
        sizes["average"] = 4 * count
    return sizes


def _moment_bytes(elements: int, config: DistillConfig) -> int:
    """Of AdamW's two moments of a tensor."""
    if config.optimizer == "adamw" or elements < 4096:  # bitsandbytes leaves small ones as they are
        return 2 * 4 * elements
    return 2 * (elements + 4 * math.ceil(elements / 256))  # a scale for each block


def _elements(tensor: Tensor) -> int:
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else math.prod(state.shape)


def _bytes(tensor: Tensor) -> int:
    """Here, of one that is spread over processes; with the scales, of one that is quantized."""
    state = getattr(tensor, "quant_state", None)
    scales = () if state is None else state.as_dict(packed=False).values()
    share = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return share.nbytes + sum(s.nbytes for s in scales if isinstance(s, Tensor))


def show_bytes(size: int) -> str:
    """In GiB; if small, in MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"
