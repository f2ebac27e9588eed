"""Short runs of `train`, in this process and in others."""

import json
import multiprocessing
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_flux, tiny_student
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher import LaunchConfig, elastic_launch
from zoo import CASES

from t5slim.distill import DistillConfig, DistillResult, train
from t5slim.distill.report import _content

QUICK: dict[str, Any] = {
    "max_steps": 3, "batch_size": 4, "reservoir_size": 8, "warmup_steps": 2, "ema_decay": 0.9,
    "learning_rate": 5e-3, "objective": "velocity", "velocity_every": 1,
}  # fmt: skip
RESUMED: dict[str, Any] = {
    "max_steps": 30, "eval_every": 5, "checkpoint_every": 4, "prompt_dropout": 0.2,
    "objective": DistillConfig().objective, "embedding_phase": 0.2,
}  # fmt: skip
SETTINGS = DistillConfig.__dataclass_fields__


def pipeline_and_kwargs(name: str, steps: int = 3) -> tuple[Any, dict[str, Any]]:
    """A pipeline of `tiny` or of `zoo`, and how it is called."""
    if name in CASES:
        return CASES[name].pipe(), CASES[name].call()
    pipe = TINY_PIPELINES[name]()
    return pipe, call_kwargs(pipe, steps)


def calls_of(module: torch.nn.Module) -> list[Any]:
    """A list that will hold keyword arguments and output of each call of a module."""
    calls: list[Any] = []
    module.register_forward_hook(lambda _, *call: calls.append(call[1:]), with_kwargs=True)
    return calls


def quick(**changes: Any) -> DistillConfig:
    return DistillConfig(**QUICK | changes)


def run(pipe: Any, student: Any = None, prompts: Any = PROMPTS[:4], **changes: Any) -> Any:
    """A short run: arguments of `train`, and settings that are changed."""
    config = quick(**{name: changes.pop(name) for name in list(changes) if name in SETTINGS})
    student = tiny_student(pipe) if student is None else student
    return train(pipe, student, prompts, config, **{"pipeline_kwargs": call_kwargs(pipe)} | changes)


def losses(result: DistillResult) -> list[float]:
    return [entry["loss"] for entry in result.history]


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def history_of(folder: Path) -> list[dict[str, Any]]:
    """The entries of `history.jsonl`, but for the time that they took."""
    entries = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def contents(file: Path) -> None:
    """Write what values of many kinds are known by in this process."""
    image, ones = Image.linear_gradient("L").resize((4, 4)), torch.ones(2)
    red, blue = (image.quantize(2) for _ in range(2))
    blue.putpalette([0, 0, 255, 0, 0, 0])
    values = [
        image, image.convert("RGB"), image.rotate(90), image.resize((2, 8)), red, blue,
        ones, ones.bfloat16(), ones[None], -ones, ones.numpy(), ones.double().numpy(),
        np.float32(1), np.array(["a", None], dtype=object), b"a", b"b", bytearray(b"a"), 1j,
        {1: "a"}, {"a", "b", "c"}, {"a", "b", "d"}, Path("a"),
        Namespace(a=1), Namespace(a=[image]), Namespace(a=(image.rotate(90),)), Namespace, contents,
        partial(Namespace, a=1), partial(contents, 1), torch.float16, slice(1, 2),
        {"a": [{"b": ones}]},
    ]  # fmt: skip
    file.write_text(json.dumps(values, default=_content))


# --- runs in other processes ---------------------------------------------------------------------


def spawn(function: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseProcess:
    """A process that calls `function`; it has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.training", "t5slim.distill.trainer"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    process = context.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    return process


def resumable(
    folder: Path, pipe: Any = None, dies_at: tuple[str, int] | None = None, **changes: Any
) -> Any:
    """A run that is the same in each process, and goes on where it can.

    If it `dies_at` an event of Python's audit hooks, then at the nth that touches a checkpoint.
    """
    torch.set_num_threads(1)
    if dies_at is not None:
        seen = count(1)

        def die(event: str, args: tuple[Any, ...]) -> None:
            if event == dies_at[0] and "checkpoints" in str(args[:1]) and next(seen) == dies_at[1]:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
    pipe = pipe or tiny_flux()
    changes = {"prompts": PROMPTS, "output_dir": folder, "resume": True} | RESUMED | changes
    changes.setdefault("student", tiny_student(pipe).config)  # of a new one
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)  # a plot takes longer than the run
        return run(pipe, **changes)


def distributed(name: str, processes: int, changes: dict[str, Any]) -> list[DistillResult]:
    """What `comparable` returns in each of several processes."""
    # As torchrun does; `accelerate launch` starts several processes on CPUs by MPI only.
    standalone: Any = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        launch = elastic_launch(LaunchConfig(1, 1, processes, **standalone), comparable)
        return [*launch(name, changes).values()]


def comparable(name: str, changes: dict[str, Any]) -> DistillResult:
    """A run without dropout, whose draws would be those of its process."""
    torch.set_num_threads(1)
    pipe = TINY_PIPELINES[name]()
    student = tiny_student(pipe, dropout_rate=0.0)
    if changes.pop("sharded", False):
        shard(pipe.transformer)
    student = student.config if changes.pop("fresh", False) else student
    changes = {"eval_every": 2, "eval_prompts": PROMPTS[:1], "reservoir_size": 16} | changes
    return run(pipe, student, PROMPTS, **changes)


def shard(transformer: Any) -> None:
    """Spread the weights of FLUX's denoiser over the processes, as docs/distributed.md has it."""
    device = Accelerator().device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh)
