"""A denoiser that is spread over the processes of a launch (FSDP), as one that fits no card."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import ConfigError
from .pipeline import DENOISERS


def shard_denoiser(pipe: Any, device: torch.device) -> None:
    """Spread the weights of a pipeline's denoiser over all processes, each with its share.

    They are gathered block by block, forwards and backwards, and let go of again; predictions and
    gradients are the same. Each process must call the denoiser as often as the others, which
    `train` takes care of. The student is small, and whole on each.

    Args:
        pipe: the pipeline, in host memory.
        device: of this process, where the shares go.

    Raises:
        ConfigError: there is only this process.
    """
    from torch.distributed import get_world_size, is_initialized
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not is_initialized():
        raise ConfigError("A denoiser can only be spread over several processes: see torchrun.")
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for denoiser in _denoisers(pipe):
        for child in denoiser.children():
            for block in child if isinstance(child, nn.ModuleList) else ():
                fully_shard(block, mesh=mesh)
        fully_shard(denoiser, mesh=mesh)


def is_sharded(pipe: Any) -> bool:
    """Whether `shard_denoiser`, or the user's own FSDP, has spread the pipeline's denoiser."""
    return any(isinstance(p, DTensor) for d in _denoisers(pipe) for p in d.parameters())


def _denoisers(pipe: Any) -> list[nn.Module]:
    found = (getattr(pipe, name, None) for name in DENOISERS)
    return [denoiser for denoiser in found if denoiser is not None]
