"""Calls of the encoder and the denoiser: made, intercepted, and the tensors in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DistillError

Path = tuple[Any, ...]  # keys and indices that lead to a tensor, such as ("added_cond_kwargs", "x")


def call_encoder(forward: Callable[..., Any], ids: Tensor, mask: Tensor | None) -> Tensor:
    """The last hidden state of T5 or a student, (B, S, D)."""
    return forward(ids)[0] if mask is None else forward(ids, attention_mask=mask)[0]


def call_denoiser(
    denoiser: Any, forward: Any, kwargs: dict[str, Any], autocast_dtype: torch.dtype | None
) -> Any:
    """`forward(**kwargs)`, under autocast if a dtype is given; output in its own dtype."""
    if autocast_dtype is None:
        return forward(**kwargs)
    # Not `Accelerator.autocast`: accelerate fixes the precision once for a process, and a notebook
    # that trains a second time with another one would be refused.
    with torch.autocast(denoiser.device.type, autocast_dtype):
        output = forward(**kwargs)
    return with_first_tensor(output, first_tensor(output).to(denoiser.dtype))


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a denoiser returned: a tensor, a tuple, or diffusers' output class."""
    tensor = output if isinstance(output, Tensor) else output[0]
    if tensor is None:
        raise DistillError(
            "the denoiser was called to fill a cache and not for a prediction, as by AnyFlow-FAR "
            "between the chunks of a video. Make the video in one chunk (chunk_partition)."
        )
    return tensor


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """`output` with another prediction in it."""
    if isinstance(output, Tensor):
        return tensor
    return (tensor, *output[1:]) if isinstance(output, tuple) else type(output)(tensor)


def map_tensors(tree: Any, function: Callable[[Path, Tensor], Any], path: Path = ()) -> Any:
    """Copy nested dicts, lists and tuples, each tensor in them as `function(path, tensor)`."""
    if isinstance(tree, Tensor):
        return function(path, tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function, (*path, key)) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map_tensors(value, function, (*path, i)) for i, value in enumerate(tree))
    return tree


def tensors_in(tree: Any) -> dict[Path, Tensor]:
    """Every tensor in nested dicts, lists and tuples, by its path."""
    found: dict[Path, Tensor] = {}
    map_tensors(tree, found.__setitem__)
    return found


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's content, in hex."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()


@contextmanager
def intercept(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let `function(forward, *args, **kwargs)` stand for the module's `forward`.

    On the instance, where accelerate's offload hooks put theirs too: `forward` is the hooked one.
    """
    # After `module.compile()`, torch.compile would look into `function`, and compile that.
    name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
    before = module.__dict__.get(name)
    setattr(module, name, partial(function, getattr(module, name)))
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)
