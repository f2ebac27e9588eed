"""The settings of a distillation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW

from ..errors import ConfigError

OBJECTIVES = ("velocity", "fisher", "embedding")
_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of `mixed_precision`


@dataclass(frozen=True)
class DistillConfig:
    """Settings of `train`; every default is meant to be used as it is.

    Attributes:
        objective: The losses: "velocity" compares the denoiser's predictions (`velocity_loss`); the
            others need no denoiser pass: "fisher" compares the token embeddings as the denoiser
            sees them (by `fisher_information`), and "embedding" as they are (`embedding_loss`). A
            name, or a weighted sum: `{"velocity": 1, "fisher": 1}`.
        embedding_phase: Share of `max_steps`, at the beginning, in which "velocity" waits for the
            other losses: a student far from the teacher learns nothing from the denoiser, and an
            update without it is nearly free. Without other losses, velocity doesn't wait.
        velocity_every: After that, "velocity" takes part in every n-th update, the others in all.
        max_steps: Updates of the student, with and without "velocity".
        batch_size: Prompts whose trajectories are sampled together, and samples that go through the
            denoiser together, on one device.
        gradient_accumulation_steps: Such batches to an update, on each device.
        learning_rate: The highest of the schedule; None: 0.256 / d_model, of Flan-T5 base 3.3e-4.
        warmup_steps: Updates over which the learning rate rises linearly.
        lr_schedule: After the warm-up, "cosine" or "linear" down to zero, or "constant".
        max_grad_norm: The student's gradients are clipped to this norm. Most are longer than the
            default, so that each update counts the same: a few long ones would slow AdamW for long.
        reservoir_size: Samples are drawn at random from this many trajectories (of one prompt each,
            over all devices; at least an update's), the oldest replaced as training goes on. 0: the
            paper's order, consecutive updates along the trajectories of one batch.
        reuse: How often each sample is drawn on average before it is replaced. Higher: fewer
            teacher passes for an update, and less new in it.
        guidance_scales: One is drawn for each batch of trajectories where the denoiser takes
            guidance as an input (FLUX.1-dev); elsewhere, and if empty, the guidance scale of
            `pipeline_kwargs` holds. The default are those of the paper's training script.
        zero_pooled: Zero the pooled CLIP vector in training, where the denoiser takes one, so that
            the student must carry the whole prompt. Evaluations leave it as it is.
        prompt_dropout: This share of the prompts is replaced by the empty one, as the prompt of
            unguided branches is.
        ema_decay: The returned student has the exponential moving average of its weights; 0: its
            last weights.
        mixed_precision: "bf16" or "fp16" runs student and denoiser under autocast, "fp16" with a
            scaled loss; weights, gradients and the optimizer stay in float32.
        gradient_checkpointing: Of the denoiser: less memory for a second forward pass.
        eval_every: Updates between two evaluations on `eval_prompts`.
        samples_every: Updates between two image grids, teacher and student side by side, of the
            first four `eval_prompts`, in `output_dir`; 0: none.
        trackers: Where the history is logged as well, by accelerate's names: "tensorboard" (into
            `output_dir/logs`), "wandb", ...
        checkpoint_every: Updates between two checkpoints, if there is an `output_dir`.
        keep_checkpoints: How many of them are kept, the newest.
        seed: Of the order of prompts, the noise, dropout, and the draws from the reservoir.

    Raises:
        ConfigError: A value is out of range; the message says which and what is allowed.
    """

    objective: str | Mapping[str, float] = field(
        default_factory=lambda: {"velocity": 1.0, "fisher": 1.0}
    )
    embedding_phase: float = 0.5
    velocity_every: int = 16
    max_steps: int = 20_000
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    warmup_steps: int = 100
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: float = 0.001
    reservoir_size: int = 256
    reuse: float = 1.0
    guidance_scales: tuple[float, ...] = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
    zero_pooled: bool = False
    prompt_dropout: float = 0.05
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    eval_every: int = 500
    samples_every: int = 0
    trackers: tuple[str, ...] = ()
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.objective, str):
            object.__setattr__(self, "objective", {self.objective: 1.0})
        for name, value in vars(self).items():  # numpy's to Python's, lists to tuples
            value = value.item() if isinstance(value, np.generic) else value
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        for names, allowed, expected in _CHECKS:
            for name in names:
                value = getattr(self, name)
                if not allowed(value):
                    raise ConfigError(f"{name} is {value!r:.100}; expected {expected}.")

    def weights_at(self, step: int) -> dict[str, float]:
        """The weights of the losses that take part in an update, by name.

        Args:
            step: Its number, from 0.
        """
        assert isinstance(self.objective, Mapping)
        since = step - round(self.embedding_phase * self.max_steps)
        others = {name: w for name, w in self.objective.items() if name != "velocity"}
        velocity = not others or (since >= 0 and since % self.velocity_every == 0)
        return dict(self.objective) if velocity else others

    def adamw(self, parameters: list[nn.Parameter], width: int) -> AdamW:
        """The default optimizer of a student of this width, with the paper's weight decay."""
        return AdamW(parameters, self.learning_rate or 0.256 / width, weight_decay=1e-3, fused=True)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of `mixed_precision`, for `torch.autocast`; None for "no"."""
        return _DTYPES[self.mixed_precision]

    @classmethod
    def paper(cls, **overrides: Any) -> "DistillConfig":
        """The settings of Wang et al., CVPR 2025, arXiv 2503.19897.

        20 consecutive updates along the trajectories of each batch; the number of steps, and the
        length of the text (77 tokens), are the pipeline's:
        `pipeline_kwargs=dict(num_inference_steps=20, max_sequence_length=77)`. `max_steps` counts
        updates, 200,000 in the paper's last stage. The text is followed where its training script
        differs: there, "constant" is without the warm-up, the gradients that are clipped aren't the
        student's, and sigmas fall to nearly 0 (here they are the pipeline's own, down to 1/20).

        Args:
            **overrides: Settings to change, such as `max_steps`.
        """
        settings: dict[str, Any] = {
            "objective": "velocity",
            "max_steps": 200_000,
            "batch_size": 32,
            "learning_rate": 1e-4,
            "warmup_steps": 500,
            "lr_schedule": "constant",
            "max_grad_norm": 1.0,
            "reservoir_size": 0,
            "zero_pooled": True,
            "prompt_dropout": 0.0,
            "ema_decay": 0.0,
        }
        return cls(**(settings | overrides))


def _number(low: float, below: float = 1e30, kind: Any = (int, float)) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, kind) and type(v) is not bool and low <= v < below


def _is_objective(value: Any) -> bool:
    known = isinstance(value, Mapping) and len(value) > 0 and value.keys() <= {*OBJECTIVES}
    return known and all(map(_positive, value.values()))


_integer = partial(_number, below=2**31, kind=int)
_positive = _number(1e-30)
_CHECKS: list[tuple[Sequence[str], Callable[[Any], bool], str]] = [
    (["objective"], _is_objective, f"{', '.join(OBJECTIVES)}, or a mapping of them to weights > 0"),
    (["max_steps"], _integer(1, below=10**8), "a positive integer below 100 million"),
    (["batch_size", "gradient_accumulation_steps"], _integer(1, below=2**16), "from 1 to 65,535"),
    (["velocity_every"], _integer(1, below=2**16), "from 1 to 65,535"),
    (["eval_every", "checkpoint_every", "keep_checkpoints"], _integer(1), "a positive integer"),
    (["warmup_steps", "reservoir_size", "samples_every"], _integer(0), "an integer of at least 0"),
    (["seed"], _integer(-(2**31)), "an integer of 32 bits"),
    (["max_grad_norm", "reuse"], _positive, "a number above 0"),
    (["learning_rate"], lambda v: v is None or _positive(v), "a number above 0, or None"),
    (["embedding_phase"], _number(0, 1 + 1e-9), "a number from 0 to 1"),
    (["prompt_dropout", "ema_decay"], _number(0, 1), "a number from 0 to below 1"),
    (["zero_pooled", "gradient_checkpointing"], lambda v: type(v) is bool, "True or False"),
    (["guidance_scales"], lambda v: type(v) is tuple and all(map(_positive, v)), "numbers above 0"),
    (["trackers"], lambda v: type(v) is tuple and {*map(type, v)} <= {str}, "a tuple of names"),
    (["mixed_precision"], lambda v: v in [*_DTYPES], f"one of {', '.join(_DTYPES)}"),
    (["lr_schedule"], lambda v: v in ["cosine", "linear", "constant"], "cosine, linear, constant"),
]
