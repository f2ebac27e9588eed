"""Result of a comparison: a table, JSON, an image grid, and one HTML page."""

import base64
import io
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from PIL import Image

from ..distill.report import image_grid
from ..hub import atomic_save, local_path

TEACHER = "teacher"
LABELS = {
    "velocity_gap": "velocity gap (0: the teacher, 1: an empty prompt) ↓",
    "psnr": "PSNR to the teacher's image, dB ↑",
    "ssim": "SSIM to the teacher's image ↑",
    "parameters": "parameters",
    "weights_mib": "weights in memory, MiB ↓",
    "encode_ms": "encode a prompt, ms ↓",
    "peak_memory_gib": "peak memory while generating, GiB ↓",
}
# The other columns of the samples are their measures.
SAMPLE_KEYS = ("encoder", "seed", "prompt", "category", "image", "weight")


@dataclass(frozen=True, repr=False, eq=False)
class Comparison:
    """Images and measures of the same prompts and noise under the teacher and under students.

    It prints as a table, also in a notebook; `save` writes all of it.

    Attributes:
        samples: A row for each image, by seed, then encoder (the teacher first), then prompt. The
            columns are "encoder", "seed", "prompt", "category" (or None), "image" (PIL), "weight"
            (of its velocity gap in that of several prompts), and its measures; NaN: not known.
        runs: A row for each seed and encoder: "encoder", "gap_of_calls" (the velocity gap at each
            denoiser call that reads the prompt), "parameters", "weights_mib",
            "encode_ms", and "peak_memory_gib"; NaN: not known.
        facts: Conditions of the comparison.
    """

    samples: pd.DataFrame
    runs: pd.DataFrame
    facts: dict[str, Any]

    @property
    def measures(self) -> list[str]:
        """Names of the measures of single images: the gap, then distances, then the judge's."""
        return [name for name in self.samples if name not in SAMPLE_KEYS]

    @property
    def trajectories(self) -> dict[str, list[float]]:
        """By student, the velocity gap at each denoiser call, averaged over the seeds."""
        known = self.runs.dropna(subset="gap_of_calls").groupby("encoder", sort=False)
        return {name: np.mean([*gaps], axis=0).tolist() for name, gaps in known["gap_of_calls"]}

    def means(self, *by: str) -> pd.DataFrame:
        """Means of the measures as far as they are known, of the gap the ratio of the sums.

        Args:
            by: Columns of `samples` to group by beside the encoder, such as "category" or "seed".

        Returns:
            A row for each encoder (and value of `by`), a column for each measure; NaN: not known.
        """
        values = self.samples[self.measures]
        weights = values.notna().astype(float)
        weights["velocity_gap"] *= self.samples["weight"]
        keys = [self.samples[name] for name in ("encoder", *by)]
        sums = (values * weights).groupby(keys, sort=False).sum()
        return sums / weights.groupby(keys, sort=False).sum()

    def table(self) -> pd.DataFrame:
        """The table as text: a row for each measure, also by category, a column for each encoder.

        ± is the standard deviation over the prompts, of their means over the seeds.
        """
        cells = {"": self._cells()}
        if self.samples["category"].nunique() > 1:
            for category, part in self.samples.groupby("category", sort=False):
                cells[category] = replace(self, samples=part)._cells()
        rows = {(name, part): cells[part][name] for name in self.measures for part in cells}
        costs = self.runs.drop(columns=["encoder", "gap_of_calls"]).astype(float)
        costs = costs.groupby(self.runs["encoder"], sort=False).mean()
        rows |= {(name, ""): costs[name].map(_number) for name in LABELS if name in costs}
        table = pd.DataFrame(rows).T
        table.index = [f"  {part}" if part else LABELS.get(name, name) for name, part in rows]
        return table[(table != "").any(axis=1)]

    def _cells(self) -> pd.DataFrame:
        """Mean ± spread as text, like `means`."""
        spreads = self.means("prompt").groupby("encoder", sort=False).std()
        spreads = spreads.map(lambda spread: "" if math.isnan(spread) else f" ±{spread:.2g}")
        return self.means().map(_number) + spreads

    def __repr__(self) -> str:
        count = self.samples["prompt"].nunique()
        return f"{self.table().to_string()}\n\n±: standard deviation over {count} prompts."

    def _repr_html_(self) -> str:
        table = self.table().rename(index=lambda name: name.replace("  ", "↳ ", 1))
        return f"{table.to_html()}<p>{repr(self).splitlines()[-1]}</p>"

    def image_grid(self) -> Image.Image:
        """The images of the first seed: a column for each encoder, headed rows for the prompts."""
        first = self.samples[self.samples["seed"] == self.samples["seed"].iloc[0]]
        columns = {name: [*part] for name, part in first.groupby("encoder", sort=False)["image"]}
        return image_grid(first["prompt"].unique(), columns)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `comparison.json`, `.png` and `.html` into a folder; return the page."""
        content = {
            "facts": self.facts,
            "means": self.means().T.to_dict(),
            "runs": self.runs.to_dict("records"),
            "samples": self.samples.drop(columns="image").to_dict("records"),
        }
        # JSON has neither NaN nor infinity: null.
        content = json.loads(json.dumps(content, default=repr), parse_constant=lambda _: None)
        source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
        template = jinja2.Template(source, autoescape=True, undefined=jinja2.StrictUndefined)
        page = template.render(comparison=self, inline=_inline)
        with atomic_save(folder) as saved:
            Path(saved, "comparison.json").write_text(json.dumps(content, indent=1), "utf-8")
            Path(saved, "comparison.html").write_text(page, "utf-8")
            self.image_grid().save(Path(saved, "comparison.png"))
        return Path(local_path(folder), "comparison.html")


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if value.is_integer() else f"{value:.4g}"


def _inline(image: Image.Image) -> str:
    """The image as a `data:` URL: lossless if it is tiny, a JPEG otherwise."""
    image = image.convert("RGB")
    kind = "png" if max(image.size) <= 128 else "jpeg"
    image.thumbnail((384, 384))
    content = io.BytesIO()
    image.save(content, kind)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
