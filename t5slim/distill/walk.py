"""The teacher's trajectories: what the denoiser is asked, and answers, as the pipeline runs.

Everything that a walk needs beside the prompts (schedule, latent packing, guidance, classifier-free
guidance) is the pipeline's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import DistillError
from .calls import (
    CopyOnce,
    call_denoiser,
    call_encoder,
    first_tensor,
    map_tensors,
    with_first_tensor,
)
from .pipeline import DENOISERS, Encode, check_no_cache, images_of, run_pipeline


@dataclass(frozen=True)
class SlotCall:
    """One call of the encoder in the slot.

    Attributes:
        input_ids: (B, S) int64.
        attention_mask: (B, S), or None for the pipelines that pass none (FLUX.1, SD3, LTX).
        rows: (B, S, D), the teacher's output in its own dtype.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    rows: Tensor


@dataclass(frozen=True)
class DenoiserCall:
    """One call of the denoiser: its arguments by name, and its answer.

    Attributes:
        denoiser: the component that was called, such as `transformer`.
        kwargs: every argument, also the positional ones, under its name in `forward`. Tensors are
            copies; one that several calls share (the text) is one copy.
        output: what `forward` returned.
    """

    denoiser: str
    kwargs: dict[str, Any]
    output: Any

    @property
    def target(self) -> Tensor:
        """The teacher's prediction, (R, ...): one row for each prompt, or two under CFG."""
        return first_tensor(self.output)


@dataclass(frozen=True)
class Walk:
    """The teacher's trajectories for a batch of prompts, what it takes to walk them again, and the
    pictures in which they end, if these were asked for and the pipeline makes some.
    """

    prompts: tuple[str, ...]
    pipeline_kwargs: dict[str, Any]
    seed: int | Sequence[int]
    zero_pooled: bool
    slot_calls: tuple[SlotCall, ...]
    denoiser_calls: tuple[DenoiserCall, ...]
    images: tuple[Image.Image, ...] = ()

    @property
    def denoiser_rows(self) -> int:
        """How many batch rows the denoiser predicted: the cost of this walk."""
        return sum(call.target.shape[0] for call in self.denoiser_calls)


def capture(
    pipe: Any,
    prompts: Sequence[str],
    *,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    seed: int | Sequence[int] = 0,
    zero_pooled: bool = False,
    encode: Encode | None = None,
    autocast_dtype: torch.dtype | None = None,
    paint: bool = False,
) -> Walk:
    """Run `pipe` on a batch of prompts and record its denoiser calls.

    Args:
        pipe: a pipeline with a T5 in its text slot.
        prompts: the batch, B prompts.
        pipeline_kwargs: how to call the pipeline: `height`, `width`, `num_inference_steps`,
            `guidance_scale`, `max_sequence_length`, ... A `negative_prompt` is one string.
        seed: of the noise that the trajectories start from, and of a stochastic scheduler: one for
            the batch, or one for each prompt, whose noise then doesn't depend on its batch.
        zero_pooled: replace `pooled_projections` by zeros, where the denoiser takes one (section 4
            of arXiv 2503.19897: so that T5's rows, and not CLIP's vector, must carry the prompt).
        encode: called in place of the encoder's `forward`, as `encode(forward, input_ids,
            attention_mask)`; returns (B, S, D). Default: the encoder itself.
        autocast_dtype: run the denoiser, and nothing else, under autocast to this dtype. Its answer
            is cast back to the denoiser's own dtype, which schedulers would otherwise pass on to
            x_t.
        paint: decode the pictures, which otherwise nothing is.

    Returns:
        The `Walk`. The pipeline is as it was.

    Raises:
        NoT5SlotError: the pipeline has no T5.
        DistillError: `pipeline_kwargs` has a name that the pipeline doesn't take, the denoiser was
            never called, or it has a cache.
    """
    check_no_cache(pipe)
    slot_calls: list[SlotCall] = []
    denoiser_calls: list[DenoiserCall] = []
    copy = CopyOnce()

    def record_encoder(
        forward: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        rows = (encode or call_encoder)(forward, input_ids, attention_mask)
        slot_calls.append(
            SlotCall(
                input_ids.clone(), None if attention_mask is None else attention_mask.clone(), rows
            )
        )
        return rows.clone()  # Cosmos zeroes rows of what it gets in place

    def record_denoiser(name: str, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        recorded = map_tensors(kwargs, lambda _, tensor: copy(tensor))
        output = call_denoiser(getattr(pipe, name), forward, kwargs, autocast_dtype)
        target = first_tensor(output).clone()
        denoiser_calls.append(DenoiserCall(name, recorded, with_first_tensor(output, target)))
        return output

    output = run_pipeline(
        pipe, prompts, pipeline_kwargs or {}, seed,
        encode=record_encoder, denoise=record_denoiser, zero_pooled=zero_pooled,
        output_type="pil" if paint else "latent",
    )  # fmt: skip
    if not denoiser_calls or not slot_calls:
        raise DistillError(
            f"{type(pipe).__name__} called its T5 {len(slot_calls)} times and its denoiser (one of "
            f"{', '.join(DENOISERS)}) {len(denoiser_calls)} times; distillation needs both."
        )
    return Walk(
        tuple(prompts), dict(pipeline_kwargs or {}), seed, zero_pooled,
        tuple(slot_calls), tuple(denoiser_calls), images_of(output) if paint else (),
    )  # fmt: skip
