"""How far two pictures are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import EvaluateError

Distance = Callable[[Image.Image, Image.Image], float]


def standard_distances() -> Mapping[str, Distance]:
    """PSNR in dB (infinite for equal pictures) and SSIM (1 for equal pictures), by torchmetrics.

    Raises:
        EvaluateError: it isn't installed.
    """
    try:
        from torchmetrics.functional import image as metrics
    except ImportError as error:
        raise EvaluateError(
            "Distances between pictures need torchmetrics: pip install 't5slim[evaluate]', or pass "
            "distances={} to do without."
        ) from error

    def measured_by(function: Callable[..., Any]) -> Distance:
        def distance(picture: Image.Image, of_teacher: Image.Image) -> float:
            return float(function(_tensor(picture), _tensor(of_teacher), data_range=1.0))

        return distance

    return {
        "psnr": measured_by(metrics.peak_signal_noise_ratio),
        "ssim": measured_by(metrics.structural_similarity_index_measure),
    }


def _tensor(picture: Image.Image) -> Tensor:
    """(1, 3, H, W) float32 from 0 to 1."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32))
    return pixels.permute(2, 0, 1)[None] / 255
