"""The state of a training run, and its checkpoints.

A checkpoint is a safetensors file: weights, EMA and moments, with the counters as JSON in its
metadata. It is written whole or not at all, and its name, such as `00000500-0123456789abcdef`, has
the update and the beginning of its SHA-256. There is no pickle, so that nothing in it can be
executed.
"""

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
from torch.utils._pytree import tree_map

from ..encoder import SlimT5Encoder
from ..errors import DistillError
from ..hub import make_folder, write_atomic
from .config import DistillConfig
from .pipeline import evaluating, map_tensors, tensors_in
from .report import CHECKPOINTS, DistillResult
from .reservoir import TrajectoryReservoir

logger = logging.getLogger(__name__)

_MAX_SKIPPED = 10  # successive updates whose gradients aren't finite


class TrainingState:
    """All that changes from update to update, of a student in float32 on the pipeline's device.

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
        fp16 = config.mixed_precision == "fp16"
        self.scaler = torch.amp.GradScaler(student.device.type, enabled=fp16)
        self.losses = torch.zeros(2, device=student.device)
        self._optimizer, self._reservoir = optimizer, reservoir
        self._skipped = 0  # successive ones

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
                f"{self.result.steps + 1}, are not finite. Try a smaller learning_rate."
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

    def _state(self) -> dict[str, Any]:
        """All of it but the optimizer's part and the history, which grow."""
        return {
            "student": dict(self.result.student.named_parameters()),
            "ema": self.ema.shadow_params if self.ema else [],
            "scaler": self.scaler.state_dict(),
            "reservoir": self._reservoir.state(),
            "result": self.result.numbers(),
            "losses": self.losses,
            "skipped": self._skipped,
        }

    def save(self, folder: Path, keep: int, identity: Mapping[str, Any]) -> None:
        """Write a checkpoint of a run into `folder`, then remove all but the newest `keep`.

        After an OSError, earlier ones are intact.
        """
        # torch's own method, as that of bitsandbytes nests its tensors.
        moments = torch.optim.Optimizer.state_dict(self._optimizer)["state"]
        state = self._state() | {"history": self.result.history}
        state["optimizer"] = {type(self._optimizer).__name__: moments}
        # A copy, as those of bitsandbytes share their quantization maps, which no file may.
        tensors = {
            ".".join(map(str, path)): tensor.detach().to("cpu", copy=True).contiguous()
            for path, tensor in tensors_in(state).items()
        }
        plain = map_tensors(state, lambda path, _: {"tensor": ".".join(map(str, path))})
        content = save(tensors, {"state": json.dumps(plain), "identity": json.dumps(identity)})
        step = f"{self.result.steps:08d}"
        for damaged in [path for path in _files(folder) if path.name >= step]:  # or of another run
            damaged.unlink()
        write_atomic(folder / f"{step}-{_digest(content)}.safetensors", content)
        for old in _files(folder)[:-keep]:
            old.unlink()

    def restore(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Go on from the newest whole checkpoint, if any; a DistillError if it doesn't fit."""
        if (state := load_checkpoint(folder, identity)) is None:
            return
        result, own = self.result, self._state()
        try:
            if _layout({name: state[name] for name in own}) != _layout(own):
                raise ValueError("it holds tensors of other shapes, or other values")
            optimizer = state["optimizer"][type(self._optimizer).__name__]
            moments = {int(index): values for index, values in optimizer.items()}
            self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})
            self.scaler.load_state_dict(state["scaler"])
            self._skipped = state["skipped"]
            result.history += state["history"]
            vars(result).update(state["result"])
            if self.ema:
                self.ema.optimization_step = result.steps - result.skipped
            saved = tensors_in(state)
            for path, tensor in tensors_in(own).items():
                tensor.data.copy_(saved[path])
        except Exception as error:  # of whichever part doesn't fit
            how = "pass the student and optimizer that it was started with, or remove that file"
            raise DistillError(f"The newest checkpoint doesn't fit: {error!r}; {how}.") from error
        self._reservoir.restore(state["reservoir"])


def load_checkpoint(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of the run's newest checkpoint that is whole, or None; a warning names others."""
    for path in reversed(_files(folder)):
        try:
            return _read(path, identity)
        except Exception as error:  # whatever lies there
            logger.warning("%s is damaged and not used: %s", path, error)
    return None


def _read(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    step, _, digest = path.stem.partition("-")
    if digest != _digest(path.read_bytes()):
        raise ValueError("its SHA-256 isn't that of its name")
    with safe_open(path, "pt") as file:
        names, plain = file.keys(), file.metadata()
        tensors = {name: file.get_tensor(name) for name in names}
    state = json.loads(plain["state"], object_hook=lambda v: tensors.get(v.get("tensor"), v))
    if (int(step), json.loads(plain["identity"])) != (state["result"]["steps"], identity):
        raise ValueError("it is of another run or update")
    return state


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_file())


def _layout(tree: Any) -> Any:
    """The shapes of tensors and the types of numbers in a state; a number may be None."""
    kinds = {type(None): float}
    return tree_map(lambda v: getattr(v, "shape", kinds.get(type(v), type(v))), tree)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder of a run, made where needed; what a run that was killed left in it is removed.

    A DistillError says that another run is writing into it, or that nothing can be written.
    """
    lock = FileLock(make_folder(folder) / ".t5slim-lock", timeout=0)  # it ends with the process
    try:
        lock.acquire()
    except OSError as error:
        why = "another run is writing into it" if isinstance(error, Timeout) else error
        raise DistillError(f"Can't write into output_dir {str(folder)!r}: {why}.") from error
    for leftover in (*folder.glob(".t5slim-*"), *(folder / CHECKPOINTS).glob(".t5slim-*")):
        shutil.rmtree(leftover, ignore_errors=True)  # of files, such as the lock, none
    try:
        yield
    finally:
        with suppress(OSError):  # of Windows, which removes it later
            os.remove(lock.lock_file)
        lock.release()


@contextmanager
def master_weights(student: nn.Module, device: torch.device) -> Iterator[None]:
    """The student in float32 on `device`, in training mode; afterwards in its dtype, in eval mode.

    Updates of 1e-4 of a weight are lost in bfloat16's 8 bits.
    """
    # Parameter by parameter, as a student in float16 keeps its `wo` in float32.
    dtypes = [(parameter, parameter.dtype) for parameter in student.parameters()]
    student.to(device, torch.float32).train()
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
    with ExitStack() as handlers:

        def note(number: int, _: Any) -> None:
            came.append(number)
            handlers.close()

        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # in another thread than the main one
                handlers.callback(signal.signal, number, signal.signal(number, note))
        yield came
