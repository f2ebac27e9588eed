"""The same student distilled four ways: side by side at equal seconds, updates, denoiser passes.

    python examples/compare_objectives.py --minutes 6 --out runs

Velocity with a shuffled reservoir; the same after a warm-up on embeddings, as by default; the
paper's settings (velocity, consecutive updates along a walk); and naive embedding matching. Each
run gets the machine for itself, one after the other. The gap is that of held-out captions; the
pictures are judged at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill_shapes import fresh_student, settings
from shapes_world import judge
from shapes_world.painting import CALL, captions, load_pipeline, paint

import t5slim
from t5slim.distill import DistillConfig, DistillResult, train


def main() -> None:
    """Distil, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6, help="of training, for each")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument("--count", type=int, default=100, help="pictures of each criterion")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common = {"max_seconds": args.minutes * 60, "eval_every": 250, "seed": args.seed}
    configs = {
        "velocity": settings(objective="velocity", **common),
        "warm-up": settings(
            objective={"embedding": {"until": 1000}, "velocity": {"start": 1000}}, **common
        ),
        "paper": DistillConfig.paper(max_steps=100_000, mixed_precision="bf16", **common),
        "embedding": settings(objective="embedding", **common),
    }
    pipe = load_pipeline()
    _, prompts = captions(7000, held_out=False)
    _, eval_prompts = captions(8, held_out=True, seed=1)
    scenes, texts = captions(args.count, held_out=True)
    results: dict[str, DistillResult] = {}
    accuracy = {"teacher": judge.accuracy(scenes, paint(pipe, texts))}
    for name, config in configs.items():
        results[name] = train(
            pipe,
            fresh_student(args.seed),
            prompts,
            config,
            pipeline_kwargs=CALL,
            eval_prompts=eval_prompts,
            output_dir=args.out / name,
        )
        t5slim.patch_pipeline(pipe, results[name].student, keep_teacher=True)
        accuracy[name] = judge.accuracy(scenes, paint(pipe, texts))
        t5slim.unpatch_pipeline(pipe)

    print(f"\n{'velocity gap at equal':<24}" + "".join(f"{name:>14}" for name in results))
    units = {"seconds": "seconds", "updates": "step", "denoiser passes": "passes"}
    for label, unit in units.items():
        runs = {name: _curve(result, unit) for name, result in results.items()}
        ends = [curve[-1][0] for curve in runs.values() if curve[-1][0] > 0]
        budget = min(ends)
        row = "".join(f"{_at(curve, budget):>14}" for curve in runs.values())
        print(f"{f'{label} ({budget:,.0f})':<24}{row}")
    print(f"\n{'pictures right':<24}" + "".join(f"{name:>14}" for name in accuracy))
    for key in accuracy["teacher"]:
        print(f"{key:<24}" + "".join(f"{result[key]:>14.1%}" for result in accuracy.values()))


def _curve(result: DistillResult, unit: str) -> list[tuple[float, float]]:
    """(cost, gap) of each evaluation; a pass takes a row through the denoiser, or back."""
    points = []
    for entry in result.history:
        passes = entry["teacher_rows"] + 2 * entry["student_rows"]
        points.append((passes if unit == "passes" else entry[unit], entry["velocity_gap"]))
    return points


def _at(curve: list[tuple[float, float]], budget: float) -> str:
    """The gap at the last evaluation within the budget."""
    if curve[-1][0] == 0:
        return f"{curve[-1][1]:.4f} (0)"  # embedding matching asks the denoiser nothing
    within = [gap for cost, gap in curve if cost <= budget]
    return f"{within[-1]:.4f}" if within else "-"


if __name__ == "__main__":
    main()
