"""The objectives, as pure functions of what they compare: one value per sample, not reduced.

B samples, T text tokens, D channels of the teacher's rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VelocityLoss(nn.Module):
    r"""Distance of the denoiser's predictions under the student and under the teacher.

    The vision loss of the paper, $L = E_p \| v(x_t, t, E_T(p)) - v(x_t, t, E_S(p)) \|^2$, with v
    the frozen denoiser at the same x_t and t: the text is compared by what the denoiser makes of
    it. As a mean over the elements of a prediction instead of their sum, so that its size doesn't
    depend on the resolution.

    Source: Wang et al., CVPR 2025, arXiv 2503.19897, section 3.
    """

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of each sample.

        Args:
            prediction: (B, ...) any float dtype, the denoiser's answer to the student's rows.
            target: (B, ...) its answer to the teacher's.

        Returns:
            (B,) float32.

        Raises:
            ValueError: the shapes differ.
        """
        _check_shapes(prediction, target)
        return (prediction.float() - target.float()).square().flatten(1).mean(1)


class EmbeddingLoss(nn.Module):
    """Distance of the student's text rows and the teacher's: the naive baseline of the paper.

    Which rows count is what the pipeline says. Where it gives the encoder a mask (PixArt, Chroma),
    the rows of the mask, as nothing else is made of the prompt; where it gives none (FLUX.1, SD3),
    all of them, as the denoiser then attends to the rows of the padding, too.

    Source: Wang et al., CVPR 2025, arXiv 2503.19897, "naive distillation".
    """

    def forward(self, rows: Tensor, target: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean squared error of each sample over its rows.

        Args:
            rows: (B, T, D) any float dtype, the student's output.
            target: (B, T, D) the teacher's.
            attention_mask: (B, T), 1 for a row that counts, or None: all count.

        Returns:
            (B,) float32.

        Raises:
            ValueError: the shapes differ.
        """
        _check_shapes(rows, target)
        error_BT = (rows.float() - target.float()).square().mean(-1)
        if attention_mask is None:
            return error_BT.mean(1)
        mask_BT = attention_mask.to(error_BT)
        return (error_BT * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)


class RelationalLoss(nn.Module):
    r"""Distances between the prompts of a batch, under the student and under the teacher.

    $L_i = \frac{1}{B - 1} \sum_{j \ne i} (d_S(i, j) - d_T(i, j))^2 / \bar d_T^2$, with d the
    Euclidean distance of two prompts' rows and $\bar d_T$ the mean of the teacher's distances in
    the batch. A student that says the same of all prompts has a loss of about 1, however small the
    teacher's rows are. Relational distillation (Park et al., CVPR 2019, arXiv 1904.05068, equation
    5) divides the student's distances by their own mean; here both are divided by the teacher's, as
    the student's scale must be right, too.

    Source: Park et al., changed as said.
    """

    def forward(self, rows: Tensor, target: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean squared difference of each sample's distances to the others.

        Args:
            rows: (B, T, D) any float dtype, the student's output, B > 1.
            target: (B, T, D) the teacher's.
            attention_mask: (B, T), 1 for a row that counts, or None: all count.

        Returns:
            (B,) float32. Zero if the batch holds one prompt only, again and again.

        Raises:
            ValueError: the shapes differ, or there is one sample only.
        """
        _check_shapes(rows, target)
        B = len(rows)
        if B == 1:
            raise ValueError("expected at least two samples to compare, got one")
        d_student, d_teacher = (distances_between(x, attention_mask) for x in (rows, target))
        scale = (d_teacher.sum() / (B * (B - 1))).clamp(min=torch.finfo(torch.float32).tiny)
        return ((d_student - d_teacher) / scale).square().sum(1) / (B - 1)


def distances_between(rows: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Euclidean distances of prompts' rows: (B, T, D) -> (B, B) float32, zero on the diagonal."""
    rows = rows.float()
    if attention_mask is not None:
        rows = rows * attention_mask[..., None].to(rows)
    flat = rows.flatten(1)
    squares = (flat[:, None] - flat[None]).square().sum(-1)
    # The root has no gradient at zero, where a prompt meets itself.
    return torch.where(squares > 0, squares.clamp(min=1e-12).sqrt(), 0.0)


def _check_shapes(prediction: Tensor, target: Tensor) -> None:
    # Broadcasting would turn a forgotten dimension into a wrong number instead of an error.
    if prediction.shape != target.shape:
        raise ValueError(
            f"expected two tensors of one shape, got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}"
        )
