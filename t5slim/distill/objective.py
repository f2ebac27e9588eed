"""The losses of a distillation, and their weighted sum.

B samples, T text tokens, D channels of the teacher's embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
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
        config: The settings.
        fisher: (D, D), from `fisher_information`, for the loss of that name.
    """

    def __init__(
        self,
        pipe: Any,
        teacher: TeacherEmbeddings,
        config: DistillConfig,
        fisher: Tensor | None = None,
    ) -> None:
        self._pipe = pipe
        self._teacher = teacher
        self._config = config
        self._device = torch.device(pipe._execution_device)
        self._of_embeddings: dict[str, Callable[..., Tensor]] = {"embedding": embedding_loss}
        if fisher is not None:
            self._of_embeddings["fisher"] = partial(fisher_loss, fisher=fisher)

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
        if by_embedding := [name for name in weights if name in self._of_embeddings]:
            different = tuple(dict.fromkeys(prompts))
            of_sample = [different.index(prompt) for prompt in prompts]
            _, mask = self._teacher.tokens(different, self._device)
            target = self._teacher.get(teacher_of(self._pipe), different, self._device)
            for name in by_embedding:
                loss = self._of_embeddings[name](embeddings_of(different), target, mask)
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
    r"""Distance of the student's token embeddings and the teacher's: naive distillation.

    $L = \| E_S(p) - E_T(p) \|^2 / \| E_T(p) \|^2$: 0 are the teacher's embeddings, 1 are zeros, for
    every teacher. Where the pipeline gives the encoder a mask (PixArt, Chroma), the embeddings of
    the mask count; where it gives none (FLUX.1, SD3), all of them, as the denoiser then attends to
    padding, too.

    Source: Wang et al., CVPR 2025, arXiv 2503.19897, "naive distillation".

    Args:
        embeddings: (B, T, D) any float dtype, the student's output.
        target: (B, T, D), the teacher's.
        attention_mask: (B, T), 1 for a token that counts, or None: all count.

    Returns:
        (B,) float32, the squared error of each sample, relative to its target.
    """
    error, target = embeddings.float() - target.float(), target.float()
    if attention_mask is not None:
        error, target = error * attention_mask[..., None], target * attention_mask[..., None]
    scale = target.square().sum((1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
    return error.square().sum((1, 2)) / scale


def fisher_loss(
    embeddings: Tensor,
    target: Tensor,
    attention_mask: Tensor | None = None,
    *,
    fisher: Tensor,
) -> Tensor:
    r"""Distance of the student's token embeddings and the teacher's, as the denoiser sees it.

    $L = \sum_t d_t^\top F d_t$, with d the difference of two embeddings and F the
    `fisher_information`: what the differences would add to `velocity_loss` if they were small and
    each alone, without any denoiser pass. What the denoiser doesn't read costs nothing.

    Args:
        embeddings: (B, T, D) any float dtype, the student's output.
        target: (B, T, D), the teacher's.
        attention_mask: (B, T), 1 for a token that counts, or None: all count.
        fisher: (D, D) float32.

    Returns:
        (B,) float32, in the unit of `velocity_loss`.
    """
    difference = embeddings.float() - target.float()
    of_tokens_BT = (difference @ fisher * difference).sum(-1)
    return (of_tokens_BT if attention_mask is None else of_tokens_BT * attention_mask).sum(1)
