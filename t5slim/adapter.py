"""The projection from a student's width to the width that the denoiser expects."""

from __future__ import annotations

from typing import Any

from torch import nn


class ProjectionAdapter(nn.Sequential):
    """The MLP after the student's encoder: Linear, ReLU, Dropout, Linear, without biases.

    Maps (B, T, d) to (B, T, D), in the dtype of its weights. A Sequential, because the published
    files name them `final_projection.0.weight`, (D, d), and `final_projection.3.weight`, (D, D).

    Source: Wang et al., section 3.

    Args:
        in_dim: Width d of the encoder.
        out_dim: Width D that the denoiser expects.
        dropout_rate: In training, as the encoder's own; 0.1 in the paper's code.
    """

    def __init__(self, in_dim: int, out_dim: int, dropout_rate: float = 0.1) -> None:
        super().__init__(
            nn.Linear(in_dim, out_dim, bias=False),
            nn.ReLU(),
            nn.Dropout(dropout_rate),
            nn.Linear(out_dim, out_dim, bias=False),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights that keep the root mean square of the rows.

        ReLU halves the mean square, which a variance of 2/d in the first layer makes up for (He et
        al. 2015); 1/D in the second layer then neither adds nor takes. So training starts at the
        scale of a T5's output, whatever d and D are. PyTorch's defaults would quarter it.
        """
        out_dim, in_dim = self.get_parameter("0.weight").shape
        nn.init.normal_(self.get_parameter("0.weight"), std=(2 / in_dim) ** 0.5)
        nn.init.normal_(self.get_parameter("3.weight"), std=out_dim**-0.5)

    def __getitem__(self, index: int | slice) -> Any:
        """A layer. A slice, as diffusers' group offload takes, is a plain Sequential."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else list(self)[index]
