"""What an update learns from: examples that the teacher's walks leave, drawn in one order or
another.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..slot import denoiser_text_width
from .calls import call_encoder
from .config import DistillConfig
from .fallback import predict_through_pipeline
from .losses import EmbeddingLoss, VelocityLoss
from .replay import NO_PROMPT, Rows, collate, predict, split_walk
from .teacher import PromptTable, encode_prompts
from .trace import NotAGather
from .walk import DENOISERS, Walk, capture, teacher_of, tokenize

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WalkedCall:
    """A denoiser call of a walk that can't be taken apart into rows."""

    walk: Walk
    index: int

    def __len__(self) -> int:
        return len(self.walk.denoiser_calls[self.index].target)


class VelocityExamples:
    """Denoiser calls of the teacher's trajectories, and the student's loss on them.

    With a reservoir, each batch is drawn from all trajectories in it, of different prompts, noises
    and timesteps. Without, it is one call of the latest walk, in order: the paper's step following.

    The reservoir fills as training goes on. A new batch is walked whenever the rows drawn make up
    `reuse` times the rows that were walked; so no update waits for it to be full, and the teacher's
    passes stand in the same proportion to the student's all the time.

    Args:
        pipe: the pipeline with the teacher.
        prompts: the prompts to walk, of this process.
        config: `batch_size`, `reservoir_walks`, `reuse` and what shapes a walk.
        pipeline_kwargs: how the pipeline is called.
        seed: of everything that is drawn here.

    Attributes:
        teacher_rows: batch rows that the denoiser predicted for the teacher.
        student_rows: batch rows that it predicted for the student (each of them also backwards).
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        config: DistillConfig,
        pipeline_kwargs: Mapping[str, Any],
        seed: int,
    ) -> None:
        self.teacher_rows = 0
        self.student_rows = 0
        self._pipe = pipe
        self._config = config
        self._kwargs = dict(pipeline_kwargs)
        self._random = random.Random(seed)
        self._prompts = _shuffled_forever(prompts, self._random)
        self._autocast_dtype = torch.bfloat16 if config.mixed_precision == "bf16" else None
        self._takes_guidance = any(
            getattr(getattr(getattr(pipe, name, None), "config", None), "guidance_embeds", False)
            for name in DENOISERS
        )
        self._table = PromptTable()
        self._loss = VelocityLoss()
        self._walks: deque[list[Rows] | list[WalkedCall]] = deque(
            maxlen=max(1, config.reservoir_walks // config.batch_size)
        )
        self._due = 0.0  # rows that are still to be drawn before the next walk

    def loss(self, student: Callable[..., Any]) -> Tensor:
        """The velocity loss of the next batch, (R,) float32, differentiable in the student."""
        calls = self._consecutive_call() if not self._config.reservoir_walks else self._drawn_call()
        self.student_rows += len(calls)
        if isinstance(calls, Rows):
            prediction, target = self._replay(calls, student), calls.target
        else:
            target = calls.walk.denoiser_calls[calls.index].target
            prediction = predict_through_pipeline(
                self._pipe,
                calls.walk,
                lambda ids, mask: call_encoder(student, ids, mask),
                {calls.index},
                self._autocast_dtype,
            )[calls.index]
        return self._loss(prediction, target)

    def _replay(self, rows: Rows, student: Callable[..., Any]) -> Tensor:
        embeddings = encode_prompts(student, self._table, rows.prompts, rows.target.device)
        return predict(self._pipe, rows, embeddings, self._autocast_dtype)

    def _consecutive_call(self) -> Rows | WalkedCall:
        if not self._walks or not self._walks[0]:
            self._walk()
        return self._walks[0].pop(0)

    def _drawn_call(self) -> Rows | WalkedCall:
        if self._due <= 0:
            self._walk()
            self._due += self._config.reuse * sum(len(call) for call in self._walks[-1])
        calls = [call for walk in self._walks for call in walk]
        (call,) = self._random.choices(calls, weights=[len(call) for call in calls])
        if isinstance(call, Rows):
            picks = [
                (rows, i)
                for rows in calls
                if isinstance(rows, Rows) and rows.signature == call.signature
                for i in range(len(rows))
            ]
            call = collate(self._random.sample(picks, min(self._config.batch_size, len(picks))))
        self._due -= len(call)
        return call

    def _walk(self) -> None:
        """Walk the next batch of prompts and put its calls into the reservoir."""
        config = self._config
        prompts = [
            "" if self._random.random() < config.empty_prompt_share else next(self._prompts)
            for _ in range(config.batch_size)
        ]
        kwargs = dict(self._kwargs)
        if self._takes_guidance and config.guidance_scales:
            kwargs["guidance_scale"] = self._random.choice(config.guidance_scales)
        walk = capture(
            self._pipe, prompts, pipeline_kwargs=kwargs, seed=self._random.getrandbits(62),
            zero_pooled=config.zero_pooled, encode=self._table.teacher_rows,
            autocast_dtype=self._autocast_dtype,
        )  # fmt: skip
        self.teacher_rows += walk.denoiser_rows
        try:
            calls = split_walk(self._pipe, walk, self._table)
        except NotAGather as reason:
            if not self._walks:
                logger.info(
                    "%s: %s. The student is led through the whole pipeline instead.",
                    type(self._pipe).__name__, reason,
                )  # fmt: skip
            self._walks.append([WalkedCall(walk, i) for i in range(len(walk.denoiser_calls))])
        else:
            self._walks.append([rows for call in calls if (rows := _with_prompt(call))])


class EmbeddingExamples:
    """The teacher's text rows, and the student's loss on them: no walk, and no denoiser pass.

    Every prompt is tokenized as the pipeline does it (and so is its negative prompt, once); the
    teacher encodes it when it is first drawn.

    Args: those of `VelocityExamples`.
    """

    teacher_rows = 0
    student_rows = 0

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        config: DistillConfig,
        pipeline_kwargs: Mapping[str, Any],
        seed: int,
    ) -> None:
        self._pipe = pipe
        self._batch_size = config.batch_size
        self._random = random.Random(seed)
        self._table = PromptTable()
        self._loss = EmbeddingLoss()
        self._encoder: Any = teacher_of(pipe)
        width = denoiser_text_width(pipe)
        assert width is not None  # the encoder's own, if the denoiser doesn't say
        lengths: dict[int, int] = {}

        def note(_: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
            for number in self._table.numbers(input_ids, attention_mask):
                lengths[number] = input_ids.shape[1]
            return torch.zeros(
                *input_ids.shape, width, dtype=self._encoder.dtype, device=input_ids.device
            )

        for start in range(0, len(prompts), config.batch_size):
            tokenize(pipe, prompts[start : start + config.batch_size], pipeline_kwargs, note)
        self._numbers = _shuffled_forever(list(lengths), self._random)

    def loss(self, student: Callable[..., Any]) -> Tensor:
        """The embedding loss of the next batch, (B,) float32, differentiable in the student."""
        numbers = [next(self._numbers) for _ in range(self._batch_size)]
        ids, mask = self._table.batch(numbers, self._encoder.device)
        target = self._table.teacher_rows(self._encoder, ids, mask)
        rows = encode_prompts(student, self._table, numbers, ids.device)
        return self._loss(rows, target, mask)


def _with_prompt(rows: Rows) -> Rows | None:
    """The rows that read a prompt; those of a zeroed text have nothing to teach."""
    kept = [i for i, number in enumerate(rows.prompts) if number != NO_PROMPT]
    if not kept:
        return None
    return rows if len(kept) == len(rows) else rows.select(kept)


def _shuffled_forever(items: Sequence[Any], source: random.Random) -> Iterator[Any]:
    """The items, each once in an order of its own, again and again."""
    while True:
        yield from source.sample(items, len(items))
