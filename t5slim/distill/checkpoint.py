"""The state of a training run, and its checkpoints.

A checkpoint is a safetensors file: weights, EMA and moments, with the counters as JSON in its
metadata. It is written whole or not at all, and its name, such as `00000500-0123456789abcdef`, has
the update and the beginning of its SHA-256. There is no pickle, so that nothing in it can be
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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..encoder import SlimT5Encoder
from ..errors import DistillError
from ..hub import write_atomic
from .config import DistillConfig
from .pipeline import Path as TensorPath
from .pipeline import evaluating, map_tensors
from .report import DistillResult
from .reservoir import TrajectoryReservoir

logger = logging.getLogger(__name__)

_MAX_SKIPPED = 10  # successive updates whose gradients aren't finite


class TrainingState:
    """All that changes from update to update.

    Args:
        student: In float32, on the device of the pipeline.
        optimizer: Of its parameters.
        reservoir: That batches are drawn from.
        config: The settings.

    Attributes:
        result: Of the run so far.
        parameters: The student's that are trained.
        ema: Their moving average, or None.
        scaler: Of the loss, in float16.
        losses: (2,), sum and number of the finite losses since the last evaluation; on the device,
            as reading it waits for the device.
    """

    def __init__(
        self,
        student: SlimT5Encoder,
        optimizer: torch.optim.Optimizer,
        reservoir: TrajectoryReservoir,
        config: DistillConfig,
    ) -> None:
        self.result = DistillResult(student)
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.ema = EMAModel(self.parameters, decay=config.ema_decay) if config.ema_decay else None
        # Not accelerate's, which fixes the precision once for a process.
        self.scaler = torch.amp.GradScaler(
            student.device.type, enabled=config.mixed_precision == "fp16"
        )
        self.losses = torch.zeros(2, device=student.device)
        self._optimizer, self._reservoir = optimizer, reservoir
        self._kind = type(optimizer).__name__
        self._skipped = 0  # successive ones

    def note_loss(self, loss: Tensor) -> None:
        """Add a loss to `losses`, if it is finite."""
        finite = loss.isfinite()
        self.losses += torch.stack([torch.where(finite, loss, 0), finite.float()])

    def update(self, norm: Tensor) -> bool:
        """Update the weights and their EMA, unless the norm () of all gradients isn't finite.

        Returns whether it was; raises a DistillError if it wasn't, ten times in succession.
        """
        finite = math.isfinite(norm)
        if finite:
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
        with evaluating(self.result.student), ExitStack() as stack:
            if self.ema:
                self.ema.store(self.parameters)
                stack.callback(self.ema.restore, self.parameters)
                self.ema.copy_to(self.parameters)
            yield

    def save(self, folder: Path, keep: int, identity: Mapping[str, Any]) -> None:
        """Write a checkpoint of a run into `folder`, then remove all but the newest `keep`.

        Raises:
            OSError: It can't be written; earlier ones are intact.
        """
        state = {
            "student": dict(self.result.student.named_parameters()),
            "ema": self.ema.state_dict() if self.ema else None,
            # torch's own method, as that of bitsandbytes nests its tensors.
            "optimizer": {self._kind: torch.optim.Optimizer.state_dict(self._optimizer)["state"]},
            "scaler": self.scaler.state_dict(),
            "reservoir": self._reservoir.state(),
            "result": self.result.numbers() | {"history": self.result.history},
            "losses": self.losses,
            "skipped": self._skipped,
        }
        tensors: dict[str, Tensor] = {}

        def refer(path: TensorPath, tensor: Tensor) -> dict[str, str]:
            name = ".".join(map(str, path))
            # A copy, as those of bitsandbytes share their quantization maps, which no file may.
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
            return {"tensor": name}

        plain = {"state": map_tensors(state, refer), "identity": identity}
        content = save(tensors, {name: json.dumps(value) for name, value in plain.items()})
        step = f"{self.result.steps:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for damaged in folder.glob(f"{step}-*"):  # which wasn't resumed from
            damaged.unlink()
        write_atomic(folder / f"{step}-{_digest(content)}.safetensors", content)
        for old in sorted(folder.glob("[0-9]*"))[:-keep]:
            old.unlink()

    def restore(self, state: dict[str, Any], max_steps: int) -> None:
        """Go on from a checkpoint, bitwise; before `max_steps`, trajectories are sampled again.

        Raises:
            DistillError: It is of another optimizer or student.
        """
        student, ema = self.result.student, self.ema
        weights = dict(student.named_parameters()), ema and ema.shadow_params
        try:
            found = state["student"], ema and state["ema"]["shadow_params"]
            if _shapes(found) != _shapes(weights):
                raise ValueError("its weights are of other shapes")
            optimizer = state["optimizer"][self._kind]
            moments = {int(index): values for index, values in optimizer.items()}
            self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})
            if ema:
                ema.load_state_dict(state["ema"])
                ema.to(student.device)
            self.scaler.load_state_dict(state["scaler"])
            self.losses.copy_(state["losses"])
            self._skipped = state["skipped"]
            for name in (*self.result.numbers(), "history"):
                setattr(self.result, name, state["result"][name])
            # The embedding has two names, of which a checkpoint holds one.
            student.load_state_dict(state["student"], strict=False)
        except Exception as error:  # of whichever part doesn't fit
            how = "pass the student and optimizer that it was started with, or remove that file"
            raise DistillError(f"The newest checkpoint doesn't fit: {error!r}; {how}.") from error
        self._reservoir.restore(state["reservoir"], finished=self.result.steps == max_steps)


def load_checkpoint(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of the run's newest checkpoint that is whole, or None; a warning names others."""
    for path in sorted(folder.glob("[0-9]*"), reverse=True):
        try:
            return _read(path, identity)
        except Exception as error:  # whatever lies there
            logger.warning("%s is damaged and not used: %s", path, error)
    return None


def _read(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    step, _, digest = path.stem.partition("-")
    if not path.is_file() or digest != _digest(path.read_bytes()):
        raise ValueError("its SHA-256 isn't that of its name")
    with safe_open(path, "pt") as file:
        names, plain = file.keys(), file.metadata()
        tensors = {name: file.get_tensor(name) for name in names}
    state = json.loads(plain["state"], object_hook=lambda v: tensors.get(v.get("tensor"), v))
    if (int(step), json.loads(plain["identity"])) != (state["result"]["steps"], identity):
        raise ValueError("it is of another run or update")
    return state


def _shapes(tree: Any) -> Any:
    return map_tensors(tree, lambda _, tensor: tensor.shape)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder of a run, made where needed; what a run that was killed left in it is removed.

    Raises:
        DistillError: Another run is writing into it, or nothing can be written.
    """
    lock = FileLock(folder / ".t5slim-lock", timeout=0)  # the kernel's: it ends with the process
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, ValueError) as error:
        why = "another run is writing into it" if isinstance(error, Timeout) else error
        raise DistillError(f"Can't write into output_dir {str(folder)!r}: {why}.") from error
    for leftover in (*folder.glob(".t5slim-*"), *folder.glob("*/.t5slim-*")):
        shutil.rmtree(leftover, ignore_errors=True)  # of files, such as the lock, none
    try:
        yield
    finally:
        with suppress(OSError):  # of Windows, which removes it later
            os.remove(lock.lock_file)
        lock.release()


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
def interruptible() -> Iterator[list[int]]:
    """Yields a list, into which the number of SIGINT or SIGTERM is put once it came.

    The update under way is finished first; a second signal does what it always does.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, before[number])

    with suppress(ValueError):  # in another thread than the main one
        for number in map(int, (signal.SIGINT, signal.SIGTERM)):
            before[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
