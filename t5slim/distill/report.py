"""The result of a run, and the files that show it: history, metadata, plot, images, card notes."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import re
import sys
import textwrap
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .. import __version__
from ..encoder import SlimT5Encoder
from ..errors import DistillError
from ..hub import write_atomic
from .config import DistillConfig
from .metrics import GapReport
from .pipeline import denoisers, teacher_of
from .prompts import PromptSource

_THIRDS = ("first", "middle", "last")
CHECKPOINTS, METADATA, HISTORY = "checkpoints", "distillation.json", "history.jsonl"
# Settings that don't change the weights that a run comes to, and so may differ when it is resumed.
# The batch may be cut in other ways, as its product counts.
_FREE = {
    "eval_every",
    "samples_every",
    "trackers",
    "checkpoint_every",
    "keep_checkpoints",
    "batch_size",
    "gradient_accumulation_steps",
}


@dataclass
class DistillResult:
    """The outcome of a distillation; `print(result)` shows a table.

    Attributes:
        student: The student that was passed, trained: EMA weights, in its dtype, in eval mode.
        output_dir: Where it was saved, with the files of the run; None: nowhere.
        report: The last velocity gap by prompt and denoiser call; None without `eval_prompts`.
        history: An entry for each evaluation, as in the file `history.jsonl`.
        steps: Updates made.
        skipped: Of them, those left out because a gradient wasn't finite.
        seconds: Training time, without evaluations, image grids and checkpoints.
        teacher_samples: Samples that the denoiser predicted for the teacher, on all processes.
        student_samples: Samples that it predicted for the student, and went backwards through.
        loss: Mean over the updates since the last entry of `history`.
        gap: The velocity gap on `eval_prompts`; None without.
        gap_without_ema: The velocity gap of the last weights; None without.
        peak_memory_gib: The highest use of a device (on a CPU: of a process), in GiB.
    """

    student: SlimT5Encoder = field(repr=False)
    output_dir: Path | None = None
    report: GapReport | None = field(default=None, repr=False)
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    teacher_samples: int = 0
    student_samples: int = 0
    loss: float = math.nan
    gap: float | None = None
    gap_without_ema: float | None = None
    peak_memory_gib: float = 0.0

    def numbers(self) -> dict[str, Any]:
        """The numbers among the attributes."""
        left_out = ("student", "output_dir", "report", "history")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def add_history(
        self, learning_rate: float, grad_norms: Sequence[float], prompts_per_step: int
    ) -> dict[str, Any]:
        """Add an entry for an evaluation, and return it.

        Args:
            learning_rate: Of the last update.
            grad_norms: Those since the last entry, before clipping, as far as they were finite.
            prompts_per_step: On all processes.
        """
        before = self.history[-1] if self.history else {"step": 0, "seconds": 0.0}
        numbers = self.numbers()
        entry = {"step": numbers.pop("steps"), "learning_rate": learning_rate, **numbers}
        if self.report is not None:
            thirds = zip(_THIRDS, self.report.thirds, strict=True)
            entry |= {f"gap_{name}_third": gap for name, gap in thirds}
            entry["gap_real_tokens"] = self.report.real_tokens
            entry["gap_padding"] = self.report.padding
            entry["embedding_spread"] = self.report.spread
        if grad_norms:
            entry |= {"grad_norm_mean": fmean(grad_norms), "grad_norm_max": max(grad_norms)}
        rate = (self.steps - before["step"]) / (self.seconds - before["seconds"])
        entry["prompts_per_second"] = rate * prompts_per_step
        named = {f"velocity_{k}" if k.startswith("gap") else k: v for k, v in entry.items()}
        self.history.append({name: value for name, value in named.items() if value is not None})
        return self.history[-1]

    def table(self) -> dict[str, str]:
        """The result as names and values."""
        lines = {"updates": f"{self.steps:,}, {self.skipped:,} skipped"}
        if self.gap is not None:
            lines["velocity gap (0: the teacher, 1: an empty prompt)"] = f"{self.gap:.4f}"
            lines["velocity gap without EMA"] = f"{self.gap_without_ema:.4f}"
        if self.report is not None:
            thirds = ("-" if third is None else f"{third:.4f}" for third in self.report.thirds)
            lines["velocity gap by third of the trajectory"] = "  ".join(thirds)
            if self.report.spread is not None:
                lines["spread between prompts (1: the teacher's)"] = f"{self.report.spread:.4f}"
        lines["loss"] = f"{self.loss:.4g}"
        lines["training time"] = str(timedelta(seconds=round(self.seconds)))
        lines["denoiser samples of the teacher"] = f"{self.teacher_samples:,}"
        lines["denoiser samples of the student"] = f"{self.student_samples:,}"
        lines["peak memory"] = f"{self.peak_memory_gib:.2f} GiB"
        return lines

    def __str__(self) -> str:
        lines = self.table()
        if self.output_dir is not None:
            lines["saved in"] = str(self.output_dir)
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def peak_memory_gib(device: torch.device) -> float:
    """The highest use of `device` since `reset_peak_memory`, in GiB; where the device doesn't count
    it (CPU, MPS), that of this process since it started.
    """
    module = torch.get_device_module(device)
    if hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def reset_peak_memory(device: torch.device) -> None:
    """Forget the highest use so far: T5-XXL may have been loaded and freed again."""
    module = torch.get_device_module(device)
    if hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)


# --- the identity of a run ---


def run_facts(
    pipe: Any,
    student: SlimT5Encoder,
    config: DistillConfig,
    pipeline_kwargs: Mapping[str, Any],
    prompts: PromptSource,
    eval_prompts: list[str] | None,
    processes: int,
) -> dict[str, Any]:
    """Facts of the making of a student, as plain values: for its model card, and for resuming."""
    device = torch.device(pipe._execution_device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    teacher = teacher_of(pipe)
    denoiser = next(iter(denoisers(pipe).values()), pipe)
    packages = ("torch", "diffusers", "transformers", "accelerate")
    facts = {
        "run_id": uuid.uuid4().hex[:8],
        "pipeline": _named(pipe, denoiser.config.get("_name_or_path")),
        "teacher": _named(teacher, teacher.config.name_or_path),
        "pipeline_class": type(pipe).__name__,
        "pipeline_kwargs": _by_content(dict(pipeline_kwargs)),
        "student": student.config.to_diff_dict(),
        "config": vars(config),
        "prompts_per_step": config.batch_size * config.gradient_accumulation_steps * processes,
        "prompts": prompts.facts(),
        "eval_prompts": None if eval_prompts is None else PromptSource(eval_prompts).facts(),
        "precision": {
            "student": "float32",
            "denoiser": str(denoiser.dtype).removeprefix("torch."),
            "autocast": config.mixed_precision,
        },
        "versions": {"t5slim": __version__} | {name: version(name) for name in packages},
        "hardware": f"{processes} x {hardware} ({device.type})",
    }
    return json.loads(json.dumps(facts, default=str))


def check_output_dir(folder: Path, resume: bool, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a folder that holds something else than the run to be resumed.

    Returns:
        The facts, with the id of the run that is resumed.

    Raises:
        DistillError: The folder is a file, or holds a model or a run with other settings; the
            message says which.
    """
    path = folder / METADATA
    if not (resume and path.exists()):
        if folder.exists() and not folder.is_dir():
            raise DistillError(f"output_dir {str(folder)!r} is a file; expected a folder.")
        for pattern in (METADATA, HISTORY, "config.json", "*.safetensors"):
            for found in folder.glob(pattern):
                raise DistillError(
                    f"output_dir {str(folder)!r} holds another run or model ({found.name}). Pass "
                    "resume=True to go on with it, a new folder, or remove that one."
                )
        return dict(facts)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        then, now = _identity(before), _identity(facts)
        run_id = before["run_id"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DistillError(f"{path} is damaged ({error}): this run can't be resumed.") from error
    differences = [
        f"{name}: then {json.dumps(then.get(name)):.100}, now {json.dumps(now.get(name)):.100}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if differences:
        raise DistillError(
            f"The run in {str(folder)!r} can't be resumed with other settings. They differ in "
            f"{'; '.join(differences)}. Pass those that the run was started with, or another "
            "output_dir."
        )
    return {**facts, "run_id": run_id}


def _identity(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that decide on the weights."""
    names = ("pipeline_class", "pipeline_kwargs", "prompts_per_step", "prompts", "eval_prompts")
    flat = {name: facts[name] for name in names}
    flat |= {f"config.{k}": v for k, v in facts["config"].items() if k not in _FREE}
    # A save notes the others in the student's config.
    shape = facts["student"].keys() - {"architectures", "dtype", "transformers_version"}
    return flat | {f"student.{k}": facts["student"][k] for k in shape if k[0] != "_"}


def _by_content(value: Any) -> Any:
    """Images, tensors and arrays by their type, shape and SHA-256, however they are nested."""
    if isinstance(value, Mapping):
        return {str(key): _by_content(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_by_content(one) for one in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        array = value.flatten().view(torch.uint8).numpy()
    elif isinstance(value, (Image.Image, np.ndarray)):
        array = np.ascontiguousarray(value)
    else:
        return value
    kind = getattr(value, "mode", None) or value.dtype
    shape = getattr(value, "shape", array.shape)
    return f"{kind} {tuple(shape)} {hashlib.sha256(array.tobytes()).hexdigest()}"


def _named(module: Any, name_or_path: str | os.PathLike[str] | None) -> str:
    """A class, and the Hub id and commit that it was loaded from; a folder is nobody's business."""
    path = os.fspath(name_or_path or "").replace(os.sep, "/")
    name = type(module).__name__
    if found := re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})", path):
        return f"{name} of {found[1].replace('--', '/')} at {found[2]}"
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not os.path.exists(path)
    return f"{name} of {path}" if is_id else name


# --- files ---


def write_run(folder: Path, facts: Mapping[str, Any], result: DistillResult) -> None:
    """Write `distillation.json` and `history.jsonl`."""
    content = json.dumps({**facts, "result": result.numbers()}, indent=2)
    write_atomic(folder / METADATA, f"{content}\n".encode())
    lines = "".join(json.dumps(entry) + "\n" for entry in result.history)
    write_atomic(folder / HISTORY, lines.encode())


def read_history(folder: Path | None, step: int) -> list[dict[str, Any]]:
    """The entries of `history.jsonl` up to update `step`."""
    if folder is None or not (folder / HISTORY).exists():
        return []
    entries = map(json.loads, (folder / HISTORY).read_text(encoding="utf-8").splitlines())
    return [entry for entry in entries if entry["step"] <= step]


def card_notes(facts: Mapping[str, Any], result: DistillResult, images: Sequence[str]) -> str:
    """The distillation's part of the model card, in Markdown; `images` lie beside the card."""
    lines = {
        **{name: facts[name] for name in ("pipeline", "teacher")},
        "called with": ", ".join(f"{k}={v!r}" for k, v in facts["pipeline_kwargs"].items()),
        "prompts": json.dumps(facts["prompts"]),
        "held-out prompts": json.dumps(facts["eval_prompts"]),
        **result.table(),
        "hardware": facts["hardware"],
        "versions": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in lines.items())
    shown = "\n\n".join(f"![{image}]({image})" for image in images)
    settings = json.dumps(facts["config"], indent=2)
    return f"""\
## Distillation

| | |
|---|---|
{table}

The velocity gap is how far the denoiser's predictions move from those under the teacher, over how
far they move under an empty prompt: 0 for the teacher, 1 for no prompt at all.

{shown}

<details><summary>Settings</summary>

```json
{settings}
```

</details>
"""


def plot_run(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the history of a run into a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure  # type: ignore[import-not-found]

    panels = {
        "velocity gap": ("velocity_gap", "velocity_gap_without_ema"),
        "velocity gap by third": tuple(f"velocity_gap_{third}_third" for third in _THIRDS),
        "spread between prompts": ("embedding_spread",),
        "loss": ("loss",),
        "gradient norm": ("grad_norm_mean", "grad_norm_max"),
        "prompts per second": ("prompts_per_second",),
    }
    figure = Figure(figsize=(15, 7), layout="constrained")
    for (title, keys), axes in zip(panels.items(), figure.subplots(2, 3).flat, strict=True):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=key, marker=".")
                axes.legend()
        linear = title in ("spread between prompts", "prompts per second")
        axes.set(title=title, xlabel="updates", yscale="linear" if linear else "log")
        axes.grid(alpha=0.3, which="both")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    write_atomic(path, content.getvalue())


def png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()


def image_grid(
    prompts: Sequence[str], columns: Mapping[str, Sequence[Image.Image]], cell: int = 256
) -> Image.Image:
    """An image grid with a line for each prompt, headed by it, and a column for each name.

    Args:
        prompts: As many as each column has images.
        columns: The images by the column's name, all of one size.
        cell: The width of a column in pixels; smaller images are enlarged.
    """
    width, height = next(iter(columns.values()))[0].size
    size = (cell, round(cell * height / width))
    # Enlarged pixels stay pixels.
    how = Image.Resampling.NEAREST if width < cell else Image.Resampling.LANCZOS
    font, gap = ImageFont.load_default(14), 48
    grid = Image.new("RGB", (len(columns) * cell, gap + len(prompts) * (size[1] + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for c, (name, images) in enumerate(columns.items()):
        draw.text((c * cell + 4, 4), textwrap.shorten(name, cell // 8), "black", font)
        for i, image in enumerate(images):
            place = (c * cell, (i + 1) * gap + i * size[1])
            grid.paste(image.convert("RGB").resize(size, how), place)
    for i, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt, len(columns) * cell // 8, max_lines=2)
        draw.text(
            (4, (i + 1) * gap + i * size[1] - 4), "\n".join(lines), "black", font, anchor="ld"
        )
    return grid
