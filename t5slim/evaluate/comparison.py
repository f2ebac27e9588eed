"""What a comparison measured: its numbers and pictures, and the forms in which they are shown."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..distill.samples import side_by_side
from ..files import write_whole
from .page import page

TEACHER = "teacher"
# What is known by name; whatever else there is comes from the user's own functions.
NAMES = {
    "velocity_gap": "velocity gap (0: the teacher, 1: an empty prompt) ↓",
    "psnr": "PSNR to the teacher's picture, dB ↑",
    "ssim": "SSIM to the teacher's picture ↑",
    "real_tokens": "velocity gap of the prompts' own tokens ↓",
    "padding": "velocity gap of the padding ↓",
    "spread": "spread between prompts (1: the teacher's)",
    "nearest_other": "distance to the nearest other prompt (1: the teacher's)",
    "parameters": "parameters",
    "weights_mib": "weights in memory, MiB ↓",
    "disk_mib": "weights on disk, MiB ↓",
    "load_s": "load, s ↓",
    "encode_ms": "encode a prompt, ms ↓",
    "peak_memory_gib": "peak memory while painting, GiB ↓",
}


@dataclass(frozen=True)
class Unit:
    """What was measured of one encoder from the noise of one seed.

    Attributes:
        encoder: its name.
        seed: of the noise.
        prompts: for each prompt, measures by name; of a student, also `distance` and `denominator`,
            whose ratio is its velocity gap.
        calls: for each call of the denoiser, these two, summed over the prompts.
        of_all: measures of all prompts together.
        costs: of the encoder.
    """

    encoder: str
    seed: int
    prompts: list[dict[str, float]]
    calls: list[list[float]] = field(default_factory=list)
    of_all: dict[str, float | None] = field(default_factory=dict)
    costs: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Mean:
    """A measure, and how far it spreads.

    Attributes:
        value: the mean over prompts and seeds; of the velocity gap, the ratio of the sums.
        over_prompts: the standard deviation between prompts.
        over_seeds: between seeds; NaN for a single one.
    """

    value: float
    over_prompts: float
    over_seeds: float

    def __str__(self) -> str:
        spread = "" if math.isnan(self.over_prompts) else f" ±{self.over_prompts:.2g}"
        return f"{self.value:.4g}{spread}"


@dataclass(frozen=True)
class Comparison:
    """The same prompts and noise under the teacher and under students.

    `print` shows a table, a notebook the table and some pictures, and `save` writes all of it.

    Attributes:
        prompts: P of them.
        categories: of each; None where there are none.
        units: of each encoder and seed, the teacher's first.
        images: for each encoder and seed, P pictures.
        facts: how it was measured.
    """

    prompts: list[str]
    categories: list[str | None]
    units: list[Unit]
    images: Mapping[tuple[str, int], Sequence[Image.Image]] = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def encoders(self) -> list[str]:
        """Their names, the teacher's first."""
        return list(dict.fromkeys(unit.encoder for unit in self.units))

    @property
    def seeds(self) -> list[int]:
        """Those of the noise."""
        return list(dict.fromkeys(unit.seed for unit in self.units))

    @property
    def measures(self) -> list[str]:
        """Names of what was measured for each prompt."""
        found = {"velocity_gap": None} | {
            name: None for unit in self.units for values in unit.prompts for name in values
        }
        return [name for name in found if name not in ("distance", "denominator")]

    def mean(self, encoder: str, measure: str, category: str | None = None) -> Mean | None:
        """A measure of an encoder over all prompts, or those of a category; None if it has none."""
        parts, wholes = self._ratios(encoder, measure)
        if category is not None:
            chosen = torch.tensor([c == category for c in self.categories])
            parts, wholes = parts[:, chosen], wholes[:, chosen]
        if not wholes.sum() > 0:
            return None
        between_prompts = parts.sum(0) / wholes.sum(0)
        between_seeds = parts.sum(1) / wholes.sum(1)
        return Mean((parts.sum() / wholes.sum()).item(), _std(between_prompts), _std(between_seeds))

    def of_calls(self, encoder: str) -> list[float]:
        """The velocity gap of a student at each denoiser call, in the order of the trajectory."""
        units = [unit for unit in self.units if unit.encoder == encoder]
        sums = torch.tensor([unit.calls for unit in units], dtype=torch.float64).sum(0)
        return [d / whole for d, whole in sums.tolist() if whole > 0] if len(sums) else []

    def of_all(self, encoder: str) -> dict[str, float]:
        """What was measured of all prompts together, as a mean over seeds, and the costs."""
        units = [unit for unit in self.units if unit.encoder == encoder]
        values = {
            name: [unit.of_all[name] for unit in units if unit.of_all.get(name) is not None]
            for name in units[0].of_all
        }
        means = {name: sum(found) / len(found) for name, found in values.items() if found}  # type: ignore[arg-type]
        return means | {name: cost for name, cost in units[0].costs.items() if cost is not None}

    def _ratios(self, encoder: str, measure: str) -> tuple[Tensor, Tensor]:
        """(S, P) twice: the ratio of their sums is the measure."""
        parts, wholes = [], []
        for unit in self.units:
            if unit.encoder == encoder:
                if measure == "velocity_gap":
                    parts.append([v.get("distance", 0.0) for v in unit.prompts])
                    wholes.append([v.get("denominator", 0.0) for v in unit.prompts])
                else:
                    parts.append([v.get(measure, 0.0) for v in unit.prompts])
                    wholes.append([float(measure in v) for v in unit.prompts])
        return torch.tensor(parts, dtype=torch.float64), torch.tensor(wholes, dtype=torch.float64)

    # --- as a table ---

    def rows(self) -> list[list[str]]:
        """A table: what is measured, then the value of each encoder; headed by their names."""
        rows = [["", *self.encoders]]
        categories = list(dict.fromkeys(c for c in self.categories if c is not None))
        for measure in self.measures:
            rows.append([NAMES.get(measure, measure), *self._means(measure, None)])
            if len(categories) > 1:
                rows += [[f"  {c}", *self._means(measure, c)] for c in categories]
        of_all = [self.of_all(encoder) for encoder in self.encoders]
        for name in dict.fromkeys(name for values in of_all for name in values):
            shown = (_short(values.get(name)) for values in of_all)
            rows.append([NAMES.get(name, name), *shown])
        return [row for row in rows if any(row[1:])]

    def _means(self, measure: str, category: str | None) -> list[str]:
        means = (self.mean(encoder, measure, category) for encoder in self.encoders)
        return ["" if mean is None else str(mean) for mean in means]

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *values in rows:
            cells = (f"{v:>{w}}" for v, w in zip(values, widths[1:], strict=True))
            lines.append(f"{name:<{widths[0]}}  {'  '.join(cells)}".rstrip())
        seeds = f", each from {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        note = f"±: standard deviation over the {len(self.prompts)} prompts{seeds}."
        return "\n".join([*lines, "", note])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _repr_png_(self) -> bytes:
        return png(self.sheet(limit=4))

    # --- as pictures ---

    def sheet(self, limit: int | None = None) -> Image.Image:
        """A row for each prompt, and a column for each encoder, from the noise of the first seed.

        Args:
            limit: prompts at most, spread evenly over all of them.
        """
        count = len(self.prompts)
        step = 1 if limit is None else max(1, -(-count // limit))
        shown = list(range(0, count, step))
        seed = self.seeds[0]
        columns = {e: [self.images[e, seed][i] for i in shown] for e in self.encoders}
        return side_by_side([self.prompts[i] for i in shown], columns)

    # --- as files ---

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as plain values for JSON; those that aren't finite are None."""
        means = {
            encoder: {
                measure: asdict(mean)
                for measure in self.measures
                if (mean := self.mean(encoder, measure)) is not None
            }
            for encoder in self.encoders
        }
        content = {
            "facts": self.facts,
            "prompts": self.prompts,
            "categories": self.categories,
            "means": means,
            "of_all": {encoder: self.of_all(encoder) for encoder in self.encoders},
            "of_calls": {encoder: self.of_calls(encoder) for encoder in self.encoders},
            "prompt_by_prompt": self.records(),
        }
        return _finite(content)

    def records(self) -> list[dict[str, Any]]:
        """One for each encoder, seed and prompt."""
        records = []
        for unit in self.units:
            for i, values in enumerate(unit.prompts):
                known = {k: v for k, v in values.items() if k not in ("distance", "denominator")}
                if values.get("denominator"):
                    known = {"velocity_gap": values["distance"] / values["denominator"]} | known
                place = {"encoder": unit.encoder, "seed": unit.seed, "prompt": self.prompts[i]}
                records.append(place | {"category": self.categories[i]} | known)
        return records

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `comparison.json`, `.csv`, `.png` and `.html`, which is one page with everything.

        Args:
            folder: where to; it is made, if it isn't there.

        Returns:
            The path of the page.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "comparison.json", json.dumps(self.to_dict(), indent=1).encode())
        records = self.records()
        fields = list(dict.fromkeys(name for record in records for name in record))
        table = io.StringIO()
        writer = csv.DictWriter(table, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        write_whole(folder / "comparison.csv", table.getvalue().encode())
        write_whole(folder / "comparison.png", png(self.sheet()))
        write_whole(folder / "comparison.html", page(self).encode())
        return folder / "comparison.html"


def _std(values: Tensor) -> float:
    """Of those that are known; NaN for less than two."""
    known = values[values.isfinite()]
    return known.std().item() if len(known) > 1 else math.nan


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def png(picture: Image.Image) -> bytes:
    """The picture as a file."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()
