"""The losses of a distillation, and their weighted sum.

B samples, T text tokens, D channels of the teacher's embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import DistillConfig
from .pipeline import autocast_denoisers, teacher_of
from .replay import predictions
from .reservoir import Batch
from .teacher import TeacherEmbeddings, encode_prompts


class Objective:
    """The weighted sum of the losses in `config.objective`, for one pipeline.

    Args:
        pipe: The pipeline with the teacher.
        teacher: The embeddings that the batches' prompts are indices of: the reservoir's.
        config: `objective`, `annealing`, `max_steps` and `mixed_precision`.
    """

    def __init__(self, pipe: Any, teacher: TeacherEmbeddings, config: DistillConfig) -> None:
        self._pipe = pipe
        self._teacher = teacher
        self._config = config
        self._device = torch.device(pipe._execution_device)

    def __call__(
        self, student: Callable[..., Any], batch: Batch, weights: Mapping[str, float]
    ) -> Tensor:
        """The weighted sum of the losses, each a mean over its samples.

        Args:
            student: Called as an encoder is.
            batch: From a `TrajectoryReservoir`.
            weights: From `DistillConfig.weights_at`.

        Returns:
            () float32, differentiable in the student's weights.
        """

        @cache  # encoded once, for the prediction and for the losses of embeddings
        def embeddings_of(prompts: tuple[int, ...]) -> Tensor:
            return encode_prompts(student, self._teacher, prompts, self._device)

        losses: dict[str, Tensor] = {}
        prompts = batch if isinstance(batch, list) else batch.prompts
        if "velocity" in weights:
            assert not isinstance(batch, list)
            with autocast_denoisers(self._pipe, self._config.autocast_dtype):
                (prediction,) = predictions(self._pipe, [batch], embeddings_of)
            losses["velocity"] = velocity_loss(prediction, batch.target)
        if by_embedding := [name for name in weights if name in _OF_EMBEDDINGS]:
            different = tuple(dict.fromkeys(prompts))
            of_sample = [different.index(prompt) for prompt in prompts]
            _, mask = self._teacher.tokens(different, self._device)
            target = self._teacher.get(teacher_of(self._pipe), different, self._device)
            for name in by_embedding:
                loss = _OF_EMBEDDINGS[name](embeddings_of(different), target, mask)
                losses[name] = loss[of_sample]
        return torch.stack([weights[name] * losses[name].mean() for name in weights]).sum()


def velocity_loss(prediction: Tensor, target: Tensor) -> Tensor:
    r"""Distance of the denoiser's predictions under the student and under the teacher.

    The vision loss of the paper, $L = E_p \| v(x_t, t, E_T(p)) - v(x_t, t, E_S(p)) \|^2$, with v
    the frozen denoiser at the same x_t and t: the text is compared by what the denoiser makes of
    it. As a mean over the elements of a prediction instead of their sum, so that its size doesn't
    depend on the resolution.

    Source: Wang et al., CVPR 2025, arXiv 2503.19897, section 3.

    Args:
        prediction: (B, ...) any float dtype, the denoiser's output for the student.
        target: (B, ...), its output for the teacher.

    Returns:
        (B,) float32, the mean squared error of each sample.
    """
    error = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return error.flatten(1).mean(1)


def embedding_loss(
    embeddings: Tensor, target: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Distance of the student's token embeddings and the teacher's: naive distillation.

    Where the pipeline gives the encoder a mask (PixArt, Chroma), the embeddings of the mask count;
    where it gives none (FLUX.1, SD3), all of them, as the denoiser then attends to padding, too.

    Source: Wang et al., CVPR 2025, arXiv 2503.19897, "naive distillation".

    Args:
        embeddings: (B, T, D) any float dtype, the student's output.
        target: (B, T, D), the teacher's.
        attention_mask: (B, T), 1 for a token that counts, or None: all count.

    Returns:
        (B,) float32, the mean squared error of each sample over its token embeddings.
    """
    error_BT = F.mse_loss(embeddings.float(), target.float(), reduction="none").mean(-1)
    if attention_mask is None:
        return error_BT.mean(1)
    mask_BT = attention_mask.to(error_BT)
    return (error_BT * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)


def relational_loss(
    embeddings: Tensor, target: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    r"""Distances between the prompts of a batch, under the student and under the teacher.

    $L_i = \frac{1}{B - 1} \sum_{j \ne i} (d_S(i, j) - d_T(i, j))^2 / \bar d_T^2$, with d the
    Euclidean distance of two prompts' embeddings and $\bar d_T$ the mean of the teacher's distances
    in the batch. A student that collapses all prompts into one has a loss of about 1, however small
    the teacher's embeddings are. Relational distillation (Park et al., CVPR 2019, arXiv 1904.05068,
    equation 5) divides the student's distances by their own mean; here both are divided by the
    teacher's, as the student's scale must be right, too.

    Source: Park et al., changed as said.

    Args:
        embeddings: (B, T, D) any float dtype, the student's output.
        target: (B, T, D), the teacher's.
        attention_mask: (B, T), 1 for a token that counts, or None: all count.

    Returns:
        (B,) float32, the mean squared difference of each sample's distances to the others. Zero if
        the batch holds one prompt only.
    """
    B = len(embeddings)
    d_student, d_teacher = (distances_between(x, attention_mask) for x in (embeddings, target))
    scale = (d_teacher.sum() / max(1, B * (B - 1))).clamp(min=torch.finfo(torch.float32).tiny)
    return ((d_student - d_teacher) / scale).square().sum(1) / max(1, B - 1)


def distances_between(embeddings: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Euclidean distances of prompts: (B, T, D) -> (B, B) float32, zero on the diagonal."""
    embeddings = embeddings.float()
    if attention_mask is not None:
        embeddings = embeddings * attention_mask[..., None].to(embeddings)
    flat = embeddings.flatten(1)
    return (flat[:, None] - flat[None]).norm(dim=-1)  # at zero its gradient is 0


_OF_EMBEDDINGS = {"embedding": embedding_loss, "relational": relational_loss}
