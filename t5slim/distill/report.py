"""The result of a run, and the files that show it: history, metadata, plot, images, card notes."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .. import __version__
from ..encoder import SlimT5Encoder
from ..errors import DistillError
from ..hub import read_json, write_atomic
from .config import DistillConfig
from .metrics import GapReport
from .pipeline import Encode, denoisers, generate, teacher_of, tensor_sha256
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
_NOTED_BY_A_SAVE = {"architectures", "dtype", "transformers_version"}  # in the student's config


@dataclass
class DistillResult:
    """The outcome of a distillation; `print(result)` shows its numbers.

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
        peak_memory_gib: The highest use of the main process's device, in GiB; None where it isn't
            counted (CPU, MPS).
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
    peak_memory_gib: float | None = None

    def numbers(self) -> dict[str, Any]:
        """The numbers among the attributes, by name."""
        left_out = ("student", "output_dir", "report", "history")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def add_history(self, learning_rate: float) -> dict[str, Any]:
        """Add an entry for an evaluation, after an update with `learning_rate`, and return it."""
        numbers = self.numbers()
        entry = {"step": numbers.pop("steps"), "learning_rate": learning_rate, **numbers}
        if self.report is not None:
            thirds = zip(_THIRDS, self.report.thirds, strict=True)
            entry |= {f"gap_{name}_third": gap for name, gap in thirds}
            entry["embedding_spread"] = self.report.spread
        named = {f"velocity_{k}" if k.startswith("gap") else k: v for k, v in entry.items()}
        self.history.append({name: value for name, value in named.items() if value is not None})
        return self.history[-1]

    def __str__(self) -> str:
        numbers = {name: value for name, value in self.numbers().items() if value is not None}
        return "\n".join(f"{name:<16}  {round(value, 5)}" for name, value in numbers.items())


def peak_memory_gib(device: torch.device) -> float | None:
    """The highest use of `device` since `reset_peak_memory`, in GiB; None if it isn't counted."""
    module = torch.get_device_module(device)
    counted = hasattr(module, "max_memory_allocated")
    return module.max_memory_allocated(device) / 2**30 if counted else None


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
    """Facts of the making of a student, in the types of JSON.

    `identity` has those that decide on the weights, by which a run is known when it is resumed; the
    others are for its model card.
    """
    device = torch.device(pipe._execution_device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    teacher = teacher_of(pipe)
    denoiser = next(iter(denoisers(pipe).values()), pipe)
    packages = ("torch", "diffusers", "transformers", "accelerate")
    identity = {
        "pipeline_class": type(pipe).__name__,
        "pipeline_kwargs": _by_content(dict(pipeline_kwargs)),
        "prompts_per_step": config.batch_size * config.gradient_accumulation_steps * processes,
        "prompts": prompts.facts(),
        "eval_prompts": None if eval_prompts is None else PromptSource(eval_prompts).facts(),
        **{f"config.{k}": v for k, v in vars(config).items() if k not in _FREE},
        **{
            f"student.{k}": v
            for k, v in student.config.to_diff_dict().items()
            if k not in _NOTED_BY_A_SAVE
        },
    }
    facts = {
        "identity": identity,
        "pipeline": _named(pipe, denoiser.config.get("_name_or_path")),
        "teacher": _named(teacher, teacher.config.name_or_path),
        "config": vars(config),
        "denoiser_dtype": str(denoiser.dtype).removeprefix("torch."),
        "versions": {"t5slim": __version__} | {name: version(name) for name in packages},
        "hardware": f"{processes} x {hardware} ({device.type})",
    }
    return json.loads(json.dumps(facts, default=str))


def check_output_dir(folder: Path, resume: bool, facts: Mapping[str, Any]) -> None:
    """Refuse a folder that holds something else than the run to be resumed.

    Raises:
        DistillError: The folder holds a model or a run with other settings; the message says which.
        ConfigError: Its `distillation.json` is damaged.
    """
    path = folder / METADATA
    if not (resume and path.exists()):
        for name in (METADATA, "config.json"):
            if (folder / name).exists():
                raise DistillError(
                    f"output_dir {str(folder)!r} holds another run or model ({name}). Pass "
                    "resume=True to go on with it, a new folder, or remove that one."
                )
        return
    then, now = read_json(path).get("identity", {}), facts["identity"]
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


def _by_content(value: Any) -> Any:
    """Images, tensors and arrays by their type, shape and SHA-256, however they are nested."""
    if isinstance(value, Mapping):
        return {str(key): _by_content(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_by_content(one) for one in value]
    if not isinstance(value, (torch.Tensor, Image.Image, np.ndarray)):
        return value
    kind = value.mode if isinstance(value, Image.Image) else value.dtype
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(np.asarray(value))
    return f"{kind} {tuple(tensor.shape)} {tensor_sha256(tensor)}"


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
    write_atomic(folder / METADATA, content.encode())
    lines = "".join(json.dumps(entry) + "\n" for entry in result.history)
    write_atomic(folder / HISTORY, lines.encode())


def card_notes(facts: Mapping[str, Any], result: DistillResult, images: Sequence[str]) -> str:
    """The distillation's part of the model card, in Markdown.

    Args:
        facts: As `run_facts` returns them.
        result: Of the finished run.
        images: Names of files that lie beside the card.
    """
    content = json.dumps({**facts, "result": result.numbers()}, indent=2)
    shown = "\n\n".join(f"![{image}]({image})" for image in images)
    return f"""\
## Distillation

| | |
|---|---|
| pipeline | {facts["pipeline"]} |
| teacher | {facts["teacher"]} |
| velocity gap | {"not measured" if result.gap is None else f"{result.gap:.4f}"} |

The velocity gap is how far the denoiser's predictions move from those under the teacher, over how
far they move under an empty prompt: 0 for the teacher, 1 for no prompt at all.

{shown}

```json
{content}
```
"""


def plot_run(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the gaps and the loss of a run over its updates into a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure  # type: ignore[import-not-found]

    gaps = ("", "_without_ema", *(f"_{third}_third" for third in _THIRDS))
    panels = {"velocity gap": [f"velocity_gap{gap}" for gap in gaps], "loss": ["loss"]}
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for (title, keys), axes in zip(panels.items(), figure.subplots(1, 2), strict=True):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=key, marker=".")
                axes.legend()
        axes.set(title=title, xlabel="updates", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)


def sample_images(
    pipe: Any,
    encode: Encode,
    prompts: Sequence[str],
    pipeline_kwargs: Mapping[str, Any],
    seed: int,
) -> list[Image.Image]:
    """Generate an image of each prompt; none where the pipeline makes video or sound.

    Args:
        pipe: The pipeline.
        encode: In the place of its T5, as for `run_pipeline`.
        prompts: Generated one by one, in the memory that one needs.
        pipeline_kwargs: How to call the pipeline.
        seed: Of the first prompt's noise; each of the others has the next one.
    """
    images: list[Image.Image] = []
    for i, prompt in enumerate(prompts):
        images += generate(pipe, [prompt], pipeline_kwargs, [seed + i], encode)[:1]
    return images


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
    for c, name in enumerate(columns):
        draw.text((c * cell + 4, 4), textwrap.shorten(name, cell // 8), "black", font)
    for i, prompt in enumerate(prompts):
        top = (i + 1) * gap + i * size[1]
        lines = textwrap.wrap(prompt, len(columns) * cell // 8, max_lines=2)
        draw.text((4, top - 4), "\n".join(lines), "black", font, anchor="ld")
        for c, images in enumerate(columns.values()):
            grid.paste(images[i].convert("RGB").resize(size, how), (c * cell, top))
    return grid
