"""The teacher's trajectories: the denoiser's arguments and predictions as the pipeline runs.

The same run finds out where T5's token embeddings stand in the denoiser's arguments. Nearly every
pipeline only copies them: repeats them for several images, concatenates those of a prompt and a
negative prompt, pads or prefixes them. So T5's slot returns embeddings that carry an index, and
whenever the denoiser is called, the teacher's embeddings are put in the place of these codes.
A pipeline that does more than copying is told by a guard, and captured without codes.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import DistillError
from . import pipeline
from .pipeline import Encode, Path, first_tensor, map_tensors, tensors_in, with_first_tensor
from .teacher import TeacherEmbeddings

# Digits are 1 to 16: exact in bfloat16 and float16, and no padding's 0. Five count to a million.
_BASE, _DIGITS = 16, 5
_FALLBACK = "fallback"  # in `layouts`: why this pipeline is captured without codes

Dims = dict[Path, int]  # the batch dimension of each tensor that has one
Predict = Callable[[int, Callable[..., Any], dict[str, Any]], Tensor]  # index, forward, kwargs


class NotAGather(DistillError):
    """The pipeline does more with T5's embeddings than copying them: the fallback serves it."""


@dataclass(frozen=True)
class DenoiserCall:
    """One call of the denoiser.

    Attributes:
        denoiser: The component, such as `transformer`.
        kwargs: Every argument by its name. Tensors are copies; calls that share one, such as the
            text, share its copy.
        output: A copy of what `forward` returned.
        sources: For each tensor that holds token embeddings of T5, by its path: int64 of its shape
            without the channels, which of all token embeddings of the trajectory stands there, or
            -1. Empty for a trajectory without codes.
    """

    denoiser: str
    kwargs: dict[str, Any]
    output: Any
    sources: dict[Path, Tensor]

    @property
    def target(self) -> Tensor:
        """The teacher's prediction, (N, ...): a sample for each prompt, or two under CFG."""
        return first_tensor(self.output)


@dataclass(frozen=True)
class Trajectory:
    """The teacher's trajectories for a batch of prompts, and what it takes to run them again.

    Attributes:
        prompts, pipeline_kwargs, seed, zero_pooled: As passed to `capture`.
        encoder_calls: The prompts of each call of T5, by their index in the `TeacherEmbeddings`.
        origin: Of each of T5's token embeddings in these calls, the prompt, by its index again, and
            the position in it.
        denoiser_calls: In their order.
        images: That the pipeline generated, if they were decoded and it makes images.
        batch_dims: For each denoiser call, the batch dimension of each tensor that has one, by
            path. None if the pipeline isn't a gather, for the `reason` that follows.
        reason: Why T5's embeddings can't be replaced in the denoiser's arguments, or "".
    """

    prompts: tuple[str, ...]
    pipeline_kwargs: dict[str, Any]
    seed: int | Sequence[int]
    zero_pooled: bool
    encoder_calls: list[tuple[int, ...]] = field(default_factory=list)
    origin: list[tuple[int, int]] = field(default_factory=list)
    denoiser_calls: list[DenoiserCall] = field(default_factory=list)
    images: tuple[Image.Image, ...] = ()
    batch_dims: list[Dims] | None = None
    reason: str = ""

    def run(self, pipe: Any, **options: Any) -> tuple[Image.Image, ...]:
        """`run_pipeline` as for this trajectory."""
        of_request = (self.prompts, self.pipeline_kwargs, self.seed)
        return pipeline.run_pipeline(pipe, *of_request, zero_pooled=self.zero_pooled, **options)

    def places(self, call: DenoiserCall) -> list[int]:
        """For each sample of a denoiser call, the place of its prompt in `prompts`."""
        # The branches of guidance follow each other.
        return [i % len(self.prompts) for i in range(len(call.target))]


def capture(
    pipe: Any,
    prompts: Sequence[str],
    *,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    seed: int | Sequence[int] = 0,
    zero_pooled: bool = False,
    teacher: TeacherEmbeddings | None = None,
    decode: bool = False,
    layouts: dict[Any, Any] | None = None,
) -> Trajectory:
    """Run `pipe` on a batch of prompts and record its denoiser calls.

    Args:
        pipe: A pipeline with a T5 in its text slot.
        prompts: The batch, B prompts.
        pipeline_kwargs: How to call the pipeline: `height`, `width`, `num_inference_steps`,
            `guidance_scale`, `max_sequence_length`, ... A `negative_prompt` is one string. Instead
            of `num_images_per_prompt`, repeat a prompt.
        seed: Of all noise: one for the batch, or one for each prompt, whose noise then doesn't
            depend on its batch.
        zero_pooled: Replace `pooled_projections` by zeros, where the denoiser takes them (section 4
            of arXiv 2503.19897: T5's embeddings, and not CLIP's vector, must carry the prompt).
        teacher: The embeddings of prompts that were encoded before, to which these are added.
        decode: Also decode the images.
        layouts: What was found out about earlier trajectories of this pipeline, and is added to.
            For a batch of the same shapes, the guard isn't run again, which costs two runs of the
            pipeline without its denoiser.

    Returns:
        The trajectory. The pipeline is as it was.

    Raises:
        NoT5SlotError: The pipeline has no T5.
        DistillError: The pipeline doesn't take these `pipeline_kwargs`, or doesn't call its
            denoiser; or the denoiser has a cache.
    """
    pipeline.check_no_cache(pipe)
    layouts = {} if layouts is None else layouts
    prompts = [prompts] if isinstance(prompts, str) else prompts
    kwargs = pipeline.check_pipeline_kwargs(pipe, pipeline_kwargs)
    request = Trajectory(tuple(prompts), kwargs, seed, zero_pooled)
    teacher = TeacherEmbeddings() if teacher is None else teacher
    record = partial(_record, pipe, request, teacher, decode)
    if _FALLBACK not in layouts:
        try:
            trajectory = record(coded=True)
            calls = [{call.denoiser: call.kwargs} for call in trajectory.denoiser_calls]
            shapes = [(path, tensor.shape) for path, tensor in tensors_in(calls).items()]
            key = (len(request.prompts), *shapes)  # all that the layout depends on
            if key not in layouts:
                _check_gather(pipe, trajectory, teacher)
                layouts[key] = _batch_dims(pipe, trajectory, teacher)
            return replace(trajectory, batch_dims=layouts[key])
        except NotAGather as reason:
            layouts[_FALLBACK] = str(reason)
    return replace(record(coded=False), reason=layouts[_FALLBACK])


def run_again(
    pipe: Any, trajectory: Trajectory, encode: Encode, predict: Predict, grad: bool = False
) -> None:
    """Run a pipeline as in a trajectory, with `predict(i, forward, kwargs)` in denoiser call i.

    If that repeats the recorded prediction, this costs the pipeline's own code alone.

    Raises:
        NotAGather: With these embeddings, it calls its denoisers in another order or number.
    """
    calls = iter(enumerate(trajectory.denoiser_calls))

    def denoise(name: str, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        i, recorded = next(calls, (0, None))
        if recorded is None or recorded.denoiser != name:
            raise NotAGather("the calls of its denoiser depend on T5's output")
        return with_first_tensor(recorded.output, predict(i, forward, kwargs))

    trajectory.run(pipe, encode=encode, denoise=denoise, grad=grad)
    if any(calls):
        raise NotAGather("the calls of its denoiser depend on T5's output")


def _record(
    pipe: Any, request: Trajectory, teacher: TeacherEmbeddings, decode: bool, coded: bool
) -> Trajectory:
    """Record the requested trajectory, with T5's embeddings coded on their way or not."""
    found = replace(request, encoder_calls=[], origin=[], denoiser_calls=[])
    embeddings: list[Tensor] = []  # (B, S, D) of each encoder call that is coded
    # Of each tensor: itself, so that no other one gets its id; its copy, and what stands in it.
    copies: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor | None]] = {}
    denoisers = pipeline.denoisers(pipe)
    attention = {name: getattr(d, "attn_processors", None) for name, d in denoisers.items()}

    def record_encoder(forward: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
        prompts, first = tuple(teacher.add(ids, mask)), len(found.origin)
        found.encoder_calls.append(prompts)
        found.origin.extend(itertools.product(prompts, range(ids.shape[1])))
        encoded = teacher.get(forward, prompts, ids.device)
        if not coded:
            return encoded
        embeddings.append(encoded)
        codes = _encode(torch.arange(first, len(found.origin)), encoded.shape[-1])
        return codes.to(encoded).view(encoded.shape)

    def copy(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        key = (id(tensor), tensor._version)
        if key not in copies:
            copies[key] = (tensor, *_copy(tensor.detach(), embeddings))
        return copies[key][1:]

    def record_denoiser(name: str, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        if coded and getattr(denoisers[name], "attn_processors", None) != attention[name]:
            # Perturbed-attention guidance: it takes a batch apart, and needs all of it.
            raise NotAGather("it changes its denoiser's attention for the length of a call")
        copied = {path: copy(tensor) for path, tensor in tensors_in(kwargs).items()}
        sources = {path: source for path, (_, source) in copied.items() if source is not None}
        recorded = map_tensors(kwargs, lambda path, _: copied[path][0])
        decoded = map_tensors(kwargs, lambda path, t: copied[path][0] if path in sources else t)
        output = forward(**decoded)
        kept = with_first_tensor(output, first_tensor(output).clone())
        found.denoiser_calls.append(DenoiserCall(name, recorded, kept, sources))
        return output

    images = request.run(pipe, encode=record_encoder, denoise=record_denoiser, decode=decode)
    if not found.denoiser_calls or not found.encoder_calls:
        raise DistillError(f"{type(pipe).__name__} didn't call both its T5 and its denoiser.")
    return replace(found, images=images)


def _copy(tensor: Tensor, teachers: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """A copy with the teacher's embeddings, of each call (B, S, D), in the place of their codes.

    Also returns the index among all of each token embedding in it, or -1 where there is none: int64
    of the tensor's shape without the channels. None if it holds none at all.
    """
    # Expanded where `tensor` is, strides kept: kernels round as their input lies in memory.
    once = tensor[tuple(slice(1 if stride == 0 else None) for stride in tensor.stride())]
    copy, source = once.clone(), None
    width = teachers[0].shape[-1] if teachers else None
    if tensor.ndim > 1 and tensor.shape[-1] == width and tensor.is_floating_point():
        embeddings = torch.cat([of_call.flatten(0, 1) for of_call in teachers])
        index = _decode(once)
        is_text = (index >= 0) & (index < len(embeddings))
        if is_text.any():
            copy[is_text] = embeddings[index[is_text]].to(copy)
            source = torch.where(is_text, index, -1).expand(tensor.shape[:-1])
    return copy.expand_as(tensor), source


def _encode(indices: Tensor, width: int) -> Tensor:
    """(N,) -> (N, width): the base-16 digits of each index, plus 1, repeated over the channels."""
    powers = _BASE ** torch.arange(_DIGITS, device=indices.device)
    code = (indices[:, None] // powers) % _BASE + 1
    return code.repeat(1, -(-width // _DIGITS))[:, :width]


def _decode(tensor: Tensor) -> Tensor:
    """(..., width) -> (...): the index that an embedding carries in all of its channels, or -1."""
    powers = _BASE ** torch.arange(_DIGITS, device=tensor.device)
    code = tensor[..., :_DIGITS].nan_to_num(0, 0, 0).clamp(0, _BASE + 1).long()
    index = ((code - 1) * powers).sum(-1).clamp(min=0)
    expected = _encode(index.flatten(), tensor.shape[-1]).view(tensor.shape)
    return torch.where((expected == tensor).all(-1), index, -1)


def _check_gather(pipe: Any, trajectory: Trajectory, teacher: TeacherEmbeddings) -> None:
    """Run the pipeline again, with T5's own embeddings: its denoiser must be called as before."""
    if not any(call.sources for call in trajectory.denoiser_calls):
        raise NotAGather("no token embedding of T5 reaches its denoiser unchanged")

    def compare(i: int, _: Any, kwargs: dict[str, Any]) -> Tensor:
        recorded, now = trajectory.denoiser_calls[i], tensors_in(kwargs)
        rest, rest_now = (map_tensors(k, lambda *_: Tensor) for k in (recorded.kwargs, kwargs))
        if rest_now != rest:
            raise NotAGather("the denoiser's arguments, beside its tensors, depend on T5's output")
        for path, then in tensors_in(recorded.kwargs).items():
            if now[path].dtype != then.dtype or not torch.equal(now[path], then):
                name = "/".join(map(str, path))
                raise NotAGather(f"{name} depends on T5's output, and is no copy of its embeddings")
        return recorded.target.clone()

    run_again(pipe, trajectory, teacher.encode, compare)


def _batch_dims(pipe: Any, trajectory: Trajectory, teacher: TeacherEmbeddings) -> list[Dims]:
    """Find the batch dimensions of the arguments, by a run with one prompt more: they grow."""
    # Their lengths alone don't tell: FLUX's `txt_ids` of 32 tokens look batched among 32 prompts.
    prompts, seed = trajectory.prompts, trajectory.seed
    found: list[Dims] = []

    def one_more(values: Any) -> Any:
        # Some take an image for each prompt (DeepFloyd IF): a list of them has one more, too.
        if isinstance(values, Tensor) and values.ndim > 3 and len(values) == len(prompts):
            return torch.cat([values, values[:1]])
        of_prompts = isinstance(values, list) and len(values) == len(prompts)
        numbers = of_prompts and isinstance(values[0], (int, float))
        return [*values, values[0]] if of_prompts and not numbers else values

    def grown(shape: torch.Size, dim: int | None) -> tuple[int, ...]:
        return tuple(n + n // len(prompts) if i == dim else n for i, n in enumerate(shape))

    def compare_shapes(i: int, _: Any, kwargs: dict[str, Any]) -> Tensor:
        recorded, now = trajectory.denoiser_calls[i], tensors_in(kwargs)
        dims = {}
        for path, then in tensors_in(recorded.kwargs).items():
            if now[path].shape != then.shape:
                fitting = [i for i in range(then.ndim) if grown(then.shape, i) == now[path].shape]
                if not fitting:
                    name = "/".join(map(str, path))
                    raise NotAGather(f"{name} doesn't grow sample by sample with the batch")
                dims[path] = fitting[0]
        found.append(dims)
        # LTX's long videos have a prompt for each window, and the denoiser no batch.
        return recorded.target.new_zeros(grown(recorded.target.shape, 0 if dims else None))

    more = replace(
        trajectory,
        prompts=(*prompts, prompts[0]),
        pipeline_kwargs={key: one_more(v) for key, v in trajectory.pipeline_kwargs.items()},
        seed=seed if isinstance(seed, int) else [*seed, seed[0]],
    )
    try:
        run_again(pipe, more, teacher.encode, compare_shapes)
    except NotAGather:
        raise
    except DistillError as refusal:  # such as CogVideoX, which wants an image for each prompt
        reason = f"it can't be called with one prompt more ({type(refusal.__cause__).__name__})"
        raise NotAGather(reason) from refusal
    return found
