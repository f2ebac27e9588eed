"""The two objectives, as pure functions of what they compare: one value per sample, not reduced.

B samples, T text tokens, D channels of the teacher's rows.
"""

from __future__ import annotations

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


def _check_shapes(prediction: Tensor, target: Tensor) -> None:
    # Broadcasting would turn a forgotten dimension into a wrong number instead of an error.
    if prediction.shape != target.shape:
        raise ValueError(
            f"expected two tensors of one shape, got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}"
        )
