"""What a finished run leaves for its readers: a plot, and its part of the model card."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from .result import DistillResult

logger = logging.getLogger(__name__)

_PANELS: dict[str, dict[str, str]] = {
    "velocity gap": {
        "velocity_gap": "averaged weights", "velocity_gap_raw": "last weights",
    },
    "velocity gap by third of the trajectory": {
        "velocity_gap_first_third": "first", "velocity_gap_middle_third": "middle",
        "velocity_gap_last_third": "last",
    },
    "spread between prompts, over the teacher's": {"embedding_spread": ""},
    "loss": {"loss": ""},
    "gradient norm": {"grad_norm_mean": "mean", "grad_norm_max": "highest"},
    "prompts per second": {"prompts_per_second": ""},
}  # fmt: skip
_LINEAR = ("embedding_spread", "prompts_per_second")


def plot_run(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Plot the course of a run, panel by panel over its updates, into a PNG.

    Returns:
        False, with a line in the log, if matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found]
    except ImportError:
        logger.warning("There is no plot of the run, which needs: pip install 't5slim[train]'")
        return False
    shown = [
        (title, {key: label for key, label in lines.items() if any(key in e for e in history)})
        for title, lines in _PANELS.items()
    ]
    shown = [(title, lines) for title, lines in shown if lines]
    columns = 3
    figure = Figure(figsize=(5 * columns, 3.5 * -(-len(shown) // columns)), layout="constrained")
    for i, (title, lines) in enumerate(shown):
        axes = figure.add_subplot(-(-len(shown) // columns), columns, i + 1)
        for key, label in lines.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            axes.plot(*zip(*points, strict=True), label=label, marker="." * (len(points) < 30))
        axes.set(title=title, xlabel="updates")
        axes.locator_params(axis="x", integer=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if "embedding_spread" in lines:
            axes.axhline(1, color="gray", linestyle="--")
        if lines.keys() & set(_LINEAR):
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            lowest, highest = axes.get_ylim()
            labelled = "123456789" if highest < 4 * lowest else "25"
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(_label_of(labelled))
        axes.grid(alpha=0.3, which="both")
        if len(lines) > 1:
            axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    write_whole(path, content.getvalue())
    return True


def describe_run(
    facts: Mapping[str, Any], result: DistillResult, pictures: Mapping[str, str]
) -> str:
    """What was measured of a run and what it was made of, in Markdown for the model card.

    Args:
        facts: from `run_facts`.
        result: its outcome.
        pictures: files beside the card, by what they show.
    """
    rows: dict[str, str] = {}
    for i, one in enumerate(facts["pipelines"], start=1):
        number = f" {i}" if len(facts["pipelines"]) > 1 else ""
        called = ", ".join(f"{name}={value!r}" for name, value in one["pipeline_kwargs"].items())
        rows |= {
            f"pipeline{number}": f"{one['pipeline']}{_source(one['pipeline_source'])}",
            f"teacher{number}": f"{one['teacher']}{_source(one['teacher_source'])}",
            f"called with{number}": called or "its defaults",
        }
    rows |= {
        "prompts": _prompts(facts["prompts"]),
        "held-out prompts": _prompts(facts["eval_prompts"]),
        "prompts to an update": str(facts["prompts_per_update"]),
        **{name.strip(): value for name, value in result.rows()},
        "hardware": facts["hardware"],
        "versions": ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    settings = json.dumps(facts["config"], indent=2)
    shown = "".join(f"![{name}]({file})\n\n" for name, file in pictures.items())
    return f"""\
## Distillation

| | |
|---|---|
{table}

The [velocity gap](https://pypi.org/project/t5slim) is how far the denoiser's predictions move from
those under the teacher, over how far they move under an empty prompt: 0 for the teacher, 1 for no
prompt at all.

{shown}<details><summary>Settings</summary>

```json
{settings}
```

</details>
"""


def _source(source: Mapping[str, Any]) -> str:
    if source["name"] is None:
        return ""
    revision = f" at {source['revision']}" if source["revision"] else ""
    return f" of [{source['name']}](https://huggingface.co/{source['name']}){revision}"


def _prompts(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "none"
    what = f"{facts['prompts']:,}" if facts["kind"] == "list" else f"a {facts['kind']}"
    return f"{what}, SHA-256 {facts['sha256']}"


def _label_of(digits: str) -> Callable[[float, float], str]:
    """Labels the minor ticks whose first digit is one of `digits`."""

    def label(y: float, _: float) -> str:
        return f"{y:.2g}" if f"{y:e}"[0] in digits else ""

    return label
