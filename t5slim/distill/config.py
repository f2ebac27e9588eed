"""The settings of a distillation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import ConfigError

PAPER_GUIDANCE_SCALES = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)


@dataclass(frozen=True)
class DistillConfig:
    """How `train` distils; every default is meant to be used as it is.

    Attributes:
        objective: "velocity" compares the denoiser's predictions (`VelocityLoss`), "embedding" the
            text rows (`EmbeddingLoss`, no denoiser pass at all).
        max_steps: updates of the student.
        max_seconds: stop after this much training time (evaluations are not counted), whatever
            `max_steps` says. The learning rate then ends its schedule with whichever comes first.
        batch_size: prompts that are walked together, and examples (denoiser rows) of an update.
        learning_rate: of AdamW, its highest.
        weight_decay: of AdamW.
        warmup_steps: updates over which the learning rate rises linearly.
        lr_schedule: after the warm-up, "cosine" down to zero, or "constant".
        max_grad_norm: the student's gradients are scaled down to this norm.
        reservoir_walks: examples are drawn at random from this many trajectories (of one prompt
            each), the oldest replaced as training goes on. 0: the paper's order, consecutive
            updates along the trajectory of one batch.
        reuse: how often each example is drawn on average before it is replaced. Higher: fewer
            teacher passes for an update, and less new in it. Without a reservoir it has no meaning.
        guidance_scales: drawn from for each walk where the denoiser takes guidance as an input
            (FLUX.1-dev); elsewhere, and if empty, the guidance scale of `pipeline_kwargs` holds.
        zero_pooled: zero the pooled CLIP vector in training, where the denoiser takes one, so that
            the student must carry the whole prompt. Evaluations leave it as it is.
        empty_prompt_share: of the walked prompts, this share is empty, as the prompt of unguided
            branches is.
        ema_decay: the returned student is an exponential average of its weights over the updates;
            0: the last weights.
        mixed_precision: "bf16" runs student and denoiser under autocast; weights, gradients and the
            optimizer stay in float32.
        gradient_checkpointing: of the denoiser: less memory for a second forward pass.
        eval_every: updates between two evaluations on `eval_prompts` (and two checkpoints).
        seed: of the order of prompts, the noise, dropout, and what is drawn from the reservoir.

    Raises:
        ConfigError: a value is out of range; the message says which and what is allowed.
    """

    objective: Literal["velocity", "embedding"] = "velocity"
    max_steps: int = 10_000
    max_seconds: float | None = None
    batch_size: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 1e-3
    warmup_steps: int = 100
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: float = 1.0
    reservoir_walks: int = 256
    reuse: float = 1.0
    guidance_scales: tuple[float, ...] = PAPER_GUIDANCE_SCALES
    zero_pooled: bool = False
    empty_prompt_share: float = 0.05
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    eval_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_scales", tuple(self.guidance_scales))
        for name in ("max_steps", "batch_size", "eval_every"):
            self._check(name, lambda v: _is_int(v) and v > 0, "an integer above 0")
        for name in ("warmup_steps", "reservoir_walks"):
            self._check(name, lambda v: _is_int(v) and v >= 0, "an integer of at least 0")
        self._check("seed", _is_int, "an integer")
        for name in ("learning_rate", "max_grad_norm", "reuse"):
            self._check(name, lambda v: _is_finite(v) and v > 0, "a number above 0")
        if self.max_seconds is not None:
            self._check(
                "max_seconds", lambda v: _is_finite(v) and v > 0, "a number above 0, or None"
            )
        self._check("weight_decay", lambda v: _is_finite(v) and v >= 0, "a number of at least 0")
        for name in ("empty_prompt_share", "ema_decay"):
            self._check(name, lambda v: _is_finite(v) and 0 <= v < 1, "a number from 0 to below 1")
        self._check(
            "guidance_scales", lambda v: all(_is_finite(g) and g > 0 for g in v), "numbers above 0"
        )
        for name, values in _CHOICES.items():
            self._check(name, values.__contains__, " or ".join(map(repr, values)))
        for name in ("zero_pooled", "gradient_checkpointing"):
            self._check(name, lambda v: isinstance(v, bool), "True or False")
        if 0 < self.reservoir_walks < self.batch_size:
            raise ConfigError(
                f"reservoir_walks is {self.reservoir_walks}, but {self.batch_size} prompts are "
                "walked together (batch_size): make it at least that, or 0 for consecutive updates."
            )

    @classmethod
    def paper(cls, **changes: Any) -> DistillConfig:
        """The settings of the paper: Wang et al., CVPR 2025, arXiv 2503.19897, and its training
        script.

        20 consecutive updates along the trajectory of each batch; the number of steps, and the
        length of the text (77 tokens), are the pipeline's:
        `pipeline_kwargs=dict(num_inference_steps=20, max_sequence_length=77)`. `max_steps` counts
        updates, 200,000 in the paper's last stage.

        Args:
            **changes: settings to change, such as `max_steps`.
        """
        settings: dict[str, Any] = {
            "objective": "velocity", "max_steps": 200_000, "batch_size": 32, "learning_rate": 1e-4,
            "weight_decay": 1e-3, "warmup_steps": 500, "lr_schedule": "constant",
            "reservoir_walks": 0, "guidance_scales": PAPER_GUIDANCE_SCALES, "zero_pooled": True,
            "empty_prompt_share": 0.0, "ema_decay": 0.0,
        }  # fmt: skip
        return cls(**(settings | changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def learning_rate_at(self, step: int, seconds: float) -> float:
        """The learning rate of update number `step` (from 0), `seconds` of training after its
        start.
        """
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.lr_schedule == "constant":
            return self.learning_rate * warmup
        progress = step / self.max_steps
        if self.max_seconds is not None:
            progress = max(progress, seconds / self.max_seconds)
        return self.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def _check(self, name: str, allowed: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        if not allowed(value):
            raise ConfigError(f"{name} is {value!r}; expected {expected}.")


_CHOICES = {
    "objective": ("velocity", "embedding"),
    "lr_schedule": ("cosine", "constant"),
    "mixed_precision": ("no", "bf16"),
}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
