"""The student through the whole pipeline, for pipelines that change T5's rows on their way.

StableAudio projects them with a learned layer, others read them with a ControlNet as well. There
the pipeline's own code is run under autograd: the student in the text slot, and a denoiser that
makes its prediction where one is asked for and returns the recorded answer, so that x_t stays the
teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ..errors import DistillError
from .calls import call_denoiser, first_tensor, tensors_in, with_first_tensor
from .pipeline import run_pipeline
from .walk import DenoiserCall, Walk


def predict_through_pipeline(
    pipe: Any,
    walk: Walk,
    encode: Callable[[Tensor, Tensor | None], Tensor],
    calls: Collection[int],
    autocast_dtype: torch.dtype | None = None,
) -> dict[int, Tensor]:
    """The denoiser's predictions at some calls of a walk, with other rows in the text slot.

    Needs no map of where T5's rows go, so it serves every pipeline; it costs the pipeline's own
    code and only rows of one walk and one call can share a batch.

    Args:
        pipe: the pipeline of the walk.
        walk: what `capture` returned.
        encode: `encode(input_ids, attention_mask)` gives the rows, (B, S, D).
        calls: which denoiser calls of the walk to predict.
        autocast_dtype: run the denoiser under autocast to this dtype.

    Returns:
        For each call its prediction, (R, ...), differentiable in the rows if grad is enabled.

    Raises:
        DistillError: x_t or another input that doesn't come from the text isn't what it was in the
            walk: the pipeline draws random numbers beside its generator.
    """
    predictions: dict[int, Tensor] = {}
    # Before the pipeline is called, as that seeds what the student's dropout draws from.
    student_rows = iter(
        [encode(c.input_ids, c.attention_mask).to(c.rows.dtype) for c in walk.slot_calls]
    )
    denoiser_calls = iter(enumerate(walk.denoiser_calls))

    def predict_or_repeat(name: str, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        i, recorded = next(denoiser_calls)
        if torch.is_grad_enabled():
            _check_same_path(pipe, recorded, kwargs)
        if i in calls:
            output = call_denoiser(getattr(pipe, name), forward, kwargs, autocast_dtype)
            predictions[i] = first_tensor(output)
        return with_first_tensor(recorded.output, recorded.target.clone())

    run_pipeline(
        pipe, walk.prompts, walk.pipeline_kwargs, walk.seed,
        encode=lambda *_: next(student_rows), denoise=predict_or_repeat,
        zero_pooled=walk.zero_pooled, grad=torch.is_grad_enabled(),
    )  # fmt: skip
    return predictions


def _check_same_path(pipe: Any, recorded: DenoiserCall, kwargs: dict[str, Any]) -> None:
    now = tensors_in(kwargs)
    for path, then in tensors_in(recorded.kwargs).items():
        if not now[path].requires_grad and not torch.equal(now[path], then):
            raise DistillError(
                f"{type(pipe).__name__}, walked again from the same seed, called its denoiser with "
                f"another {'/'.join(map(str, path))}: its trajectory can't be learned from. Check "
                "that its scheduler draws its noise from the pipeline's generator."
            )
