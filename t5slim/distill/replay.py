"""Ask the denoiser again, with the student's rows where the teacher's stood.

Each batch row of a denoiser call is an example by itself: x_t, t, its conditioning, the teacher's
prediction, and the prompt whose rows it read. Rows of different walks and timesteps can share a
call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .calls import Path, call_denoiser, first_tensor, map_tensors, tensors_in
from .teacher import PromptTable
from .trace import CallMap, NotAGather, trace
from .walk import DenoiserCall, Walk

NO_PROMPT = -1


@dataclass(frozen=True)
class TextInput:
    """One argument of the denoiser that holds rows of T5's output.

    Attributes:
        positions: (R, ...) int64, of the argument's shape without the channels: which row of the
            prompt's T5 output stands there, or -1.
        constant: (R, ..., D), what stands where `positions` is -1 (SD3: CLIP's rows); None if it
            nowhere is.
    """

    positions: Tensor
    constant: Tensor | None

    def fill(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The argument with other rows in it.

        Args:
            rows: (R, S, D), for each row of the call the output of T5 or a student for its prompt.
            dtype: of the argument.

        Returns:
            (R, ..., D) of `dtype`, differentiable in `rows`.
        """
        R, S, D = rows.shape
        starts = torch.arange(0, R * S, S, device=rows.device)
        index = self.positions.view(R, -1).clamp(min=0) + starts[:, None]
        # Not by `gather`, which takes an index for every channel and three times as long.
        text = rows.to(dtype).flatten(0, 1).index_select(0, index.flatten())
        text = text.view(*self.positions.shape, D)
        if self.constant is None:
            return text
        return torch.where((self.positions < 0)[..., None], self.constant, text)


@dataclass(frozen=True)
class Rows:
    """R rows of one denoiser call, or of several that agree in everything that isn't batched.

    Attributes:
        denoiser: the component that is called.
        kwargs: its arguments; those that are batched are read from `batched` and `text` instead.
        batch_dims: of each batched argument and each text argument, its batch dimension.
        batched: arguments that differ from row to row, batch dimension first.
        text: arguments made of T5's rows, batch dimension first.
        prompts: for each row the number of its prompt in the `PromptTable`, or `NO_PROMPT`.
        target: (R, ...), the teacher's prediction.
    """

    denoiser: str
    kwargs: dict[str, Any]
    batch_dims: dict[Path, int]
    batched: dict[Path, Tensor]
    text: dict[Path, TextInput]
    prompts: list[int]
    target: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def signature(self) -> Hashable:
        """Equal for rows that can share a denoiser call."""

        def describe(path: Path, tensor: Tensor) -> Any:
            if path in self.text:
                text = self.text[path]
                return tensor.dtype, text.positions.shape[1:], text.constant is None
            if path in self.batched:
                return self.batched[path].dtype, self.batched[path].shape[1:]
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            return tensor.dtype, tensor.shape, hashlib.sha256(content.numpy().tobytes()).digest()

        return self.denoiser, repr(map_tensors(self.kwargs, describe)), self.target.shape[1:]

    def select(self, indices: Sequence[int]) -> Rows:
        """Some of the rows, at least one."""
        return collate([(self, i) for i in indices])


def split_walk(
    pipe: Any, walk: Walk, table: PromptTable, known: dict[Any, Any] | None = None
) -> list[Rows]:
    """Take a walk apart into the rows of its denoiser calls.

    Args:
        pipe: the pipeline of the walk.
        walk: what `capture` returned.
        table: numbers the walk's prompts.
        known: what `trace` keeps from walk to walk.

    Returns:
        The `Rows` of each denoiser call, in the order of the walk.

    Raises:
        NotAGather: the pipeline does more with T5's rows than copying them.
    """
    maps = trace(pipe, walk, known)
    slot_rows: list[tuple[int, int]] = []  # for each row of T5's output: prompt, position in it
    for call in walk.slot_calls:
        for number in table.numbers(call.input_ids, call.attention_mask):
            slot_rows += [(number, s) for s in range(call.input_ids.shape[1])]
    origin = torch.tensor(slot_rows, device=walk.slot_calls[0].rows.device)
    shared: dict[Any, Any] = {}  # the text is the same in each call of a walk: one copy for all
    return [
        _split_call(call, m, origin, shared)
        for call, m in zip(walk.denoiser_calls, maps, strict=True)
    ]


def collate(picks: Sequence[tuple[Rows, int]]) -> Rows:
    """Join single rows, of `Rows` with one signature, into a batch."""
    first = picks[0][0]

    def stack(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors)

    text = {}
    for path, one in first.text.items():
        constants = [
            constant[i] for rows, i in picks if (constant := rows.text[path].constant) is not None
        ]
        positions = stack([rows.text[path].positions[i] for rows, i in picks])
        text[path] = TextInput(positions, None if one.constant is None else stack(constants))
    return Rows(
        first.denoiser,
        first.kwargs,
        first.batch_dims,
        {path: stack([rows.batched[path][i] for rows, i in picks]) for path in first.batched},
        text,
        [rows.prompts[i] for rows, i in picks],
        stack([rows.target[i] for rows, i in picks]),
    )


def predict(
    pipe: Any,
    rows: Rows,
    embeddings: Tensor,
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:
    """The denoiser's prediction for `rows`, their text replaced.

    Args:
        pipe: the pipeline that the rows were captured from.
        rows: R rows.
        embeddings: (R, S, D), for each row the student's output for its prompt.
        autocast_dtype: run the denoiser under autocast to this dtype.

    Returns:
        (R, ...), differentiable in `embeddings`. With the teacher's own rows, and all rows of a
        call in their order, it is bitwise the target.
    """

    def argument(path: Path, tensor: Tensor) -> Tensor:
        if path in rows.text:
            filled = rows.text[path].fill(embeddings, tensor.dtype)
        elif path in rows.batched:
            filled = rows.batched[path]
        else:
            return tensor
        return filled.movedim(0, rows.batch_dims[path])

    denoiser = getattr(pipe, rows.denoiser)
    output = call_denoiser(denoiser, denoiser, map_tensors(rows.kwargs, argument), autocast_dtype)
    return first_tensor(output)


def _split_call(
    call: DenoiserCall, call_map: CallMap, origin: Tensor, shared: dict[Any, Any]
) -> Rows:
    R = call.target.shape[0]
    batched: dict[Path, Tensor] = {}
    batch_dims: dict[Path, int] = {}
    text: dict[Path, TextInput] = {}
    prompts: list[int] | None = None
    for path, tensor in tensors_in(call.kwargs).items():
        dim = call_map.batch_dims[path]
        if dim is None:
            if path in call_map.sources:
                raise NotAGather("one tensor of T5's rows serves the whole batch")
            continue
        if tensor.shape[dim] != R:
            raise NotAGather(f"{tensor.shape[dim]} rows go into the denoiser, and {R} come out")
        batch_dims[path] = dim
        if path not in call_map.sources:
            batched[path] = tensor.movedim(dim, 0)
            continue
        key = (id(tensor), path, id(call_map.sources[path]))
        if key not in shared:
            source = call_map.sources[path].movedim(dim, 0)
            shared[key] = _text_input(tensor.movedim(dim, 0), source, origin)
        text[path], owners = shared[key]
        if prompts is not None and prompts != owners:
            raise NotAGather("a row of the denoiser reads several prompts")
        prompts = owners
    kwargs = map_tensors(
        call.kwargs, lambda path, tensor: tensor.new_empty(0) if path in batch_dims else tensor
    )
    return Rows(
        call.denoiser, kwargs, batch_dims, batched, text, prompts or [NO_PROMPT] * R, call.target
    )


def _text_input(tensor: Tensor, source: Tensor, origin: Tensor) -> tuple[TextInput, list[int]]:
    """A text argument (R, ..., D), and the prompt that each of its rows reads."""
    prompt, position = origin[source.clamp(min=0)].unbind(-1)
    inside = source >= 0
    flat = torch.where(inside, prompt, NO_PROMPT).flatten(1)
    owners = flat.amax(1)
    if not ((flat == owners[:, None]) | (flat == NO_PROMPT)).all():
        raise NotAGather("a row of the denoiser reads several prompts")
    constant = None if inside.all() else tensor.masked_fill(inside[..., None], 0)
    return TextInput(torch.where(inside, position, -1), constant), owners.tolist()
