"""The result of a run, and the files that show it: history, metadata, plot, images, card notes."""

import hashlib
import json
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from huggingface_hub import EvalResult
from PIL import Image, ImageDraw, ImageFont

from .. import __version__
from ..encoder import SlimT5Encoder
from ..errors import ConfigError, DistillError
from ..hub import read_json, write_atomic
from .config import DistillConfig
from .metrics import GapReport
from .pipeline import denoisers, teacher_of, tensor_sha256
from .prompts import PromptSource

CHECKPOINTS, METADATA, HISTORY = "checkpoints", "distillation.json", "history.jsonl"
# Settings that may differ when a run is resumed: of those of the batch, only the product counts.
_FREE = ["batch_size", "gradient_accumulation_steps", "checkpoint_every", "keep_checkpoints"]
_FREE += ["eval_every", "samples_every", "trackers"]
_FLUX_DEV = "black-forest-labs/FLUX.1-dev"
_SAVED = {"architectures", "dtype", "transformers_version"}  # what a save adds to a config


@dataclass(repr=False)
class DistillResult:
    """The outcome of a distillation; `print(result)` shows its numbers.

    Attributes:
        student: The one that was passed or made, trained: EMA weights, in its dtype, in eval mode.
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
        peak_memory_gib: The highest use of the main process's GPU, in GiB; None without CUDA.
    """

    student: SlimT5Encoder
    output_dir: Path | None = None
    report: GapReport | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    teacher_samples: int = 0
    student_samples: int = 0
    loss: float = math.nan
    gap: float | None = None
    peak_memory_gib: float | None = None

    def numbers(self) -> dict[str, Any]:
        """The numbers among the attributes, by name; None: not known."""
        left_out = ("student", "output_dir", "report", "history")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def add_history(self, learning_rate: float) -> dict[str, Any]:
        """Add an entry for an evaluation, by the names of docs/distill.md, and return it."""
        entry = self.numbers() | {"learning_rate": learning_rate}
        entry = {"step": entry.pop("steps"), "velocity_gap": entry.pop("gap"), **entry}
        if self.report is not None:
            entry["velocity_gap_low"], entry["velocity_gap_high"] = self.report.interval
            entry["velocity_gap_median"] = self.report.median
        self.history.append({name: value for name, value in entry.items() if value is not None})
        return self.history[-1]

    def __repr__(self) -> str:
        shown = {name: round(n, 5) for name, n in self.numbers().items() if n is not None}
        shown |= {"gap": self.report} if self.report else {}
        return "\n".join(f"{name:<15}  {value}" for name, value in shown.items())


def peak_memory_gib(device: torch.device) -> float | None:
    """The highest use of a GPU since `reset_peak_memory`, in GiB; None for other devices."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Forget the highest use so far: T5-XXL may have been loaded and freed again."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


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
    teacher = teacher_of(pipe)
    denoiser = next(iter(denoisers(pipe).values()), pipe)
    shape = {f"student.{k}": v for k, v in student.config.to_diff_dict().items() if k not in _SAVED}
    packages = ("torch", "diffusers", "transformers", "accelerate")
    facts = {
        "identity": {
            "pipeline_class": type(pipe).__name__,
            "pipeline_kwargs": pipeline_kwargs,
            "prompts_per_step": config.batch_size * config.gradient_accumulation_steps * processes,
            "prompts": prompts.facts(),
            "eval_prompts": eval_prompts and PromptSource(eval_prompts).facts(),
            **{f"config.{k}": v for k, v in vars(config).items() if k not in _FREE},
            **shape,
        },
        "pipeline": _named(pipe, denoiser.config.get("_name_or_path")),
        "teacher": _named(teacher, teacher.config.name_or_path),
        "config": vars(config),
        "denoiser_dtype": str(denoiser.dtype).removeprefix("torch."),
        "versions": {"t5slim": __version__} | {name: version(name) for name in packages},
    }
    try:
        return json.loads(json.dumps(facts, default=_content))
    except Exception as error:  # of the values' own classes
        raise DistillError(
            f"pipeline_kwargs: expected plain values, tensors, images or objects of them: {error!r}"
        ) from error


def check_output_dir(folder: Path, resume: bool, facts: Mapping[str, Any]) -> None:
    """Refuse a folder that holds a model, or something else than the run to be resumed."""
    path = folder / METADATA
    there = [file.name for file in (path, folder / "config.json") if file.exists()]
    if not there:
        return
    if not resume or METADATA not in there:
        raise DistillError(f"{folder} holds another run or model: resume=True, or a new folder.")
    try:
        then, now = read_json(path)["identity"], facts["identity"]
        differences = [
            f"{name}: then {json.dumps(then.get(name)):.100}, now {json.dumps(now.get(name)):.100}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
    except (AttributeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{path} isn't a whole file of a run ({error!r}): remove it.") from error
    if differences:
        raise DistillError(f"{folder} holds a run with other settings: {'; '.join(differences)}.")


def _content(value: Any) -> Any:
    """A value's content, or the SHA-256 of it, for `json.dumps`: the same in every process.

    Of a function or class, that is its name; so a lambda, or what is local to a function, has none.
    """
    match value:
        case Mapping():
            return dict(value)
        case Set():
            return sorted(json.dumps(item, default=_content) for item in value)
        case bytes() | bytearray():
            return f"{type(value).__name__} {hashlib.sha256(value).hexdigest()}"
        case torch.Tensor():
            return f"{tensor_sha256(value)} {value.dtype} {tuple(value.shape)}"
        case Image.Image():  # whatever file it is from
            palette, clear = bytes(value.getpalette(None) or ()), value.info.get("transparency")
            return value.mode, value.size, palette, clear, value.tobytes()
        case type() | FunctionType() if "<" not in value.__qualname__:
            return f"{value.__module__}.{value.__qualname__}"
    return value.__reduce_ex__(2)  # class and state, of which a copy would be made


def _named(module: Any, name_or_path: str | os.PathLike[str] | None) -> str:
    """A class, and the Hub id and commit that it was loaded from; a folder is nobody's business."""
    path = os.fspath(name_or_path or "").replace(os.sep, "/")
    name = type(module).__name__
    if found := re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})", path):
        return f"{name} of {found[1].replace('--', '/')} at {found[2]}"
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not os.path.exists(path)
    return f"{name} of {path}" if is_id else name


def write_run(folder: Path, facts: Mapping[str, Any], result: DistillResult) -> None:
    """Write `distillation.json` and `history.jsonl`."""
    content = json.dumps({**facts, "result": result.numbers()}, indent=2)
    write_atomic(folder / METADATA, content.encode())
    lines = "".join(json.dumps(entry) + "\n" for entry in result.history)
    write_atomic(folder / HISTORY, lines.encode())


def card_facts(
    facts: Mapping[str, Any], result: DistillResult, images: Sequence[str]
) -> dict[str, Any]:
    """The distillation's part of a `model_card`; `images` lie beside it."""
    metadata: dict[str, Any] = {}
    if f"of {_FLUX_DEV}" in facts["pipeline"]:  # whose licence covers what is derived from it
        metadata |= {"license": "other", "license_name": "flux-1-dev-non-commercial-license"}
        metadata["license_link"] = f"https://huggingface.co/{_FLUX_DEV}/blob/main/LICENSE.md"
    if result.gap is not None and math.isfinite(result.gap):
        prompts = f"{facts['identity']['eval_prompts']['prompts']} held-out prompts"
        gap = ("text-to-image", "prompts", prompts, "velocity-gap", round(result.gap, 5))
        metadata["eval_results"] = [EvalResult(*gap, metric_name="velocity gap")]
    content = json.dumps({**facts, "result": result.numbers()}, indent=2)
    shown = "\n\n".join(f"![{image}]({image})" for image in images)
    notes = f"""\
## Distillation

Distilled from the {facts["teacher"]} in a {facts["pipeline"]}.

Velocity gap (0: the teacher, 1: an empty prompt): {result.report or "not measured"}.

{shown}

```json
{content}
```
"""
    return {"notes": notes, "metadata": metadata}


def plot_run(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the gaps and the loss of a run over its updates into a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure  # type: ignore[import-not-found]

    steps = [entry["step"] for entry in history]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for title, axes in zip(("velocity_gap", "loss"), figure.subplots(1, 2), strict=True):
        axes.plot(steps, [entry.get(title, math.nan) for entry in history], marker=".")
        axes.set(title=title, xlabel="updates", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)


def image_grid(
    prompts: Sequence[str], columns: Mapping[str, Sequence[Image.Image]], cell: int = 256
) -> Image.Image:
    """An image grid with a line for each prompt, headed by it, and a column for each name.

    All images have one size; `cell` is the width of a column in pixels.
    """
    width, height = next(iter(columns.values()))[0].size
    size = (cell, round(cell * height / width))
    # Enlarged pixels stay pixels.
    how = Image.Resampling.NEAREST if width < cell else Image.Resampling.LANCZOS
    font, head, gap = ImageFont.load_default(14), 20, 48
    grid = Image.new("RGB", (len(columns) * cell, head + len(prompts) * (size[1] + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for c, name in enumerate(columns):
        draw.text((c * cell + 4, 4), textwrap.shorten(name, cell // 8), "black", font)
    for i, prompt in enumerate(prompts):
        top = head + (i + 1) * gap + i * size[1]
        lines = textwrap.wrap(prompt, len(columns) * cell // 8, max_lines=2)
        draw.text((4, top - 4), "\n".join(lines), "black", font, anchor="ld")
        for c, images in enumerate(columns.values()):
            grid.paste(images[i].convert("RGB").resize(size, how), (c * cell, top))
    return grid
