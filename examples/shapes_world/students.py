"""Students for the miniature world, and settings that suit their distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from t5slim import SlimT5Config, SlimT5Encoder
from t5slim.distill import DistillConfig

from .generation import BF16


def student_config(**shape: int) -> SlimT5Config:
    """By default 262,000 parameters, 1/21 of the teacher's, of which a third are embeddings."""
    sizes = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2} | shape
    return SlimT5Config(
        vocab_size=1536,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,  # too small to learn so many prompts by heart
        project_out_dim=256,
        **sizes,
    )


def fresh_student(seed: int = 0, **shape: int) -> SlimT5Encoder:
    """A student with random weights, from which `train` starts as they are."""
    torch.manual_seed(seed)
    return SlimT5Encoder(student_config(**shape))


def settings(**changes: Any) -> DistillConfig:
    """The defaults, in bfloat16 where a CPU doesn't emulate it."""
    return DistillConfig(**{"mixed_precision": "bf16" if BF16 else "no", **changes})


def denoiser_passes(entry: Mapping[str, Any]) -> int:
    """Samples that went through the denoiser until an entry of a run's history. The student's went
    there and back, and the way back costs about as much."""
    return int(entry["teacher_samples"] + 2 * entry["student_samples"])
