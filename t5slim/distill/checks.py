"""What a distillation needs, asked before anything expensive and before anything changes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import nn

from ..compatibility import check_compatible
from ..encoder import SlimT5Encoder
from ..errors import DistillError
from .config import DistillConfig
from .pipeline import DENOISERS, check_no_cache, teacher_of
from .prompts import Prompts as Prompts
from .prompts import load_prompts as load_prompts


def check_student(pipe: Any, student: nn.Module) -> None:
    """Refuse a student that doesn't fit the pipeline, or that is the teacher itself."""
    memory = {parameter.data_ptr() for parameter in student.parameters()}
    if any(parameter.data_ptr() in memory for parameter in teacher_of(pipe).parameters()):
        raise DistillError(
            f"The student is the teacher, or shares its weights: the text slot of this "
            f"{type(pipe).__name__} must hold the T5 that is to be learned from. If the pipeline "
            "was patched, call t5slim.unpatch_pipeline(pipe) first."
        )
    if isinstance(student, SlimT5Encoder):
        check_compatible(student.config, pipe)


def check_launch(accelerator: Accelerator) -> None:
    """Refuse a launch that would take the student apart."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise DistillError(
            f"This was launched with {kind.value}, which takes apart what is trained: the student, "
            "which is small, and which checkpoints and averages need as a whole. Launch with "
            "distributed_type MULTI_GPU. What is large is the denoiser: to spread it over the "
            "processes, see t5slim.distill.sharding.shard_denoiser."
        )


def check_trainable(pipe: Any, student: Any, config: DistillConfig) -> None:
    """Refuse a student that can't learn, or can't from this pipeline."""
    if not isinstance(student, SlimT5Encoder):
        raise DistillError(
            f"student is a {type(student).__name__}; expected a SlimT5Encoder. To make one of a "
            "small T5, see SlimT5Encoder.from_t5. To compile one, call student.compile(); "
            "to give it a LoRA, peft.inject_adapter_in_model(config, student)."
        )
    check_student(pipe, student)
    check_no_cache(pipe)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise DistillError("No parameter of the student requires a gradient: it can't learn.")
    dtypes = [getattr(getattr(pipe, name, None), "dtype", None) for name in DENOISERS]
    scaled = config.mixed_precision == "fp16"
    if "velocity" in config.terms and torch.float16 in dtypes and not scaled:
        # The gradients of a mean over 100,000 elements are below float16's smallest number, 6e-8.
        raise DistillError(
            f"The denoiser of this {type(pipe).__name__} is in float16, through which gradients "
            'vanish. Load the pipeline in bfloat16 or float32, or set mixed_precision="fp16", '
            "which scales the loss."
        )
