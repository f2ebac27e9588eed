"""Calls of the encoder and the denoiser: made, overheard, and the tensors in them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DistillError

Path = tuple[Any, ...]  # keys and indices that lead to a tensor, such as ("added_cond_kwargs", "x")


def call_encoder(
    forward: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """T5's last hidden state, (B, S, D)."""
    if attention_mask is None:
        return forward(input_ids)[0]
    return forward(input_ids, attention_mask=attention_mask)[0]


def call_denoiser(
    denoiser: Any,
    forward: Callable[..., Any],
    kwargs: dict[str, Any],
    autocast_dtype: torch.dtype | None,
) -> Any:
    """`forward(**kwargs)`, if asked under autocast, its answer in the denoiser's own dtype."""
    if autocast_dtype is None:
        return forward(**kwargs)
    with autocast(denoiser.device, autocast_dtype):
        output = forward(**kwargs)
    return with_first_tensor(output, first_tensor(output).to(denoiser.dtype))


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to `dtype` on `device`; with None, nothing.

    Not `Accelerator.autocast`: accelerate fixes the precision once for a process, and a notebook
    that trains a second time with another one would be refused.
    """
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a denoiser returned: a tensor, a tuple, or diffusers' output class.

    Raises:
        DistillError: there is none.
    """
    tensor = output if isinstance(output, Tensor) else output[0]
    if tensor is None:
        raise DistillError(
            "the denoiser was called to fill a cache and not for a prediction, as AnyFlow-FAR does "
            "between the chunks of a video: what follows can't be replayed. Let the pipeline make "
            "its video in one chunk (chunk_partition)."
        )
    return tensor


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """`output` with another prediction in it."""
    if isinstance(output, Tensor):
        return tensor
    return (tensor, *output[1:]) if isinstance(output, tuple) else type(output)(tensor)


@contextmanager
def intercept(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let `function(forward, *args, **kwargs)` stand for the module's `forward`.

    On the instance, where accelerate's offload hooks put theirs too: `forward` is the hooked one.
    After `module.compile()` it is the compiled call that is replaced: torch.compile would otherwise
    look into `function`, and compile that.
    """
    name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
    before = module.__dict__.get(name)
    setattr(module, name, partial(function, getattr(module, name)))
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)


def by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Every argument of a method's call, also the positional ones, under its name."""
    arguments = dict(signature.bind(None, *args, **kwargs).arguments)
    arguments.pop("self")
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


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


class CopyOnce:
    """Clones tensors; the same one again, if it wasn't written into since, gives the same clone."""

    def __init__(self) -> None:
        self._clones: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """A detached copy of `tensor`."""
        key = (id(tensor), tensor._version)
        if key not in self._clones:
            # The original is held, too: its id would be given to another tensor if it were freed.
            self._clones[key] = (tensor, _clone(tensor.detach()))
        return self._clones[key][1]


def _clone(tensor: Tensor) -> Tensor:
    """A copy that is expanded where `tensor` is: kernels round as their input lies in memory."""
    once = tuple(slice(1 if stride == 0 else None) for stride in tensor.stride())
    return tensor[once].clone().expand_as(tensor)
