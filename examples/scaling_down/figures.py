"""Tables and figures of the scaling-down study, from the results of `study.py`.

python examples/scaling_down/figures.py --out examples/scaling_down    # of the committed results
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
from torchmetrics.functional import spearman_corrcoef

sys.path.insert(0, str(Path(__file__).parents[1]))
from scaling_down.measuring import TOKENS
from scaling_down.study import CONTROLS, COSTS, MIDDLE, OBJECTIVES, SIZES, SMALLEST
from shapes_world.world import CRITERIA

Record = dict[str, Any]
Point = dict[str, float]
COMMITTED = Path(__file__).with_name("results.jsonl")
# In the committed results.
FORMER_NAMES = {
    "rows": "tokens", "gap_of_rows": "gap_of_tokens", "error_of_rows": "error_of_tokens",
}  # fmt: skip
VELOCITY, EMBEDDING, LONGER, BOTH = OBJECTIVES
COLORS = {VELOCITY: "tab:blue", EMBEDDING: "tab:orange", LONGER: "tab:red", BOTH: "tab:green"}
SKILLS = {"quality": "quality", "semantics": "semantics", "text": "words", "letters": "letters"}


def main() -> None:
    """Print the tables in Markdown, and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=COMMITTED)
    parser.add_argument("--out", type=Path, help="a folder for the figures")
    args = parser.parse_args()
    results = Results(args.results)
    tables = {
        "Size and objective": sizes_table,
        "At equal cost": costs_table,
        "Seconds of an update": prices_table,
        "Where the error is": tokens_table,
        "Tokens that are matched": matched_table,
        "Idle text": chatter_table,
        "Captions of one kind": kinds_table,
        "The gap and the images": ranks_table,
    }
    for heading, table in tables.items():
        rows = table(results)
        print(f"\n### {heading}\n\n{markdown(rows) if len(rows) > 1 else 'No runs yet.'}")
    if args.out:
        for name, draw in (("sizes", draw_sizes), ("curves", draw_curves), ("rank", draw_rank)):
            draw(results).savefig(args.out / f"scaling-{name}.png", dpi=90)


class Results:
    """The students' records; those of the teacher and of the table without context; and what an
    update of each size costs, in seconds of the machine that was measured first."""

    def __init__(self, path: Path) -> None:
        records = [renamed(json.loads(line)) for line in path.read_text().splitlines()]
        self.students: list[Record] = [r for r in records if r["group"] not in (CONTROLS, COSTS)]
        controls = {r["objective"]: r for r in records if r["group"] == CONTROLS}
        self.teacher, self.contextless = controls["teacher"], controls["contextless"]
        self.costs = {r["size"]: r for r in reversed(records) if r["group"] == COSTS}

    def of(self, **wanted: Any) -> list[Record]:
        """Those of one kind: a size, an objective, ..."""
        wanted = {"kind": "all", "chatter": 0.5, "tokens": "all"} | wanted
        return [r for r in self.students if all(r[key] == v for key, v in wanted.items())]

    def cells(self) -> Iterator[tuple[str, str, list[Record]]]:
        """The seeds of each size and objective."""
        for size in SIZES:
            for objective in OBJECTIVES:
                if found := self.of(size=size, objective=objective):
                    yield size, objective, found

    def seconds(self, record: Record, point: Point) -> float:
        """The cost of a point of a student's curve, at the price of updates measured alone."""
        embedding = max((p["updates"] for p in record["curve"] if not p["passes"]), default=0)
        first, price = min(point["updates"], embedding), self.costs[record["size"]]
        return first * price[EMBEDDING] + (point["updates"] - first) * price[VELOCITY]


def renamed(record: Record) -> Record:
    """A record with the names of today."""
    return {FORMER_NAMES.get(name, name): value for name, value in record.items()}


# --- tables ---


def sizes_table(results: Results) -> list[list[str]]:
    rows = [["size", "learned from", "velocity gap", *SKILLS.values(), "spread"]]
    for size, objective, found in results.cells():
        rows.append([size, objective, *outcome(found)])
    teacher, table = results.teacher, results.contextless
    part = f"1/{teacher['parameters'] / table['parameters']:.0f}"
    rows.append([part, "(contextless)", *outcome([table])])
    rows.append(["1", "(teacher)", "0", *(percent([teacher], skill) for skill in SKILLS), "1"])
    return rows


def outcome(found: Sequence[Record]) -> list[str]:
    return [
        over(found, gap),
        *(percent(found, skill) for skill in SKILLS),
        over(found, lambda r: r["spread"]),
    ]


def costs_table(results: Results) -> list[list[str]]:
    """Gaps on the captions with which the runs were followed, each with what it had cost."""
    by_then = f"{EMBEDDING} by then"
    heads = [f"updates: {VELOCITY}", by_then, f"passes: {VELOCITY}", BOTH]
    heads += [f"seconds: {VELOCITY}", by_then, f"seconds: {BOTH}", by_then]
    rows = [["size", *heads, *(f"{objective} in the end" for objective in (EMBEDDING, LONGER))]]
    for size in SIZES:
        of_size = [results.of(size=size, objective=objective) for objective in OBJECTIVES]
        velocity, embedding, longer, both = of_size
        if not (velocity and embedding and both):
            continue
        cells = []
        for cost, first, second in (
            (updates, velocity, embedding),
            (passes, velocity, both),
            (results.seconds, velocity, embedding),
            (results.seconds, both, embedding),
        ):
            limit = cost(first[0], first[0]["curve"][-1])
            cells += [costly(found, cost, limit) for found in (first, second)]
        cells.append(costly(embedding, results.seconds))
        rows.append([size, *cells, costly(longer, results.seconds) if longer else ""])
    return rows


def updates(_: Record, point: Point) -> float:
    return point["updates"]


def passes(_: Record, point: Point) -> float:
    return point["passes"]


def costly(
    found: Sequence[Record], cost: Callable[[Record, Point], float], limit: float = math.inf
) -> str:
    """The mean gap at the last point of the curves within a limit, and what it had cost."""
    points = [[p for p in record["curve"] if cost(record, p) <= limit][-1] for record in found]
    mean = sum(point["gap"] for point in points) / len(points)
    return f"{mean:.3g} ({cost(found[0], points[0]):,.0f})"


def prices_table(results: Results) -> list[list[str]]:
    terms = EMBEDDING, VELOCITY
    rows = [["size", "device", *(f"seconds of an update: {term}" for term in terms)]]
    for cost in (results.costs[size] for size in SIZES if size in results.costs):
        rows.append([cost["size"], cost["device"], *(f"{cost[term]:.3f}" for term in terms)])
    return rows


def tokens_table(results: Results) -> list[list[str]]:
    head = [f"{what} of {kind} tokens" for what in ("error", "gap") for kind in TOKENS]
    rows = [["size", "objective", *head]]
    for size, objective, found in results.cells():
        values = [
            over(found, lambda r, what=what, kind=kind: r[what][kind])
            for what in ("error_of_tokens", "gap_of_tokens")
            for kind in TOKENS
        ]
        rows.append([size, objective, *values])
    return rows


def matched_table(results: Results) -> list[list[str]]:
    """Of students whose embeddings were matched for some tokens only."""
    runs = {tokens: {"tokens": tokens} for tokens in ("all", "visual+idle", "visual")}
    return smallest_table(
        results, "tokens", runs, "gap_of_tokens", {f"{kind} tokens": kind for kind in TOKENS}
    )


def chatter_table(results: Results) -> list[list[str]]:
    """Of students with more or less idle text beside their captions in training."""
    runs = {f"{share:.0%}": {"chatter": share} for share in (0.0, 0.5, 1.0)}
    parts = {f"captions {part}": part for part in ("alone", "with a sentence")}
    return smallest_table(results, "idle text beside", runs, "gap_of", parts)


def smallest_table(
    results: Results,
    what: str,
    runs: dict[str, dict[str, Any]],
    gaps_of: str,
    parts: dict[str, str],
) -> list[list[str]]:
    """Of the smallest students, what differs between them in the first column; with the gaps of
    some parts of what they are measured on."""
    heads = [what, "learned from", "gap", *(f"gap of {part}" for part in parts)]
    kinds = TOKENS[:2]  # of the caption, and of the idle sentence
    rows = [[*heads, *(f"error of {kind} tokens" for kind in kinds), *SKILLS.values()]]
    for name, wanted in runs.items():
        for objective in (EMBEDDING, BOTH):
            if found := results.of(size=SMALLEST, objective=objective, **wanted):
                gaps = [over(found, lambda r, key=key: r[gaps_of][key]) for key in parts.values()]
                errors = [
                    over(found, lambda r, kind=kind: r["error_of_tokens"][kind]) for kind in kinds
                ]
                right = [percent(found, skill) for skill in SKILLS]
                rows.append([name, objective, over(found, gap), *gaps, *errors, *right])
    return rows


def kinds_table(results: Results) -> list[list[str]]:
    rows = [["captions", *SKILLS.values(), *(f"gap of {criterion}" for criterion in CRITERIA)]]
    for kind in (*CRITERIA, "all"):
        if found := results.of(kind=kind, size=MIDDLE, objective=BOTH):
            gaps = [over(found, lambda r, c=criterion: r["gap_of"][c]) for criterion in CRITERIA]
            rows.append([kind, *(percent(found, skill) for skill in SKILLS), *gaps])
    return rows


def ranks_table(results: Results) -> list[list[str]]:
    kinds = "the gap", "the gap of such captions"
    heads = [head for kind in kinds for head in (f"rank correlation with {kind}", "95% interval")]
    rows = [["images right in", "students", *heads]]
    for skill, name in (*SKILLS.items(), (None, "all criteria")):
        cells = [name, str(len(results.students))]
        for of in (None, skill) if skill else (None,):
            rank, low, high = rank_correlation(results.students, skill, of)
            cells += [f"{rank:.3f}", f"{low:.3f} to {high:.3f}"]
        rows.append(cells + [""] * (len(rows[0]) - len(cells)))
    return rows


def rank_correlation(
    students: Sequence[Record], skill: str | None, of: str | None
) -> tuple[float, float, float]:
    """Spearman's of accuracy in a skill and the gap of the captions of one, and its interval, from
    groups drawn again with return: students with the same start aren't independent."""
    gaps = torch.tensor([gap(r, of) for r in students], dtype=torch.float64)
    right = torch.tensor([accuracy(r, skill) for r in students], dtype=torch.float64)
    groups: dict[str, list[int]] = {}
    for i, student in enumerate(students):
        groups.setdefault(student["group"], []).append(i)
    generator, members = torch.Generator().manual_seed(0), list(groups.values())
    drawn = []
    for _ in range(1000):
        chosen = torch.randint(len(members), (len(members),), generator=generator).tolist()
        index = [i for group in chosen for i in members[group]]
        drawn.append(spearman_corrcoef(gaps[index], right[index]))
    ranks = torch.stack(drawn)
    low, high = ranks.nanquantile(ranks.new_tensor([0.025, 0.975]))
    return spearman_corrcoef(gaps, right).item(), low.item(), high.item()


def gap(record: Record, skill: str | None = None) -> float:
    """Of all captions; or of those that a skill is judged by."""
    if skill is None:
        return record["gap"]
    return record["gap_of"]["text" if skill == "letters" else skill]


def accuracy(record: Record, skill: str | None) -> float:
    """The share of right images in a skill; or in all three criteria."""
    if skill is None:
        return sum(record["right"][criterion] for criterion in CRITERIA) / len(CRITERIA)
    return record["right"][skill]


def over(records: Sequence[Record], value: Callable[[Record], float]) -> str:
    """The mean over the seeds, and from where to where they go."""
    values = [value(record) for record in records]
    mean = f"{sum(values) / len(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3g} to {max(values):.3g})"


def percent(records: Sequence[Record], skill: str) -> str:
    return f"{sum(accuracy(r, skill) for r in records) / len(records):.0%}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- figures ---


def draw_sizes(results: Results) -> Figure:
    """The gap and the images against the students' size."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplot_mosaic(
        [["gap", "quality", "semantics"], ["gap", "text", "letters"]], width_ratios=[1.5, 1, 1]
    )
    against_size(axes["gap"], results, gap, "velocity gap")
    logarithmic(axes["gap"], "y")
    axes["gap"].legend()
    for skill, name in SKILLS.items():
        against_size(axes[skill], results, lambda r, s=skill: r["right"][s], f"{name} right")
        axes[skill].set(ylim=(-0.03, 1.03))
        axes[skill].yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def against_size(axes: Axes, results: Results, value: Callable[[Record], float], name: str) -> None:
    teacher = results.teacher["parameters"]
    for objective, color in COLORS.items():
        cells = [found for _, o, found in results.cells() if o == objective]
        sizes = [found[0]["parameters"] / teacher for found in cells]
        means = [sum(map(value, found)) / len(found) for found in cells]
        axes.plot(sizes, means, color=color, label=objective)
        for size, found in zip(sizes, cells, strict=True):
            axes.scatter([size] * len(found), list(map(value, found)), color=color, s=14)
    axes.axhline(value(results.contextless), color="gray", linestyle="--", label="contextless")
    axes.set(xscale="log", xlabel="part of the teacher's parameters", title=name)
    ticks = {size: found[0]["parameters"] / teacher for size, _, found in results.cells()}
    axes.set_xticks(list(ticks.values()), list(ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def draw_curves(results: Results) -> Figure:
    """The gap against seconds, of each size."""
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    every = figure.subplots(1, len(SIZES), sharey=True)
    for axes, size in zip(every, SIZES, strict=True):
        for objective, color in COLORS.items():
            for record in results.of(size=size, objective=objective):
                points = [(results.seconds(record, p), p["gap"]) for p in record["curve"]]
                label = objective if record["seed"] == 0 else None
                axes.plot(*zip(*points, strict=True), color=color, label=label, marker=".")
        axes.set(xlabel="seconds", title=f"{size} of the teacher")
        logarithmic(axes, "y")
        axes.grid(alpha=0.3, which="both")
    every[0].set(ylabel="velocity gap")
    max(every, key=lambda axes: len(axes.lines)).legend()  # where all objectives are
    return figure


def draw_rank(results: Results) -> Figure:
    """Images right against the gap, of all students."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    every = figure.subplots(1, len(SKILLS), sharey=True)
    for axes, (skill, name) in zip(every, SKILLS.items(), strict=True):
        for objective, color in COLORS.items():
            found = [r for r in results.students if r["objective"] == objective]
            right = [accuracy(r, skill) for r in found]
            gaps = [gap(r, skill) for r in found]
            axes.scatter(gaps, right, color=color, label=objective, s=18)
        rank, low, high = rank_correlation(results.students, skill, skill)
        axes.set_title(f"{name}: rank correlation {rank:.2f} ({low:.2f} to {high:.2f})", size=9)
        axes.set(xlabel="velocity gap of such captions")
        logarithmic(axes, "x", labels=(1,))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3, which="both")
    every[0].set(ylabel="images right")
    every[0].legend(loc="center left", fontsize="small")
    return figure


def logarithmic(
    axes: Axes, direction: Literal["x", "y"], labels: Sequence[int] = (1, 2, 5)
) -> None:
    """With plain numbers, also where there is less than a decade."""
    axes.set(**{f"{direction}scale": "log"})
    axis = axes.xaxis if direction == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=labels))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    main()
