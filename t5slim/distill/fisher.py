"""What the denoiser reads of the embeddings: the Fisher information of its predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import DistillConfig
from .pipeline import autocast_denoisers, teacher_of
from .replay import Call, Samples, predict, predictions
from .reservoir import TrajectoryReservoir

_SAMPLES = 512
_DAMPING = 0.01  # of the mean eigenvalue: for directions that no sample showed


def fisher_information(pipe: Any, reservoir: TrajectoryReservoir, config: DistillConfig) -> Tensor:
    r"""Measure how much the denoiser's predictions depend on each direction of an embedding.

    $F = E[J^\top J] / n$, with J the Jacobian of a prediction of n elements with respect to the
    embedding of one token, at the teacher's embeddings along its trajectories: an error d of that
    embedding adds about $d^\top F d$ to `velocity_loss`. It is the Fisher information of a Gaussian
    whose mean is the prediction, estimated by the gradients of random projections: with r from
    N(0, I), $E[J^\top r r^\top J] = J^\top J$. Of 512 samples, or those of a shorter run's updates.

    Args:
        pipe: The pipeline with the teacher.
        reservoir: Of this process; new. The trajectories stay in it.
        config: The settings of both.

    Returns:
        (D, D) float32 on the pipeline's device, symmetric and positive definite: the share of this
        process, whose mean over the processes is that of all.
    """
    device, teacher = torch.device(pipe._execution_device), reservoir.teacher
    total, tokens = torch.zeros((), device=device), torch.zeros((), device=device)
    for step in range(min(math.ceil(_SAMPLES / reservoir.together), config.max_steps)):
        for group, batch in zip(reservoir.groups, reservoir.batches(step), strict=True):
            leaves: list[Tensor] = []

            def embeddings_of(prompts: Sequence[int], leaves: list[Tensor] = leaves) -> Tensor:
                leaves.append(teacher.get(teacher_of(pipe), prompts, device).requires_grad_())
                return leaves[-1]

            with autocast_denoisers(pipe, config.autocast_dtype):
                if isinstance(batch, Samples):  # equal prompts apart, as in other batches
                    prediction = predict(pipe, batch, embeddings_of(batch.prompts))
                else:
                    assert isinstance(batch, Call)
                    (prediction,) = predictions(pipe, [batch], embeddings_of)
            # Each sample's own noise, however the samples are spread over batches and processes.
            seeds = [step * reservoir.together + group[i % len(group)] for i in range(len(batch))]
            noise = [
                torch.randn(prediction.shape[1:], generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
            projections = prediction.float() * torch.stack(noise).to(device)
            for gradient in torch.autograd.grad(projections.sum(), leaves):
                rows = gradient.float().flatten(0, 1)
                total = total + rows.T @ rows / prediction[0].numel()
                tokens += rows.any(1).sum()  # without those that a mask hides
    fisher = total / tokens.clamp(min=1)
    return fisher + _DAMPING * fisher.diagonal().mean() * torch.eye(len(fisher), device=device)
