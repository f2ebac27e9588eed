"""The denoiser called again, with the student's embeddings where the teacher's stood.

Each sample of a denoiser call stands alone: x_t, t, its conditioning, the teacher's prediction, and
the prompt whose embeddings it reads. So samples of different trajectories and timesteps can share a
call. For a pipeline that changes T5's embeddings on their way, its own code is run instead.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import DistillError
from .calls import Path, call_denoiser, first_tensor, map_tensors, tensor_sha256, tensors_in
from .teacher import TeacherEmbeddings
from .trajectory import DenoiserCall, NotAGather, Trajectory, run_again

logger = logging.getLogger(__name__)

NO_PROMPT = -1


@dataclass(frozen=True)
class Samples:
    """N samples of one denoiser call, or of several that agree in everything that isn't batched.

    Attributes:
        denoiser: The component that is called.
        kwargs: Its arguments; those with a batch dimension are in the following.
        batch_dims: Their batch dimension, by path; below it is the first.
        batched: (N, ...), but for arguments of nothing but T5's embeddings (SD3's has CLIP's, too).
        text: (N, ...) int64, of the shape of an argument with T5's embeddings, without the
            channels: which token embedding of the sample's prompt stands there, or -1.
        prompts: For each sample the index of its prompt in `TeacherEmbeddings`, or `NO_PROMPT`.
        target: (N, ...), the teacher's prediction.
    """

    denoiser: str
    kwargs: dict[str, Any]
    batch_dims: dict[Path, int]
    batched: dict[Path, Tensor]
    text: dict[Path, Tensor]
    prompts: list[int]
    target: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def signature(self) -> Hashable:
        """Equal for samples that can share a denoiser call."""

        def describe(path: Path, tensor: Tensor) -> Any:
            if path not in self.batch_dims:
                return tensor.dtype, tensor.shape, tensor_sha256(tensor)
            parts = (self.batched.get(path), self.text.get(path))
            return tensor.dtype, [None if part is None else part.shape[1:] for part in parts]

        return self.denoiser, repr(map_tensors(self.kwargs, describe)), self.target.shape[1:]

    def select(self, indices: Sequence[int]) -> Samples:
        """Some of the samples, at least one."""
        return collate([(self, i) for i in indices])


@dataclass(frozen=True)
class TrajectoryCall:
    """A denoiser call that can't be taken apart into samples: `trajectory.reason` says why."""

    trajectory: Trajectory
    index: int
    prompts: list[int]

    def __len__(self) -> int:
        return len(self.target)

    @property
    def target(self) -> Tensor:
        """The teacher's prediction, (N, ...)."""
        return self.trajectory.denoiser_calls[self.index].target


def split_trajectory(
    trajectory: Trajectory, teacher: TeacherEmbeddings
) -> list[Samples | TrajectoryCall]:
    """Take a trajectory apart into the samples of its denoiser calls, their prompts by index.

    Of a pipeline that isn't a gather: the calls as a whole, each with all prompts.
    """
    prompts: list[int] = []
    origin: list[tuple[int, int]] = []  # of each token embedding of T5: prompt, position in it
    for call in trajectory.encoder_calls:
        prompts += (of_call := teacher.add(call.input_ids, call.attention_mask))
        origin += itertools.product(of_call, range(call.input_ids.shape[1]))
    try:
        if trajectory.batch_dims is None:
            raise NotAGather(trajectory.reason)
        table = torch.tensor(origin, device=trajectory.encoder_calls[0].embeddings.device)
        return [
            _split_call(call, dims, table)
            for call, dims in zip(trajectory.denoiser_calls, trajectory.batch_dims, strict=True)
        ]
    except NotAGather as reason:
        logger.info("The student is led through the whole pipeline, as %s.", reason)
        whole = replace(trajectory, reason=str(reason))
        return [TrajectoryCall(whole, i, prompts) for i in range(len(whole.denoiser_calls))]


def _split_call(call: DenoiserCall, dims: dict[Path, int | None], origin: Tensor) -> Samples:
    N = len(call.target)
    batch_dims = {path: dim for path, dim in dims.items() if dim is not None}
    if not call.sources.keys() <= batch_dims.keys():
        raise NotAGather("one tensor of T5's embeddings serves the whole batch")
    batched: dict[Path, Tensor] = {}
    text: dict[Path, Tensor] = {}
    owners = [torch.full((N, 1), NO_PROMPT, device=origin.device)]
    tensors = tensors_in(call.kwargs)
    for path, dim in batch_dims.items():
        tensor = tensors[path].movedim(dim, 0)
        if len(tensor) != N:
            raise NotAGather(f"{len(tensor)} samples go into the denoiser, {N} come out")
        if path in call.sources:
            source = call.sources[path].movedim(dim, 0)
            prompt, position = origin[source.clamp(min=0)].unbind(-1)
            text[path] = torch.where(source >= 0, position, -1)
            owners.append(torch.where(source >= 0, prompt, NO_PROMPT).flatten(1))
        if path not in call.sources or (text[path] < 0).any():
            batched[path] = tensor
    owner = torch.cat(owners, 1)
    if not ((owner == owner.amax(1, keepdim=True)) | (owner == NO_PROMPT)).all():
        raise NotAGather("a sample of the denoiser reads several prompts")
    kwargs = map_tensors(
        call.kwargs, lambda path, tensor: tensor.new_empty(0) if path in batch_dims else tensor
    )
    prompts = owner.amax(1).tolist()
    return Samples(call.denoiser, kwargs, batch_dims, batched, text, prompts, call.target)


def collate(picks: Sequence[tuple[Samples, int]]) -> Samples:
    """Join single samples, of `Samples` with one signature, into a batch."""
    first, _ = picks[0]
    return replace(
        first,
        batched={
            path: torch.stack([samples.batched[path][i] for samples, i in picks])
            for path in first.batched
        },
        text={
            path: torch.stack([samples.text[path][i] for samples, i in picks])
            for path in first.text
        },
        prompts=[samples.prompts[i] for samples, i in picks],
        target=torch.stack([samples.target[i] for samples, i in picks]),
    )


def predict(
    pipe: Any, samples: Samples, embeddings: Tensor, autocast_dtype: torch.dtype | None = None
) -> Tensor:
    """The denoiser's prediction for `samples`, their text replaced.

    Args:
        pipe: The pipeline that the samples were captured from.
        samples: N of them.
        embeddings: (N, S, D), for each sample the student's output for its prompt.
        autocast_dtype: Run the denoiser under autocast to this dtype.

    Returns:
        (N, ...), differentiable in `embeddings`. With the teacher's own embeddings, and all samples
        of a call in their order, it is bitwise the target.
    """
    N, S, D = embeddings.shape
    starts = torch.arange(0, N * S, S, device=embeddings.device)

    def argument(path: Path, tensor: Tensor) -> Tensor:
        if path not in samples.batch_dims:
            return tensor
        value = samples.batched.get(path)
        if (positions := samples.text.get(path)) is not None:
            index = positions.view(N, -1).clamp(min=0) + starts[:, None]
            # Not by `gather`, which takes an index for every channel and three times as long.
            text = embeddings.to(tensor.dtype).flatten(0, 1).index_select(0, index.flatten())
            text = text.view(*positions.shape, D)
            value = text if value is None else torch.where((positions < 0)[..., None], value, text)
        assert value is not None
        return value.movedim(0, samples.batch_dims[path])

    denoiser = getattr(pipe, samples.denoiser)
    kwargs = map_tensors(samples.kwargs, argument)
    return first_tensor(call_denoiser(denoiser, denoiser, kwargs, autocast_dtype))


def predict_through_pipeline(
    pipe: Any,
    trajectory: Trajectory,
    encode: Callable[[Tensor, Tensor | None], Tensor],
    calls: Collection[int],
    autocast_dtype: torch.dtype | None = None,
) -> dict[int, Tensor]:
    """The denoiser's predictions at some calls of a trajectory, with other embeddings in the slot.

    The pipeline's own code is run under autograd: `encode(input_ids, attention_mask)` in the text
    slot, and a denoiser that predicts in `calls`, and always returns the recorded prediction, so
    that x_t stays the teacher's. It serves every pipeline, such as StableAudio, which projects T5's
    embeddings with a learned layer; only samples of one trajectory and one call can share a batch.
    Each prediction is (N, ...), differentiable in the embeddings if grad is enabled.
    """
    predictions: dict[int, Tensor] = {}
    grad = torch.is_grad_enabled()
    # Before the pipeline is called, as that seeds what the student's dropout draws from.
    embeddings = iter(
        [
            encode(call.input_ids, call.attention_mask).to(call.embeddings.dtype)
            for call in trajectory.encoder_calls
        ]
    )

    def predict_or_repeat(i: int, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Tensor:
        recorded, now = trajectory.denoiser_calls[i], tensors_in(kwargs)
        for path, then in tensors_in(recorded.kwargs).items() if grad else ():
            if not now[path].requires_grad and not torch.equal(now[path], then):
                raise DistillError(
                    f"{type(pipe).__name__}, run again from the same seed, called its denoiser "
                    f"with another {'/'.join(map(str, path))}: its trajectory can't be learned "
                    "from. Check that its scheduler draws its noise from the pipeline's generator."
                )
        if i in calls:
            denoiser = getattr(pipe, recorded.denoiser)
            output = call_denoiser(denoiser, forward, kwargs, autocast_dtype)
            predictions[i] = first_tensor(output)
        return recorded.target.clone()

    run_again(pipe, trajectory, lambda *_: next(embeddings), predict_or_repeat, grad=grad)
    return predictions
