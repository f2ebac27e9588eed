"""The same student distilled in several ways: the velocity gap at equal denoiser passes.

    python examples/benchmarks/compare_settings.py --out runs         # all ways, from a small T5
    python examples/benchmarks/compare_settings.py --out runs --ways paper defaults --start random

A pass takes one sample through the denoiser, or back. Every way gets as many of them, from the same
start, on the same captions; the gap is that of held-out ones. A way that is in `--out` already is
not trained again, so they can be run one by one, and one that was killed goes on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import t5slim
from t5slim import SlimT5Encoder
from t5slim.distill import DistillConfig, DistillResult, train

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world import judge
from shapes_world.generation import CALL, SMALL_T5, captions, generate, load_pipeline
from shapes_world.students import denoiser_passes, fresh_student

POINTS = 8  # of a curve
# A quarter of the paper's: in so short a run four times as many updates count for more.
BATCH = 8
WAYS = [
    "paper", "paper-1e-3", "three-stage",
    "velocity", "embedding", "sequence", "mixture", "defaults",
]  # fmt: skip


def main() -> None:
    """Distil, print the tables, draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--start", choices=("pretrained", "random"), default="pretrained")
    parser.add_argument("--passes", type=int, default=19_200, help="of the denoiser, for each way")
    parser.add_argument("--count", type=int, default=20, help="images of each criterion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="where to draw the curves (PNG)")
    args = parser.parse_args()
    pipe = load_pipeline()
    updates = args.passes // (3 * BATCH)  # samples of the teacher; the student's, there and back
    _, eval_prompts = captions(33, held_out=True, seed=1)
    scenes, texts = captions(args.count, held_out=True)
    accuracy = {"teacher": judge.accuracy(scenes, generate(pipe, texts))}
    results: dict[str, DistillResult] = {}
    for name in args.ways:
        stages = way(name, updates, args.seed)
        student = fresh_student(args.seed)
        if args.start == "pretrained":
            student = t5slim.SlimT5Encoder.from_t5(SMALL_T5, student.config.project_out_dim)
        folder = args.out / args.start / name
        results[name] = train_stages(pipe, student, stages, eval_prompts, folder)
        t5slim.patch_pipeline(pipe, student, keep_teacher=True)
        accuracy[name] = judge.accuracy(scenes, generate(pipe, texts))
        t5slim.unpatch_pipeline(pipe)

    budgets = [args.passes * k // POINTS for k in (1, 2, 3, 4, 6, 8)]
    print(f"\n{'gap after passes':<18}" + "".join(f"{b:>10,}" for b in budgets) + "   seconds")
    for name, result in results.items():
        gaps = "".join(f"{at(result, 'passes', budget):>10.4f}" for budget in budgets)
        print(f"{name:<18}{gaps}{result.seconds:>10,.0f}")
    times = [max(result.seconds for result in results.values()) * k / 6 for k in range(1, 7)]
    print(f"\n{'gap after seconds':<18}" + "".join(f"{t:>10,.0f}" for t in times))
    for name, result in results.items():
        print(f"{name:<18}" + "".join(f"{at(result, 'seconds', t):>10.4f}" for t in times))
    print(f"\n{'images right':<18}" + "".join(f"{key:>12}" for key in accuracy["teacher"]))
    for name, right in accuracy.items():
        print(f"{name:<18}" + "".join(f"{share:>12.1%}" for share in right.values()))
    print()
    for name, result in results.items():
        print(f"{name:<18}{result.report}")
    for name in WAYS[:3]:
        if name in results and "defaults" in results:
            print(reach(results["defaults"], results[name], name))
    if args.plot:
        plot(results, args.plot)


Stages = list[tuple[DistillConfig, list[str]]]


def train_stages(
    pipe: Any, student: SlimT5Encoder, stages: Stages, eval_prompts: list[str], folder: Path
) -> DistillResult:
    """Train in one call per stage; the history is that of all, with its costs added up."""
    history: list[dict[str, Any]] = []
    for i, (config, prompts) in enumerate(stages):
        result = train(
            pipe,
            student,
            prompts,
            config,
            pipeline_kwargs=CALL,
            eval_prompts=eval_prompts,
            output_dir=folder / f"stage-{i}" if len(stages) > 1 else folder,
            resume=True,
        )
        before = history[-1] if history else {}
        costs = ("step", "seconds", "teacher_samples", "student_samples")
        history += [e | {c: e[c] + before.get(c, 0) for c in costs} for e in result.history]
    return replace(result, history=history, seconds=history[-1]["seconds"])


def way(name: str, updates: int, seed: int) -> Stages:
    """Settings and prompts of each stage, for so many updates through the denoiser."""
    _, prompts = captions(1000, held_out=False)
    # A rate that suits this student of 0.3 million parameters, for all alike; but `paper` is as it
    # is, with a rate and a warm-up that suit 130 million and 200,000 updates.
    common = {"batch_size": BATCH, "eval_every": updates // POINTS, "seed": seed}
    through = {"max_steps": updates, "learning_rate": 1e-3, "warmup_steps": 100, **common}
    match name:
        case "paper":
            return [(DistillConfig.paper(max_steps=updates, **common), prompts)]
        case "paper-1e-3":
            return [(DistillConfig.paper(**through), prompts)]
        case "three-stage":
            semantics, text = prompts[1000:2000], prompts[2000:]
            stages = zip((semantics, text, prompts), (50, 70, 200), strict=True)
            return [
                (DistillConfig.paper(**through | {"max_steps": updates * share // 320}), stage)
                for stage, share in stages
            ]
        case "velocity":
            return [(DistillConfig(objective="velocity", **through), prompts)]
        case "mixture":
            objective = {"velocity": 1, "embedding": 10}
            always = {"embedding_phase": 0.0, "velocity_every": 1}
            return [(DistillConfig(objective=objective, **always, **through), prompts)]
        case "sequence":
            # The first stage needs no denoiser pass, and comes on top. Together their rates are
            # about the cosine of a single run.
            first = DistillConfig(objective="embedding", **through | {"lr_schedule": "constant"})
            second = DistillConfig(objective="velocity", **through | {"learning_rate": 5e-4})
            return [(first, prompts), (second, prompts)]
        case "embedding":
            # Eight of its updates, without a denoiser pass, take the time of one with it.
            longer = {"max_steps": 8 * updates, "eval_every": 8 * updates // POINTS}
            return [(DistillConfig(objective="embedding", **through | longer), prompts)]
        case _:
            # Of 32 updates, one goes through the denoiser.
            common |= {"max_steps": 32 * updates, "eval_every": 32 * updates // POINTS}
            return [(DistillConfig(**common), prompts)]


def curve(result: DistillResult, unit: str) -> list[tuple[float, float]]:
    """(cost, gap) of each evaluation; the cost in "passes" or "seconds"."""
    return [
        (denoiser_passes(entry) if unit == "passes" else entry[unit], entry["velocity_gap"])
        for entry in result.history
    ]


def at(result: DistillResult, unit: str, budget: float) -> float:
    """The gap at the last evaluation within the budget."""
    within = [gap for cost, gap in curve(result, unit) if cost <= budget]
    return within[-1] if within else float("nan")


def reach(result: DistillResult, other: DistillResult, name: str) -> str:
    """The passes that the defaults take to come to the other's final gap."""
    total, goal = curve(other, "passes")[-1]
    reached = [passes for passes, gap in curve(result, "passes") if gap <= goal]
    if not reached:
        return f"the defaults do not reach the final gap of {name}, {goal:.4f}"
    return (
        f"the defaults reach the final gap of {name}, {goal:.4f}, after {reached[0]:,} passes, "
        f"{reached[0] / total:.2f} of its {total:,}"
    )


def plot(results: dict[str, DistillResult], path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, result in results.items():
        points = curve(result, "passes")
        with_passes = [point for point in points if point[0]]
        if with_passes:
            axes.plot(*zip(*with_passes, strict=True), label=name, marker=".")
        else:
            axes.axhline(points[-1][1], label=f"{name}, no passes", color="gray", linestyle="--")
    axes.set(xlabel="denoiser passes", ylabel="velocity gap", yscale="log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
