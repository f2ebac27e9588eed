"""What training changes in the pipeline and the student for its length, and changes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .pipeline import DENOISERS

_WITHOUT_GRAD = torch.no_grad()(lambda: None).__code__  # of whatever it decorates


def cpu_attention(
    device: torch.device, autocast_dtype: torch.dtype | None
) -> AbstractContextManager[Any]:
    """On the CPU, flash attention goes backwards in bfloat16 ten times slower than in float32.

    That is half the time of an update (torch 2.13, 48 tokens), so plain attention is used. Also for
    the backward pass, in which gradient checkpointing calls it again.
    """
    if device.type == "cpu" and autocast_dtype is not None:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


@contextmanager
def evaluating(student: nn.Module) -> Iterator[None]:
    """The student in eval mode; afterwards in the mode that it was in."""
    training = student.training
    student.eval()
    try:
        yield
    finally:
        student.train(training)


@contextmanager
def frozen(pipe: Any, gradient_checkpointing: bool) -> Iterator[None]:
    """Nothing in the pipeline gets a gradient or drops out; afterwards it is set as it was.

    Parts of a denoiser that have a method without gradients are in training mode: HiDream's experts
    answer by one in eval mode, and the student would learn nothing of what passes through them.
    """
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    grads = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    denoisers = [d for name in DENOISERS if (d := getattr(pipe, name, None)) is not None]
    switched = [d for d in denoisers if gradient_checkpointing and not d.is_gradient_checkpointing]
    for parameter, _ in grads:
        parameter.requires_grad_(False)
    for part, _ in modes:
        part.training = False
    for part in (part for denoiser in denoisers for part in denoiser.modules()):
        methods = vars(type(part)).values()
        part.training = any(getattr(m, "__code__", None) is _WITHOUT_GRAD for m in methods)
    for denoiser in switched:
        denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for denoiser in switched:
            denoiser.disable_gradient_checkpointing()
        for part, mode in modes:
            part.training = mode
        for parameter, grad in grads:
            parameter.requires_grad_(grad)


@contextmanager
def master_weights(student: nn.Module, device: torch.device) -> Iterator[None]:
    """The student in float32 on `device`; afterwards each weight in its dtype again, in eval mode.

    Updates of 1e-4 of a weight are lost in bfloat16's 8 bits.
    """
    student.to(device)
    # Parameter by parameter, as a student in float16 keeps its `wo` in float32.
    dtypes = [(parameter, parameter.dtype) for parameter in student.parameters()]
    for parameter, _ in dtypes:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in dtypes:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
        student.eval()
