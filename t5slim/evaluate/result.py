"""Result of a comparison: a table, JSON, CSV, an image grid, and one HTML page."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import stdev
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from ..distill.report import image_grid

TEACHER = "teacher"
LABELS = {
    "velocity_gap": "velocity gap (0: the teacher, 1: an empty prompt) ↓",
    "psnr": "PSNR to the teacher's image, dB ↑",
    "ssim": "SSIM to the teacher's image ↑",
    "own_tokens": "velocity gap of the prompts' own tokens ↓",
    "padding": "velocity gap of the padding ↓",
    "spread": "spread between prompts (1: the teacher's)",
    "parameters": "parameters",
    "weights_mib": "weights in memory, MiB ↓",
    "encode_ms": "encode a prompt, ms ↓",
    "peak_memory_gib": "peak memory while generating, GiB ↓",
}


# The other keys of a sample are its measures.
SAMPLE_KEYS = ("encoder", "seed", "prompt", "category", "weight", "image")


class Mean(NamedTuple):
    """Mean of a measure over prompts and seeds, of the velocity gap the ratio of the sums; and the
    standard deviations over the prompts and over the seeds, NaN for a single one.
    """

    value: float
    over_prompts: float
    over_seeds: float

    def __str__(self) -> str:
        spread = "" if math.isnan(self.over_prompts) else f" ±{self.over_prompts:.2g}"
        return f"{self.value:.4g}{spread}"


@dataclass(frozen=True)
class Comparison:
    """Images and measures of the same prompts and noise under the teacher and under students.

    `print` shows a table, a notebook the table and some images; `save` writes all of it.

    Attributes:
        samples: one for each image, by seed, then encoder, then prompt: its encoder, seed, prompt,
            category (or None) and image; its measures by name, as far as they are known (of the
            teacher only the judge's); and the weight of its gap in that of several prompts.
        overall: measures over all prompts, by encoder (the teacher first) and name.
        trajectories: by student, the velocity gap at each denoiser call that reads the prompt.
        facts: conditions of the comparison.
    """

    samples: list[dict[str, Any]] = field(repr=False)
    overall: dict[str, dict[str, float]] = field(repr=False)
    trajectories: dict[str, list[float]] = field(repr=False)
    facts: dict[str, Any]

    @property
    def prompts(self) -> list[str]:
        """The prompts, each once."""
        return list(dict.fromkeys(sample["prompt"] for sample in self.samples))

    @property
    def categories(self) -> list[str]:
        """The categories of the prompts, each once."""
        found = dict.fromkeys(sample["category"] for sample in self.samples)
        return [category for category in found if category is not None]

    @property
    def measures(self) -> list[str]:
        """Names of the measures of single images: the gap, then distances, then the judge's."""
        # The students' first: the teacher has neither gap nor distances.
        ordered = sorted(self.samples, key=lambda sample: sample["encoder"] == TEACHER)
        names = dict.fromkeys(name for sample in ordered for name in sample)
        return [name for name in names if name not in SAMPLE_KEYS]

    def mean(self, encoder: str, measure: str, category: str | None = None) -> Mean | None:
        """Mean of a measure over all prompts or those of a category; None if it isn't known."""

        def average(samples: list[dict[str, Any]]) -> float:
            weights = [s["weight"] if measure == "velocity_gap" else 1.0 for s in samples]
            return float(np.average([s[measure] for s in samples], weights=weights))

        def spread(key: str) -> float:
            groups = defaultdict(list)
            for sample in known:
                groups[sample[key]].append(sample)
            finite = [mean for mean in map(average, groups.values()) if math.isfinite(mean)]
            return stdev(finite) if len(finite) > 1 else math.nan

        known = [s for s in self.samples if s["encoder"] == encoder and measure in s]
        known = [s for s in known if category in (None, s["category"])]
        return Mean(average(known), spread("prompt"), spread("seed")) if known else None

    def table(self) -> list[list[str]]:
        """Cells of the table: a row for each measure, a column for each encoder, with headings."""
        rows = [["", *self.overall]]
        categories = self.categories if len(self.categories) > 1 else []
        for measure in self.measures:
            for category in (None, *categories):
                means = [self.mean(encoder, measure, category) for encoder in self.overall]
                label = LABELS.get(measure, measure) if category is None else f"  {category}"
                rows.append([label, *(str(mean or "") for mean in means)])
        for name, label in LABELS.items():
            rows.append([label, *(_cell(overall.get(name)) for overall in self.overall.values())])
        return [row for row in rows if any(row[1:])]

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for label, *cells in rows:
            aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([f"{label:<{widths[0]}}", *aligned]).rstrip())
        return "\n".join([*lines, "", f"±: standard deviation over {len(self.prompts)} prompts."])

    def _repr_html_(self) -> str:
        grid = _inline(self.image_grid(limit=4), max_side=2048)
        return f'<pre>{html.escape(str(self))}</pre><img src="{grid}">'

    def image_grid(self, limit: int | None = None) -> Image.Image:
        """The images of the first seed, of up to `limit` prompts: a column for each encoder."""
        step = 1 if limit is None else -(-len(self.prompts) // limit)
        columns: dict[str, list[Image.Image]] = {encoder: [] for encoder in self.overall}
        for sample in self.samples:
            if sample["seed"] == self.samples[0]["seed"]:
                columns[sample["encoder"]].append(sample["image"])
        return image_grid(self.prompts[::step], {e: all[::step] for e, all in columns.items()})

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain values for JSON; None for those that aren't finite."""
        means = {
            encoder: {m: mean._asdict() for m in self.measures if (mean := self.mean(encoder, m))}
            for encoder in self.overall
        }
        content = vars(self) | {"means": means, "samples": self._records()}
        return json.loads(json.dumps(content, default=repr), parse_constant=lambda _: None)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `comparison.json`, `.csv`, `.png` and `.html` into a folder; return the page."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        numbers = json.dumps(self.to_dict(), indent=1)
        (folder / "comparison.json").write_text(numbers, encoding="utf-8")
        self.image_grid().save(folder / "comparison.png")
        with (folder / "comparison.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*SAMPLE_KEYS[:-1], *self.measures])
            writer.writeheader()
            writer.writerows({k: _no_formula(v) for k, v in r.items()} for r in self._records())
        source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        groups = defaultdict(list)
        for sample in self.samples:
            groups[sample["seed"], sample["prompt"]].append(sample)
        page = environment.from_string(source).render(
            comparison=self, groups=list(groups.values()), inline=_inline
        )
        (folder / "comparison.html").write_text(page, encoding="utf-8")
        return folder / "comparison.html"

    def _records(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in s.items() if k != "image"} for s in self.samples]


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value.is_integer() else f"{value:.4g}"


def _no_formula(cell: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    formula = isinstance(cell, str) and cell.lstrip().startswith(("=", "+", "-", "@"))
    return f"'{cell}" if formula else cell


def _inline(image: Image.Image, max_side: int = 384) -> str:
    """The image as a `data:` URL: lossless if it is tiny, a JPEG otherwise."""
    image = image.convert("RGB")
    kind = "png" if max(image.size) <= 128 else "jpeg"
    image.thumbnail((max_side, max_side))
    content = io.BytesIO()
    image.save(content, kind)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
