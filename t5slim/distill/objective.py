"""The loss of a batch: its terms are weighted, and reduced, here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .calls import call_encoder
from .config import DistillConfig
from .examples import Batch, WalkedCall
from .fallback import predict_through_pipeline
from .losses import EmbeddingLoss, RelationalLoss, VelocityLoss
from .pipeline import teacher_of
from .replay import Rows, predict
from .states import cpu_attention
from .teacher import PromptTable, encode_prompts

_OF_ROWS = {"embedding": EmbeddingLoss(), "relational": RelationalLoss()}
_OF_VELOCITIES = VelocityLoss()


class Objective:
    """What `config.objective` says, for one pipeline.

    Args:
        pipe: the pipeline with the teacher.
        table: that the numbers of the batches' prompts are of.
        config: `objective`, `trajectory_weights` and `mixed_precision`.
    """

    def __init__(self, pipe: Any, table: PromptTable, config: DistillConfig) -> None:
        self._pipe = pipe
        self._table = table
        self._terms = config.terms
        self._autocast_dtype = config.autocast_dtype
        thirds = torch.tensor(config.trajectory_weights, dtype=torch.float32)
        self._thirds = thirds / thirds.mean()

    def weights_at(self, update: int) -> dict[str, float]:
        """The terms that count in an update, with their weights."""
        weights = {name: term.weight_at(update) for name, term in self._terms.items()}
        return {name: weight for name, weight in weights.items() if weight}

    def loss(
        self, student: Callable[..., Any], batch: Batch, weights: Mapping[str, float]
    ) -> Tensor:
        """The weighted sum of the terms, each a mean over its samples.

        Args:
            student: called as an encoder is.
            batch: what the student is asked, and the teacher's answer.
            weights: of the terms that count, from `weights_at`.

        Returns:
            () float32, differentiable in the student's weights.
        """
        different = list(dict.fromkeys(batch.prompts))
        places = {number: i for i, number in enumerate(different)}
        of_prompt = torch.tensor([places[n] for n in batch.prompts], device=batch.device)
        targets = {}
        for name in _OF_ROWS.keys() & weights.keys():
            _, mask = self._table.batch(different, batch.device)
            target = self._table.rows(teacher_of(self._pipe), different, batch.device)
            targets[name] = target, mask

        samples: dict[str, Tensor] = {}
        rows = None
        with cpu_attention(batch.device, self._autocast_dtype):
            if "velocity" not in weights or isinstance(batch.call, Rows) or len(weights) > 1:
                rows = encode_prompts(student, self._table, different, batch.device)
            if "velocity" in weights:
                assert batch.call is not None and batch.thirds is not None
                prediction = self._predict(student, batch.call, rows, of_prompt)
                losses = _OF_VELOCITIES(prediction, batch.call.target)
                samples["velocity"] = losses * self._thirds[batch.thirds].to(losses)
        for name, (target, mask) in targets.items():
            samples[name] = _OF_ROWS[name](rows, target, mask)[of_prompt]
        return torch.stack([weights[name] * samples[name].mean() for name in weights]).sum()

    def _predict(
        self,
        student: Callable[..., Any],
        call: Rows | WalkedCall,
        rows: Tensor | None,
        of_prompt: Tensor,
    ) -> Tensor:
        if isinstance(call, Rows):
            assert rows is not None
            if len(rows) < len(call):  # otherwise they are in order
                rows = rows[of_prompt]
            return predict(self._pipe, call, rows, self._autocast_dtype)
        return predict_through_pipeline(
            self._pipe,
            call.walk,
            lambda ids, mask: call_encoder(student, ids, mask),
            {call.index},
            self._autocast_dtype,
        )[call.index]
