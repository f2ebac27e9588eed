"""A student in training: its weights in float32, its optimizer, its average."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor

from ..encoder import SlimT5Encoder
from ..errors import DistillError
from .calls import autocast
from .config import DistillConfig
from .states import cpu_attention


class Learner:
    """One student and what belongs to its training.

    Args:
        accelerator: distributes it.
        student: in float32, on `device`.
        config: the settings.
        device: of the pipeline.

    Attributes:
        student: as passed.
        average: what is measured, saved and returned: the exponential average of its weights, or,
            without averaging, the student itself.
        skipped: updates that were left out because a gradient wasn't finite.
        skipped_in_a_row: of these, the latest ones.
        grad_norms: number, sum and maximum of the gradients' norms before clipping, where they were
            finite, since `take_grad_norms`.
    """

    def __init__(
        self, accelerator: Accelerator, student: SlimT5Encoder, config: DistillConfig,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.student = student
        self.average = copy.deepcopy(student).eval() if config.ema_decay else student
        self.skipped = self.skipped_in_a_row = 0
        self.grad_norms: tuple[int, float, float] = _NO_NORMS
        self._accelerator = accelerator
        self._config = config
        self._device = device
        self._weights: list[Tensor] = list(student.parameters())
        self._averages: list[Tensor] = list(self.average.parameters())
        self._trained = [p for p in student.parameters() if p.requires_grad]
        # device_placement: the student is on the pipeline's device, which need not be accelerate's.
        self._model, self._optimizer = accelerator.prepare(
            student.train(),
            make_optimizer(self._trained, config),
            device_placement=[False, False],
        )
        # torch's own and not accelerate's, which fixes the precision once for a process: a notebook
        # that trains a second time with another one would be refused.
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.mixed_precision == "fp16")

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Call the student, under the run's precision."""
        with autocast(self._device, self._config.autocast_dtype):
            return self._model(*args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a batch to the update's; with its last, those of all processes."""
        sync: AbstractContextManager[Any] = (
            nullcontext() if last else self._accelerator.no_sync(self._model)
        )
        with sync, cpu_attention(self._device, self._config.autocast_dtype):
            self._scaler.scale(loss / self._config.gradient_accumulation_steps).backward()

    def step(self, update: int, learning_rate: float) -> None:
        """Update the weights and their average, unless a gradient isn't finite.

        Args:
            update: its number, from 0.
            learning_rate: of this update. Set here and not by a scheduler, as accelerate steps a
                prepared one once for each process.
        """
        optimizer = self._optimizer.optimizer
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        self._scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._config.max_grad_norm).item()
        finite = math.isfinite(norm)
        if finite:
            number, total, highest = self.grad_norms
            self.grad_norms = number + 1, total + norm, max(highest, norm)
            self._scaler.step(optimizer)
            self._update_average(update)
        self._scaler.update()
        optimizer.zero_grad()
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1

    def take_grad_norms(self) -> tuple[float, float] | None:
        """Mean and maximum of `grad_norms`, which starts anew; None if there were none."""
        (number, total, highest), self.grad_norms = self.grad_norms, _NO_NORMS
        return (total / number, highest) if number else None

    def finish(self) -> None:
        """Give the student its averaged weights, and take accelerate's wrapper off it."""
        # `accelerate launch --mixed_precision` wraps the student's forward, and unwrapping would
        # leave its bound method on the instance, which a copy of the student would share.
        self._accelerator.unwrap_model(self._model, keep_fp32_wrapper=False)
        vars(self.student).pop("forward", None)
        with torch.no_grad():
            for parameter, average in zip(self._weights, self._averages, strict=True):
                parameter.copy_(average)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values, from which `restore` goes on bitwise."""
        tensors: dict[str, Tensor] = {f"student.{k}": v for k, v in self.student.named_parameters()}
        if self.average is not self.student:
            tensors |= {f"average.{k}": v for k, v in self.average.named_parameters()}
        plain: dict[str, Any] = {"scaler": self._scaler.state_dict()}
        plain |= {name: getattr(self, name) for name in _COUNTERS}
        moments: dict[str, dict[str, Any]] = {}
        # torch's own method, as that of bitsandbytes nests its tensors.
        optimizer = torch.optim.Optimizer.state_dict(self._optimizer.optimizer)
        for index, state in optimizer["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                else:
                    moments.setdefault(str(index), {})[key] = value
        # Copies, as those of bitsandbytes share their quantization maps, which no file may.
        copies = {name: v.detach().to("cpu", copy=True) for name, v in tensors.items()}
        return copies, plain | {"optimizer": moments}

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        moments: dict[int, dict[str, Any]] = {
            int(index): dict(values) for index, values in plain["optimizer"].items()
        }
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, key = rest.split(".", 1)
                moments.setdefault(int(index), {})[key] = tensor
        with torch.no_grad():
            for name, parameter in self.student.named_parameters():
                parameter.copy_(tensors[f"student.{name}"])
            if self.average is not self.student:
                for name, parameter in self.average.named_parameters():
                    parameter.copy_(tensors[f"average.{name}"])
        optimizer = self._optimizer.optimizer
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        self._scaler.load_state_dict(plain["scaler"])
        for name in _COUNTERS:
            setattr(self, name, plain[name])

    def _update_average(self, update: int) -> None:
        if self.average is self.student:
            return
        # Short at first, so that the random start is forgotten as fast as it is trained away.
        decay = min(self._config.ema_decay, (1 + update) / (10 + update))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._weights, 1 - decay)


_NO_NORMS = (0, 0.0, 0.0)
_COUNTERS = ("skipped", "skipped_in_a_row", "grad_norms")


def make_optimizer(
    parameters: list[torch.nn.Parameter], config: DistillConfig
) -> torch.optim.Optimizer:
    """The optimizer that `config.optimizer` names.

    Raises:
        DistillError: it needs a package that isn't installed.
    """
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        fused = all(p.device.type in ("cuda", "cpu") for p in parameters)
        return torch.optim.AdamW(parameters, fused=fused, **settings)
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError:
        raise DistillError(
            'optimizer="adamw_8bit" needs bitsandbytes: pip install bitsandbytes, or take "adamw".'
        ) from None
    make: Callable[..., torch.optim.Optimizer] = bitsandbytes.optim.AdamW8bit
    return make(parameters, **settings)
