"""What benchmarks share: turns, ratios with their spread, processes of their own, the machine."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

Ways = Mapping[str, Callable[[], Any]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def turns(ways: Ways, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, measured A B A B, after a first turn that isn't counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(values: Sequence[float], base: Sequence[float]) -> str:
    """The median of paired ratios, and the least and the most of them."""
    ratios = sorted(value / other for value, other in zip(values, base, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def peak_gib() -> float:
    """The most memory so far: of the GPU, or of this process."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if (status := Path("/proc/self/status")).exists():  # ru_maxrss counts the parent's memory, too
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def start_process(script: str, task: str, threads: int | None = None, **kwargs: Any) -> Any:
    """Start `python script --task task kwargs`, which prints its result as JSON."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    command = [sys.executable, script, "--task", task, json.dumps(kwargs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def result(process: Any) -> dict[str, Any]:
    """What a started process printed last; "failed" with how it ended, if it did."""
    output, _ = process.communicate()
    if process.returncode:
        return {"failed": f"exit status {process.returncode}"}
    return json.loads(output.splitlines()[-1])


def random_weights(model: nn.Module, dtype: torch.dtype, device: str = DEVICE) -> nn.Module:
    """Give weights to a model from the meta device; quicker than its own initialization."""
    model = model.to(dtype).to_empty(device=device)
    if hasattr(model, "tie_weights"):  # which `to_empty` undoes
        model.tie_weights()
    for parameter in model.parameters():
        # The variance of PyTorch's linear layers: activations stay finite, whatever the depth.
        bound = parameter.shape[-1] ** -0.5
        nn.init.uniform_(parameter, -bound, bound) if parameter.ndim > 1 else nn.init.ones_(
            parameter
        )
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return model.eval()


def machine() -> str:
    """Markdown: processor, memory, versions, commit and command."""
    name, flags = platform.processor() or platform.machine(), ""
    if (info := Path("/proc/cpuinfo")).exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        lines = {key.strip(): value.strip() for key, value in lines.items()}
        name, flags = lines.get("model name", name), lines.get("flags", "")
    sets = [
        each for each in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if each in flags.split()
    ]
    versions = []
    for package in ("t5slim", "torch", "transformers", "diffusers", "bitsandbytes"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    memory = psutil.virtual_memory().total / 2**30
    gpu = f"; {torch.cuda.get_device_name()}" if DEVICE == "cuda" else ""
    return (
        f"- Machine: {name}, {os.cpu_count()} cores ({', '.join(sets).upper()}), "
        f"{torch.get_num_threads()} threads, {memory:.0f} GiB{gpu}\n"
        f"- Versions: Python {platform.python_version()}, {', '.join(versions)}\n"
        f"- Commit: {commit}\n- Command: `python {' '.join(sys.argv)}`\n"
    )
