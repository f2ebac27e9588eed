"""The denoiser called again, with the student's embeddings where the teacher's stood.

Each sample of a denoiser call stands alone: x_t, t, its conditioning, the teacher's prediction, and
the prompt whose embeddings it reads. So samples of different trajectories and timesteps can share a
call. For a pipeline that changes T5's embeddings on their way, its own code is run instead.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import DistillError
from ..slot import compute_dtype
from .pipeline import Path, first_tensor, map_tensors, teacher_of, tensor_sha256, tensors_in
from .trajectory import DenoiserCall, Dims, NotAGather, Trajectory, run_again

NO_PROMPT = -1

EmbeddingsOf = Callable[[tuple[int, ...]], Tensor]  # of prompts by index, (B, S, D)


@dataclass(frozen=True)
class Call:
    """A denoiser call that can be repeated with other embeddings: `Samples` or `TrajectoryCall`.

    Attributes:
        prompts: The indices of its prompts in `TeacherEmbeddings`.
        places: For each of its N samples, the place of its prompt among those of its trajectory.
        target: (N, ...), the teacher's prediction.
    """

    prompts: list[int]
    places: list[int]
    target: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def without(self, *prompts: int) -> "Call | None":
        """Only the samples of other prompts, if it can be taken apart; None if there are none."""
        return self


@dataclass(frozen=True)
class Samples(Call):
    """N samples of one denoiser call, or of several that agree in everything that isn't batched.

    Attributes:
        prompts: As of every `Call`; here of each sample, or `NO_PROMPT`.
        denoiser: The component that is called.
        kwargs: Its arguments; those with a batch dimension are in the following.
        batch_dims: Their batch dimension, by path; below it is the first.
        batched: (N, ...), but for arguments of nothing but T5's embeddings (SD3's has CLIP's, too).
        text: (N, ...) int64, of the shape of an argument with T5's embeddings, without the
            channels: which token embedding of the sample's prompt stands there, or -1.
    """

    denoiser: str
    kwargs: dict[str, Any]
    batch_dims: Dims
    batched: dict[Path, Tensor]
    text: dict[Path, Tensor]

    @cached_property
    def signature(self) -> Hashable:
        """Equal for samples that can share a denoiser call."""

        def describe(path: Path, tensor: Tensor) -> Any:
            if path not in self.batch_dims:
                return tensor.dtype, tensor.shape, tensor_sha256(tensor)
            parts = (self.batched.get(path), self.text.get(path))
            return tensor.dtype, [None if part is None else part.shape[1:] for part in parts]

        return self.denoiser, repr(map_tensors(self.kwargs, describe)), self.target.shape[1:]

    def without(self, *prompts: int) -> "Samples | None":
        """Only the samples of other prompts; None if there are none."""
        kept = [i for i, prompt in enumerate(self.prompts) if prompt not in prompts]
        if len(kept) == len(self):
            return self
        return collate([(self, i) for i in kept]) if kept else None


@dataclass(frozen=True)
class TrajectoryCall(Call):
    """A denoiser call that can't be taken apart into samples: `trajectory.reason` says why.

    Its prompts are those of all encoder calls, as each may matter to every sample.
    """

    trajectory: Trajectory
    index: int


def split_trajectory(trajectory: Trajectory) -> list[Call]:
    """Take a trajectory apart into the `Samples` of its denoiser calls.

    Of a pipeline that isn't a gather, these are `TrajectoryCall`s, each with all prompts.
    """
    try:
        if trajectory.batch_dims is None:
            raise NotAGather(trajectory.reason)
        origin = torch.tensor(trajectory.origin, device=trajectory.denoiser_calls[0].target.device)
        return [
            _split_call(call, dims, trajectory.places(call), origin)
            for call, dims in zip(trajectory.denoiser_calls, trajectory.batch_dims, strict=True)
        ]
    except NotAGather as reason:
        whole = replace(trajectory, reason=str(reason))
        prompts = [prompt for encoded in whole.encoder_calls for prompt in encoded]
        return [
            TrajectoryCall(prompts, whole.places(call), call.target, whole, i)
            for i, call in enumerate(whole.denoiser_calls)
        ]


def _split_call(call: DenoiserCall, batch_dims: Dims, places: list[int], origin: Tensor) -> Samples:
    """Take a call apart, or raise NotAGather; `origin` is that of the trajectory, (T, 2)."""
    N = len(call.target)
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
    return Samples(prompts, places, call.target, call.denoiser, kwargs, batch_dims, batched, text)


def collate(picks: Sequence[tuple[Samples, int]]) -> Samples:
    """Join single samples, of `Samples` with one signature, into a batch."""
    first, _ = picks[0]
    return replace(
        first,
        batched={p: torch.stack([one.batched[p][i] for one, i in picks]) for p in first.batched},
        text={p: torch.stack([one.text[p][i] for one, i in picks]) for p in first.text},
        prompts=[one.prompts[i] for one, i in picks],
        places=[one.places[i] for one, i in picks],
        target=torch.stack([one.target[i] for one, i in picks]),
    )


def predict(pipe: Any, samples: Samples, embeddings: Tensor) -> Tensor:
    """The denoiser's prediction for `samples`, their text replaced.

    Args:
        pipe: The pipeline that the samples were captured from.
        samples: N of them.
        embeddings: (N, S, D), for each sample the student's output for its prompt.

    Returns:
        (N, ...), differentiable in `embeddings`. With the teacher's own embeddings, and all samples
        of a call in their order, it is bitwise the target.
    """
    N, S, D = embeddings.shape
    starts = torch.arange(0, N * S, S, device=embeddings.device)

    def argument(path: Path, tensor: Tensor) -> Tensor:
        if path not in samples.batch_dims:
            return tensor
        value: Any = samples.batched.get(path)
        if (positions := samples.text.get(path)) is not None:
            index = positions.view(N, -1).clamp(min=0) + starts[:, None]
            # Not by `gather`, which takes an index for every channel and three times as long.
            text = embeddings.to(tensor.dtype).flatten(0, 1).index_select(0, index.flatten())
            text = text.view(*positions.shape, D)
            value = text if value is None else torch.where((positions < 0)[..., None], value, text)
        return value.movedim(0, samples.batch_dims[path])

    denoiser = getattr(pipe, samples.denoiser)
    return first_tensor(denoiser(**map_tensors(samples.kwargs, argument)))


def predictions(pipe: Any, calls: Sequence[Call], embeddings_of: EmbeddingsOf) -> Iterator[Tensor]:
    """The denoiser's predictions at some calls of one trajectory, with other embeddings.

    Args:
        pipe: The pipeline that they were captured from.
        calls: From `split_trajectory`, in their order; or a batch of a `TrajectoryReservoir`.
        embeddings_of: Called with prompts by their index in `TeacherEmbeddings`: for each `Samples`
            with those of its samples; or for all `TrajectoryCall`s, which one run of the pipeline
            serves, with those of each encoder call.

    Yields:
        For each call (N, ...), differentiable in the embeddings if grad is enabled.

    Raises:
        DistillError: Run again, the pipeline calls its denoiser with other noise.
    """
    if whole := [call for call in calls if isinstance(call, TrajectoryCall)]:
        yield from _predict_through_pipeline(pipe, whole, embeddings_of)
    for call in calls:
        if isinstance(call, Samples):
            yield predict(pipe, call, embeddings_of(tuple(call.prompts)))


def _predict_through_pipeline(
    pipe: Any, calls: Sequence[TrajectoryCall], embeddings_of: EmbeddingsOf
) -> list[Tensor]:
    """The predictions at some calls of one trajectory, by the pipeline's own code.

    It runs under autograd with other embeddings in the text slot, and a denoiser that predicts in
    `calls` and always returns the recorded prediction, so that x_t stays the teacher's. This serves
    every pipeline, such as StableAudio, which projects T5's embeddings with a learned layer.
    """
    trajectory, found = calls[0].trajectory, []
    indices = [call.index for call in calls]
    grad = torch.is_grad_enabled()
    dtype = compute_dtype(teacher_of(pipe))
    # Before the pipeline is called, as that seeds what the student's dropout draws from.
    encoded = iter([embeddings_of(prompts).to(dtype) for prompts in trajectory.encoder_calls])

    def encode(_: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
        return next(encoded)[:, : ids.shape[1]]

    def predict_or_repeat(i: int, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Tensor:
        recorded, now = trajectory.denoiser_calls[i], tensors_in(kwargs)
        for path, then in tensors_in(recorded.kwargs).items() if grad else ():
            if not now[path].requires_grad and not torch.equal(now[path], then):
                raise DistillError(
                    f"{type(pipe).__name__}, run again, called its denoiser with another "
                    f"{'/'.join(map(str, path))}: its trajectory can't be learned from. Does the "
                    "scheduler draw noise of its own? Or this depends on T5, without a gradient."
                )
        if i in indices:
            found.append(first_tensor(forward(**kwargs)))
        return recorded.target.clone()

    run_again(pipe, trajectory, encode, predict_or_repeat, grad=grad)
    return found
