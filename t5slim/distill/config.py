"""The settings of a distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch
from accelerate.utils import LoggerType  # type: ignore[import-untyped]

from ..errors import ConfigError

PAPER_GUIDANCE_SCALES = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)


@dataclass(frozen=True)
class Term:
    """One term of an objective, and the updates in which it counts.

    Attributes:
        weight: of the term in the sum, its highest.
        start: the first update in which it counts.
        until: from `start` on, the weight falls linearly to zero at this update; None: it stays.
            In a `DistillConfig`, both may be shares of `max_steps`, such as 0.5. Let terms overlap:
            at a turn from one to another, Adam divides gradients of one size by the moments of
            another, and its first steps may undo what was learned.
    """

    weight: float = 1.0
    start: int = 0
    until: int | None = None

    def weight_at(self, update: int) -> float:
        """The weight in update number `update` (from 0)."""
        if update < self.start:
            return 0.0
        if self.until is None:
            return self.weight
        return self.weight * max(0.0, 1 - (update - self.start) / (self.until - self.start))


def _led_by_embeddings() -> dict[str, Any]:
    return {"velocity": 1, "embedding": {"weight": 10, "until": 0.5}}


@dataclass(frozen=True)
class DistillConfig:
    """How `train` distils; every default is meant to be used as it is.

    Attributes:
        objective: what is compared. "velocity": the denoiser's predictions (`VelocityLoss`);
            "embedding": the text rows (`EmbeddingLoss`), with no denoiser pass at all;
            "relational": the distances between the prompts of a batch (`RelationalLoss`). Or a
            weighted sum, `{"velocity": 1, "embedding": 0.1}`, whose weights may change as training
            goes on (see `Term`). The default is velocity, led by embeddings with a weight that
            falls from 10 to 0 over half of the updates: from a fresh start, velocity alone finds no
            way for long (docs/log.md).
        trajectory_weights: weights of the first, middle and last third of the trajectory in the
            loss; the velocity gap is reported by the same thirds.
        max_steps: updates of the student.
        max_seconds: stop after this much training time (evaluations are not counted), whatever
            `max_steps` says. The learning rate then ends its schedule with whichever comes first.
        batch_size: prompts that are walked together, and examples (denoiser rows) that go through
            the denoiser together, on one device.
        gradient_accumulation_steps: such batches to an update, on each device.
        optimizer: "adamw", or "adamw_8bit", whose moments take a quarter of the memory (needs
            bitsandbytes).
        learning_rate: of the optimizer, its highest.
        weight_decay: of the optimizer.
        warmup_steps: updates over which the learning rate rises linearly.
        lr_schedule: after the warm-up, "cosine" or "linear" down to zero, or "constant".
        max_grad_norm: the student's gradients are scaled down to this norm.
        max_skipped_updates: an update whose gradient is not finite is skipped; the run stops after
            this many of them in a row.
        reservoir_walks: examples are drawn at random from this many trajectories (of one prompt
            each, over all devices), the oldest replaced as training goes on. 0: the paper's order,
            consecutive updates along the trajectory of one batch.
        reuse: how often each example is drawn on average before it is replaced. Higher: fewer
            teacher passes for an update, and less new in it. Without a reservoir it has no meaning.
        guidance_scales: drawn from for each walk where the denoiser takes guidance as an input
            (FLUX.1-dev); elsewhere, and if empty, the guidance scale of `pipeline_kwargs` holds.
        zero_pooled: zero the pooled CLIP vector in training, where the denoiser takes one, so that
            the student must carry the whole prompt. Evaluations leave it as it is.
        empty_prompt_share: of the prompts, this share is replaced by the empty one, as the prompt
            of unguided branches is.
        ema_decay: the returned student is an exponential average of its weights over the updates;
            0: the last weights.
        mixed_precision: "bf16" or "fp16" runs student and denoiser under autocast, "fp16" with a
            scaled loss; weights, gradients and the optimizer stay in float32.
        gradient_checkpointing: of the denoiser: less memory for a second forward pass.
        eval_every: updates between two evaluations on `eval_prompts`.
        samples_every: updates between two sheets of sample pictures, teacher and student side by
            side, in `output_dir/samples`; 0: none. They are whole pictures, painted and decoded by
            the pipeline, of the first `eval_prompts`.
        sample_prompts: how many of these.
        trackers: where the run is shown, by accelerate's names: "tensorboard", "wandb", ... None:
            TensorBoard, if it is installed and there is an `output_dir`. `history.jsonl` is written
            in any case.
        checkpoint_every: updates between two checkpoints to resume from, if there is an
            `output_dir`.
        keep_checkpoints: how many of them are kept, the newest.
        seed: of the order of prompts, the noise, dropout, and what is drawn from the reservoir.

    Raises:
        ConfigError: a value is out of range; the message says which and what is allowed.
    """

    objective: str | Mapping[str, Any] = field(default_factory=_led_by_embeddings)
    trajectory_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    max_steps: int = 10_000
    max_seconds: float | None = None
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    learning_rate: float = 5e-4
    weight_decay: float = 1e-3
    warmup_steps: int = 100
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: float = 1.0
    max_skipped_updates: int = 10
    reservoir_walks: int = 256
    reuse: float = 1.0
    guidance_scales: tuple[float, ...] = PAPER_GUIDANCE_SCALES
    zero_pooled: bool = False
    empty_prompt_share: float = 0.05
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    eval_every: int = 500
    samples_every: int = 0
    sample_prompts: int = 4
    trackers: tuple[str, ...] | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trackers is not None:
            given: Any = self.trackers
            names = (given,) if isinstance(given, str) else tuple(given)
            object.__setattr__(self, "trackers", names)
            known = [name for name in map(str, LoggerType) if name != "all"]
            expected = f"names among {', '.join(known)}; () for none"
            self._check("trackers", set(known).issuperset, expected)
        for name in ("guidance_scales", "trajectory_weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in (
            "max_steps", "batch_size", "gradient_accumulation_steps", "max_skipped_updates",
            "eval_every", "sample_prompts", "checkpoint_every", "keep_checkpoints",
        ):  # fmt: skip
            self._check(name, lambda v: _is_int(v) and v > 0, "an integer above 0")
        for name in ("warmup_steps", "reservoir_walks", "samples_every"):
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
        self._check(
            "trajectory_weights",
            lambda v: len(v) == 3 and all(_is_finite(w) and w >= 0 for w in v) and sum(v) > 0,
            "three numbers of at least 0, not all of them 0",
        )
        for name, values in _CHOICES.items():
            self._check(name, values.__contains__, " or ".join(map(repr, values)))
        for name in ("zero_pooled", "gradient_checkpointing"):
            self._check(name, lambda v: isinstance(v, bool), "True or False")
        if 0 < self.reservoir_walks < self.batch_size * self.gradient_accumulation_steps:
            raise ConfigError(
                f"reservoir_walks is {self.reservoir_walks}, but "
                f"{self.batch_size * self.gradient_accumulation_steps} prompts are walked together "
                "(batch_size * gradient_accumulation_steps): make it at least that, or 0 for "
                "consecutive updates."
            )
        turns = {t for term in self.terms.values() for t in (term.start - 1, term.until or 0)}
        for step in sorted({0, self.max_steps - 1} | turns & set(range(self.max_steps))):
            if not any(term.weight_at(step) for term in self.terms.values()):
                raise ConfigError(
                    f"objective {self.objective!r} has no term that counts in update {step} of "
                    f"{self.max_steps}."
                )
        if "relational" in self.terms and self.batch_size == 1:
            raise ConfigError(
                "The relational term compares the prompts of a batch, and batch_size is 1."
            )

    @cached_property
    def terms(self) -> dict[str, Term]:
        """The objective's terms by name."""
        given = self.objective
        terms = {given: 1.0} if isinstance(given, str) else given
        if not isinstance(terms, Mapping) or not terms:
            raise ConfigError(
                f"objective is {given!r}; expected one of {', '.join(OBJECTIVES)}, or a mapping of "
                "such names to weights."
            )
        return {name: _term(name, value, self.max_steps) for name, value in terms.items()}

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What `mixed_precision` says, for torch."""
        return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mixed_precision]

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
        rate = self.learning_rate * min(1.0, (step + 1) / (self.warmup_steps + 1))
        progress = step / self.max_steps
        if self.max_seconds is not None:
            progress = max(progress, seconds / self.max_seconds)
        progress = min(progress, 1.0)
        if self.lr_schedule == "cosine":
            return rate * 0.5 * (1 + math.cos(math.pi * progress))
        return rate * (1 - progress) if self.lr_schedule == "linear" else rate

    def _check(self, name: str, allowed: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        if not allowed(value):
            raise ConfigError(f"{name} is {value!r}; expected {expected}.")


OBJECTIVES = ("velocity", "embedding", "relational")
_CHOICES = {
    "optimizer": ("adamw", "adamw_8bit"),
    "lr_schedule": ("cosine", "linear", "constant"),
    "mixed_precision": ("no", "bf16", "fp16"),
}


def _term(name: str, value: Any, max_steps: int) -> Term:
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r}: expected one of {', '.join(OBJECTIVES)}.")
    settings = dict(value) if isinstance(value, Mapping) else {"weight": value}
    known = [one.name for one in fields(Term)]
    for key in settings:
        if key not in known:
            raise ConfigError(f"objective {name!r} has {key!r}; expected {', '.join(known)}.")
    for key in ("start", "until"):
        share = settings.get(key)
        if isinstance(share, float) and 0 < share < 1:
            settings[key] = max(1, round(share * max_steps))
    term = Term(**settings)
    if not _is_finite(term.weight) or term.weight <= 0:
        raise ConfigError(f"objective {name!r}: weight {term.weight!r} is no number above 0.")
    if not _is_int(term.start) or term.start < 0:
        raise ConfigError(f"objective {name!r}: start {term.start!r} is no update (from 0).")
    if term.until is not None and not (_is_int(term.until) and term.until > term.start):
        raise ConfigError(
            f"objective {name!r}: until is {term.until!r}; expected an update after start "
            f"({term.start}), or None."
        )
    return term


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
