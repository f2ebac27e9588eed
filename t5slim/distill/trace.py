"""Where the rows of T5's output land in the denoiser's arguments.

Nearly every pipeline only copies them: repeats them for several images, joins those of a prompt and
a negative prompt, pads or prefixes them. Such a pipeline is walked a second time, T5 replaced by a
stand-in whose rows carry their own number, the denoiser by one that repeats its recorded answers,
and the numbers are read back from the denoiser's arguments. No network but the small ones (CLIP)
runs for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calls import Path, map_tensors, tensors_in, with_first_tensor
from .pipeline import DENOISERS, run_pipeline
from .walk import DenoiserCall, Walk

# Digits 1 to 16: integers that bfloat16 and float16 hold exactly, and none is the 0 of a padding.
BASE = 16


class NotAGather(Exception):
    """This pipeline does more with T5's rows than copying them: `fallback` serves it."""


@dataclass(frozen=True)
class CallMap:
    """How the arguments of one denoiser call are made of rows.

    Attributes:
        sources: for each tensor that holds rows of T5, by path: int64 of its shape without the
            channels, the number of the T5 row that stands there, or -1. Numbers count through the
            walk's slot calls, as if their rows (B, S, D) were flattened to (B * S, D) and joined.
        batch_dims: for each tensor, by path, the dimension that runs over the batch, or None.
    """

    sources: dict[Path, Tensor]
    batch_dims: dict[Path, int | None]


def trace(pipe: Any, walk: Walk, known: dict[Any, Any] | None = None) -> list[CallMap]:
    """Find where T5's rows stand in the arguments of each of the walk's denoiser calls.

    Args:
        pipe: the pipeline of the walk.
        walk: what `capture` returned.
        known: batch dimensions of the pipeline's earlier walks, by the shapes of all arguments. For
            a walk of the same shapes they aren't looked for again. Is added to.

    Returns:
        A map for each denoiser call.

    Raises:
        NotAGather: T5's rows reach the denoiser changed, or something beside them depends on them.
    """
    sources = _trace_sources(pipe, walk)
    known = {} if known is None else known
    shapes = tuple(
        (call.denoiser, *((path, tensor.shape) for path, tensor in tensors_in(call.kwargs).items()))
        for call in walk.denoiser_calls
    )
    key = len(walk.prompts), shapes
    if key not in known:
        known[key] = _trace_batch_dims(pipe, walk)
    batch_dims = known[key]
    return [CallMap(s, b) for s, b in zip(sources, batch_dims, strict=True)]


def _trace_sources(pipe: Any, walk: Walk) -> list[dict[Path, Tensor]]:
    rows = [call.rows for call in walk.slot_calls]
    width = rows[0].shape[-1]
    total = sum(r.shape[0] * r.shape[1] for r in rows)
    digits = 1
    while BASE**digits < total:
        digits += 1
    teacher = torch.cat([r.reshape(-1, width) for r in rows])
    starts = [0]
    for r in rows:
        starts.append(starts[-1] + r.shape[0] * r.shape[1])

    slot_calls = iter(range(len(rows)))
    denoiser_calls = iter(walk.denoiser_calls)
    attention = {name: _attention(pipe, name) for name in DENOISERS}
    sources: list[dict[Path, Tensor]] = []
    compared: dict[tuple[int, int, int], tuple[Tensor, Tensor | None]] = {}

    def coded_rows(_: Callable[..., Any], input_ids: Tensor, mask: Tensor | None) -> Tensor:
        i = _next(slot_calls, "T5")
        numbers = torch.arange(starts[i], starts[i + 1], device=rows[i].device)
        return _encode(numbers, digits, width).to(rows[i].dtype).view(rows[i].shape)

    def read_back(name: str, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        recorded = _next(denoiser_calls, "its denoiser")
        _check_same_arguments(recorded, name, kwargs)
        if _attention(pipe, name) != attention[name]:
            # Perturbed-attention guidance: it takes a batch apart, and needs all of it.
            raise NotAGather("it changes its denoiser's attention for the length of a call")
        found: dict[Path, Tensor] = {}
        now = tensors_in(kwargs)
        for path, then in tensors_in(recorded.kwargs).items():
            # Most arguments are the same tensors in each call of a walk: they are compared once.
            key = (id(now[path]), now[path]._version, id(then))
            if key not in compared:
                compared[key] = (now[path], _compare(now[path], then, teacher, digits, path))
            source = compared[key][1]
            if source is not None:
                found[path] = source
        sources.append(found)
        return with_first_tensor(recorded.output, recorded.target.clone())

    run_pipeline(
        pipe, walk.prompts, walk.pipeline_kwargs, walk.seed,
        encode=coded_rows, denoise=read_back, zero_pooled=walk.zero_pooled,
    )  # fmt: skip
    if len(sources) != len(walk.denoiser_calls):
        raise NotAGather("its denoiser is called another number of times when T5's output changes")
    if not any(sources):
        raise NotAGather("no row of T5's output reaches its denoiser unchanged")
    return sources


def _compare(now: Tensor, then: Tensor, teacher: Tensor, digits: int, path: Path) -> Tensor | None:
    """Where `now`, traced, holds numbered rows, or None; all else must equal `then`, recorded."""
    where = _name(path)
    if now.shape != then.shape or now.dtype != then.dtype:
        raise NotAGather(f"the shape or dtype of {where} depends on T5's output")
    if now.ndim < 2 or now.shape[-1] != teacher.shape[-1] or not now.is_floating_point():
        if not torch.equal(now, then):
            raise NotAGather(f"{where} depends on T5's output, and is no copy of its rows")
        return None
    source = _decode(now, digits)
    is_row = (source >= 0) & (source < len(teacher))
    expected = torch.where(
        is_row[..., None], teacher[source.clamp(0, len(teacher) - 1)].to(now), now
    )
    if not torch.equal(expected, then):
        raise NotAGather(f"{where} depends on T5's output, and is no copy of its rows")
    return torch.where(is_row, source, -1) if is_row.any() else None


def _attention(pipe: Any, denoiser: str) -> dict[str, Any]:
    """The attention processors of a denoiser."""
    return dict(getattr(getattr(pipe, denoiser, None), "attn_processors", {}))


def _check_same_arguments(recorded: DenoiserCall, name: str, kwargs: dict[str, Any]) -> None:
    def plain(tree: Any) -> Any:
        return map_tensors(tree, lambda path, tensor: path)

    if name != recorded.denoiser or plain(kwargs) != plain(recorded.kwargs):
        raise NotAGather("the denoiser's arguments, beside its tensors, aren't the same each time")


def _trace_batch_dims(pipe: Any, walk: Walk) -> list[dict[Path, int | None]]:
    """Which dimension of each argument runs over the batch.

    Found by walking with one prompt more and looking which dimensions grew. Comparing lengths with
    the number of prompts would be a guess: FLUX's `txt_ids` with 32 tokens looks batched in a batch
    of 32.
    """
    batch = len(walk.prompts)
    teacher = walk.slot_calls[0].rows
    denoiser_calls = iter(walk.denoiser_calls)
    batch_dims: list[dict[Path, int | None]] = []

    def grown(length: int) -> int:
        return length + length // batch

    def blank_rows(_: Callable[..., Any], input_ids: Tensor, mask: Tensor | None) -> Tensor:
        return teacher.new_zeros(*input_ids.shape, teacher.shape[-1])

    def compare_shapes(name: str, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        recorded = _next(denoiser_calls, "its denoiser")
        now = tensors_in(kwargs)
        dims: dict[Path, int | None] = {}
        for path, then in tensors_in(recorded.kwargs).items():
            if path not in now or now[path].ndim != then.ndim:
                raise NotAGather("the denoiser's arguments depend on the number of prompts")
            changed = [i for i in range(then.ndim) if now[path].shape[i] != then.shape[i]]
            if any(now[path].shape[i] != grown(then.shape[i]) for i in changed) or len(changed) > 1:
                raise NotAGather(f"{_name(path)} doesn't grow row by row with the batch")
            dims[path] = changed[0] if changed else None
        batch_dims.append(dims)
        target = recorded.target
        # LTX's long videos have a prompt for each window, and the denoiser no batch.
        rows = target.shape[0] if set(dims.values()) == {None} else grown(target.shape[0])
        blank = target.new_zeros(rows, *target.shape[1:])
        return with_first_tensor(recorded.output, blank)

    seed = walk.seed if isinstance(walk.seed, int) else [*walk.seed, walk.seed[0]]
    # Some take a picture for each prompt (DeepFloyd IF): a list of them has one more, too.
    pipeline_kwargs = {
        name: [*value, value[0]]
        if isinstance(value, list)
        and len(value) == batch
        and not isinstance(value[0], (int, float))
        else value
        for name, value in walk.pipeline_kwargs.items()
    }
    try:
        run_pipeline(
            pipe, [*walk.prompts, walk.prompts[0]], pipeline_kwargs, seed,
            encode=blank_rows, denoise=compare_shapes, zero_pooled=walk.zero_pooled,
        )  # fmt: skip
    except NotAGather:
        raise
    except Exception as refusal:
        # Such as CogVideoX, which wants an image for each prompt.
        pipe.maybe_free_model_hooks()  # the end of the pipeline's call, which was not reached
        raise NotAGather(
            f"it can't be called with one prompt more ({type(refusal).__name__})"
        ) from refusal
    return batch_dims


def _encode(numbers: Tensor, digits: int, width: int) -> Tensor:
    """(N,) -> (N, width): the base-16 digits of each number, plus 1, repeated over the channels."""
    powers = BASE ** torch.arange(digits, device=numbers.device)
    code = (numbers[:, None] // powers) % BASE + 1
    return code.repeat(1, -(-width // digits))[:, :width]


def _decode(tensor: Tensor, digits: int) -> Tensor:
    """(..., width) -> (...): the number that each row carries in all of its channels, or -1."""
    powers = BASE ** torch.arange(digits, device=tensor.device)
    first = tensor[..., :digits]
    code = first.nan_to_num(0, 0, 0).clamp(0, BASE + 1).long()
    number = ((code - 1) * powers).sum(-1)
    expected = _encode(number.flatten().clamp(min=0), digits, tensor.shape[-1])
    valid = ((code >= 1) & (code <= BASE)).all(-1)
    valid &= (expected.view(tensor.shape) == tensor).all(-1)
    return torch.where(valid, number, -1)


def _name(path: Path) -> str:
    return "/".join(map(str, path))


def _next(calls: Any, what: str) -> Any:
    try:
        return next(calls)
    except StopIteration:
        raise NotAGather(f"{what} is called more often when T5's output changes") from None
