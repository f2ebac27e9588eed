"""The state of a training run, and its checkpoints.

They are written whole or not at all, and verified before they are believed. A checkpoint is a
folder named by its update: `state.safetensors` (weights, EMA, moments), `state.json` (counters),
and `manifest.json` with the SHA-256 of both. There is no pickle, so that nothing in it can be
executed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from ..encoder import SlimT5Encoder
from ..errors import DistillError
from .calls import Path as TensorPath
from .calls import map_tensors
from .config import DistillConfig
from .pipeline import evaluating
from .report import DistillResult
from .reservoir import TrajectoryReservoir

logger = logging.getLogger(__name__)

_MAX_SKIPPED = 10  # successive updates whose gradients aren't finite
_FILES = _TENSORS, _COUNTERS = "state.safetensors", "state.json"
_MANIFEST = "manifest.json"


class TrainingState:
    """All that changes from update to update.

    Args:
        student: In float32, on `device`.
        optimizer: Of its parameters.
        reservoir: That batches are drawn from.
        config: The settings.
        device: Of the pipeline.

    Attributes:
        result: Of the run so far.
        parameters: The student's that are trained.
        ema: Their moving average, or None.
        scaler: Of the loss, in float16.
        losses: (2,), sum and number of the finite losses since the last evaluation; on the device,
            as reading it waits for the device.
        grad_norms: Those of the updates since then, before clipping.
    """

    def __init__(
        self,
        student: SlimT5Encoder,
        optimizer: torch.optim.Optimizer,
        reservoir: TrajectoryReservoir,
        config: DistillConfig,
        device: torch.device,
    ) -> None:
        self.result = DistillResult(student)
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.ema = EMAModel(self.parameters, decay=config.ema_decay) if config.ema_decay else None
        # Not accelerate's, which fixes the precision once for a process.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.mixed_precision == "fp16")
        self.losses = torch.zeros(2, device=device)
        self.grad_norms: list[float] = []
        self._optimizer, self._reservoir, self._device = optimizer, reservoir, device
        self._skipped = 0  # successive ones

    def note_loss(self, loss: Tensor) -> None:
        """Add a loss to `losses`, if it is finite."""
        finite = loss.isfinite()
        self.losses += torch.stack([torch.where(finite, loss, 0), finite.float()])

    def update(self, norm: Tensor) -> bool:
        """Update the weights and their EMA, unless a gradient isn't finite; return whether."""
        finite = math.isfinite(norm)
        if finite:
            self.grad_norms.append(norm.item())
            self.scaler.step(self._optimizer)
            if self.ema:
                self.ema.step(self.parameters)
        self.scaler.update()
        self._optimizer.zero_grad()
        self._skipped = 0 if finite else self._skipped + 1
        self.result.skipped += not finite
        if self._skipped == _MAX_SKIPPED:
            raise DistillError(
                f"The gradients of {_MAX_SKIPPED} successive updates, up to number "
                f"{self.result.steps + 1}, are not finite. The student holds the weights before "
                "them. Try a smaller learning_rate, or mixed_precision='bf16' instead of 'fp16'."
            )
        return finite

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The student with its EMA weights in eval mode; afterwards with its own again."""
        with evaluating(self.result.student):
            if self.ema is None:
                yield
                return
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
            try:
                yield
            finally:
                self.ema.restore(self.parameters)

    def save(self, folder: Path, keep: int) -> None:
        """Write a checkpoint into `folder`, then remove all but the newest `keep`."""
        state = {
            "student": dict(self.result.student.named_parameters()),
            "ema": self.ema.state_dict() if self.ema else None,
            # torch's own method, as that of bitsandbytes nests its tensors.
            "optimizer": torch.optim.Optimizer.state_dict(self._optimizer)["state"],
            "scaler": self.scaler.state_dict(),
            "reservoir": self._reservoir.state(),
            "result": self.result.numbers(),
            "losses": self.losses,
            "grad_norms": self.grad_norms,
            "skipped": self._skipped,
        }
        save_checkpoint(folder, self.result.steps, state, keep)

    def restore(self, state: dict[str, Any], max_steps: int) -> None:
        """Go on from a checkpoint, bitwise."""
        for name, value in state["result"].items():
            setattr(self.result, name, value)
        with torch.no_grad():
            for name, parameter in self.result.student.named_parameters():
                parameter.copy_(state["student"][name])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self._device)
        moments = {int(index): values for index, values in state["optimizer"].items()}
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})
        self.scaler.load_state_dict(state["scaler"])
        self.losses.copy_(state["losses"])
        self.grad_norms, self._skipped = state["grad_norms"], state["skipped"]
        self._reservoir.restore(state["reservoir"], finished=self.result.steps == max_steps)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write nested dicts and lists of tensors and plain values.

    Raises:
        DistillError: They can't be written; earlier checkpoints are intact.
    """
    tensors: dict[str, Tensor] = {}

    def refer(path: TensorPath, tensor: Tensor) -> dict[str, str]:
        name = ".".join(map(str, path))
        # A copy, as those of bitsandbytes share their quantization maps, which no file may.
        tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}

    plain = map_tensors(state, refer)
    temporary, final = folder / f".{step:08d}.tmp", folder / f"{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*"):  # of a run that was killed while it wrote
            shutil.rmtree(leftover)
        temporary.mkdir()
        save_file(tensors, temporary / _TENSORS)
        (temporary / _COUNTERS).write_text(json.dumps(plain), encoding="utf-8")
        manifest = {name: _sha256((temporary / name).read_bytes()) for name in _FILES}
        (temporary / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)  # a damaged one, which wasn't resumed from
        os.replace(temporary, final)
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DistillError(
            f"The checkpoint of update {step} can't be written to {str(folder)!r}: {error}. "
            "Earlier ones are intact: make room there, and call train again with resume=True."
        ) from error


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None. A warning names a damaged one."""
    for path in reversed(_checkpoints(folder)):
        try:
            manifest = json.loads((path / _MANIFEST).read_bytes())
            content = {name: (path / name).read_bytes() for name in _FILES}
            for name, data in content.items():
                if _sha256(data) != manifest[name]:
                    raise ValueError(f"{name} has another SHA-256 than was written")
            return _join(json.loads(content[_COUNTERS]), load(content[_TENSORS]))
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            logger.warning("The checkpoint %s is damaged and not used: %s", path, error)
    return None


def _join(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """Put tensors in the place of the references to them."""
    if isinstance(plain, list):
        return [_join(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if plain.keys() == {"tensor"}:
        return tensors[plain["tensor"]]
    return {name: _join(value, tensors) for name, value in plain.items()}


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.name.isdigit())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def master_weights(student: nn.Module, device: torch.device) -> Iterator[None]:
    """The student in float32 on `device`; afterwards each weight in its dtype again, in eval mode.

    Updates of 1e-4 of a weight are lost in bfloat16's 8 bits.
    """
    student.to(device)
    # Parameter by parameter, as a student in float16 keeps its `wo` in float32.
    dtypes = [(parameter, parameter.dtype) for parameter in student.parameters()]
    for parameter, _ in dtypes:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in dtypes:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
        student.eval()


@contextmanager
def interruptible() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the number of SIGINT or SIGTERM once it came, and else 0.

    The update under way is finished first; a second signal does what it always does.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in map(int, (signal.SIGINT, signal.SIGTERM)):
            before[number] = signal.signal(number, note)
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
