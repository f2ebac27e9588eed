r"""What adaptive embeddings bring back of what a student of 1/50 lost, in the miniature world.

    python examples/adaptive_text/refine_shapes.py --student runs/1-50 --train --out runs

Every configuration is a line of `results.jsonl`; one that is there isn't measured again. The table
and the plot show all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from t5slim import SlimT5Encoder
from t5slim.distill import train

sys.path.insert(0, str(Path(__file__).parents[1]))
from scaling_down.study import SIZES, SMALLEST
from shapes_world import judge, world
from shapes_world.generation import CALL, STUDENT, captions, load_pipeline
from shapes_world.students import denoiser_passes, fresh_student, settings

from adaptive_text.adaptive_text import AdaptiveText, Score
from adaptive_text.scores import SCORES, scores_of

STEPS = 4  # of sampling
BATCH = 33
PLAIN: Any = {"steps": (), "step_size": 0.0, "radius": 0.0}
FISHER_PASSES = 2 * 512  # of a run by default, beside those that it counts
Record = dict[str, Any]


def main() -> None:
    """Measure what is missing, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--student", type=Path, required=True, help="folder of that of 1/50")
    parser.add_argument("--train", action="store_true", help="first train it, on embeddings alone")
    parser.add_argument("--encoders", nargs="+", default=["1/50", "1/21", "teacher"])
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=SCORES)
    parser.add_argument("--refined", type=int, nargs="+", default=[1, 2, 4], help="of 4 steps")
    parser.add_argument("--radii", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--step", type=float, default=1.0, help="of an update, over the radius")
    parser.add_argument("--updates", type=int, default=1, help="at each of the refined steps")
    parser.add_argument("--train-on", type=int, nargs="*", default=[], help="updates, to compare")
    parser.add_argument("--count", type=int, default=33, help="captions of each criterion")
    parser.add_argument("--seed", type=int, default=2, help="of the captions")
    args = parser.parse_args()
    pipe = load_pipeline()
    if args.train:
        train_smallest(pipe, args.student)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    scenes, texts = captions(args.count, held_out=True, seed=args.seed)
    scores = scores_of(pipe, scenes, texts)
    folders = {"1/50": args.student, "1/21": STUDENT}
    kwargs = CALL | {"num_inference_steps": STEPS}

    def known(**key: Any) -> bool:
        return any(record | key == record for record in records)

    def add(sampler: AdaptiveText, score: str, **key: Any) -> None:
        if not known(score=score, **key):
            found = measure(sampler, scores[score](sampler), scenes, texts)
            records.append({"score": score} | key | found)
            with file.open("a") as results:
                results.write(json.dumps(records[-1]) + "\n")

    def load(name: str) -> Any:
        return SlimT5Encoder.from_pretrained(folders[name], dtype=torch.float32).to(pipe.device)

    for name in args.encoders:
        encoder = load(name) if name in folders else None
        sampler = AdaptiveText(pipe, encoder=encoder, pipeline_kwargs=kwargs, **PLAIN)
        add(sampler, "random", encoder=name, refined=0)
        for score, radius, refined in itertools.product(args.scores, args.radii, args.refined):
            how = {"radius": radius, "step_size": args.step * radius, "updates": args.updates}
            vars(sampler).update(how, steps=range(0, STEPS, STEPS // refined))
            add(sampler, score, encoder=name, refined=refined, **how)
    for updates in args.train_on:
        if not known(encoder=(name := f"1/50, {updates} updates more")):
            prompts, config = captions(2000, held_out=False)[1], settings(max_steps=updates)
            of_training = CALL | {"num_inference_steps": 6}
            result = train(pipe, load("1/50"), prompts, config, pipeline_kwargs=of_training)
            passes = denoiser_passes(vars(result)) + FISHER_PASSES
            sampler = AdaptiveText(pipe, encoder=result.student, pipeline_kwargs=kwargs, **PLAIN)
            add(sampler, "random", encoder=name, refined=0, training_passes=passes)
    print(table(records))
    plot(records).savefig(args.out / "adaptive_text.png", dpi=80)


def train_smallest(pipe: Any, folder: Path) -> None:
    """Train a student of 1/50 on embeddings alone, as the scaling-down study does."""
    config = settings(
        objective="embedding", max_steps=4800, learning_rate=2e-3, max_grad_norm=1.0,
        ema_decay=0.99, mixed_precision="no",
    )  # fmt: skip
    student, prompts = fresh_student(**SIZES[SMALLEST]), captions(2000, held_out=False)[1]
    train(pipe, student, prompts, config, pipeline_kwargs=CALL).student.save_pretrained(folder)


def measure(
    sampler: AdaptiveText, score: Score, scenes: Sequence[world.Scene], texts: Sequence[str]
) -> Record:
    """Costs of an image, and for each caption whether its image is right; of words, the letters."""
    torch.manual_seed(0)
    begin, images, sampler.extra_passes = time.process_time(), [], 0
    for first in range(0, len(texts), BATCH):
        seeds = range(first, len(texts))[:BATCH]
        images += sampler.generate(texts[first : first + BATCH], score, seeds)
    found: Record = {"seconds": (time.process_time() - begin) / len(texts)}
    found["extra_passes"] = sampler.extra_passes / len(texts)
    shares = [
        judge.accuracy([scene], [np.asarray(image)])
        for scene, image in zip(scenes, images, strict=True)
    ]
    for name in (*world.CRITERIA, "letters"):
        found[name] = [share[name] for share in shares if name in share]
    return found


def table(records: Sequence[Record]) -> str:
    """Shares of right images with their 95% intervals, as a table in Markdown."""
    names = (*world.CRITERIA, "letters")
    head = ["encoder", "score", "refined steps", "step", "radius", "extra passes", *names]
    lines = [[*head, "became right", "became wrong"], ["---"] * (len(head) + 2)]
    for one in records:
        plain = next(r for r in records if r["encoder"] == one["encoder"] and not r["refined"])
        cells = [one["encoder"], one["score"] if one["refined"] else "", str(one["refined"])]
        cells += [f"{one.get(key, 0):.3g}" for key in ("step_size", "radius", "extra_passes")]
        for name in names:
            low, high = interval(one[name])
            cells.append(f"{np.mean(one[name]):.0%} ({low:.0%} to {high:.0%})")
        changes = np.concatenate([np.subtract(one[c], plain[c]) for c in world.CRITERIA])
        lines.append([*cells, str((changes > 0).sum()), str((changes < 0).sum())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(shares: Sequence[float]) -> tuple[float, float]:
    """Of the mean, Wilson's; for letters, which vary less than 0 and 1, too wide."""
    return judge.wilson_interval(float(np.mean(shares)), len(shares))


def plot(records: Sequence[Record]) -> Figure:
    """Letters against extra passes, for the student of 1/50: a panel for each score."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, len(SCORES), sharex=True, sharey=True)
    mine = [one for one in records if one["encoder"].startswith("1/50")]
    plain = next(one for one in mine if not one["refined"])
    for axis, score in zip(axes, SCORES, strict=True):
        axis.axhspan(*interval(plain["letters"]), color="0.9")
        for one in mine:
            if "training_passes" in one:
                axis.axhline(np.mean(one["letters"]), color="black", linestyle=":")
        for radius in sorted({one["radius"] for one in mine if one["refined"]}):
            found = [r for r in mine if (r["score"], r.get("radius")) == (score, radius)]
            line = sorted([plain, *found], key=lambda one: one["extra_passes"])
            means = np.array([np.mean(one["letters"]) for one in line])
            errors = abs(np.transpose([interval(one["letters"]) for one in line]) - means)
            passes = [one["extra_passes"] for one in line]
            axis.errorbar(passes, means, errors, marker="o", capsize=3, label=f"radius {radius:g}")
        axis.set(title=score, xlabel="extra passes per image", ylim=(0, 1.02))
    axes[0].set_ylabel("right letters, 1/50")
    axes[0].legend()
    return figure


if __name__ == "__main__":
    main()
