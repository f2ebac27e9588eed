"""The cost of a comparison, over that of the denoiser and decoder passes that it needs.

    python examples/benchmarks/compare_cost.py

Side by side in one run, in turns: `t5slim.evaluate.compare` of 60 held-out captions and two
students; and plain calls of the pipeline for the same number of passes: an image under the teacher
and under each student, and the denoiser once more for the empty prompt and for each student's
predictions along the teacher's trajectory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxPipeline
from tqdm.auto import tqdm

from t5slim.evaluate import compare

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world.generation import CALL, SD3_STUDENT, STUDENT, captions, load_pipeline

STUDENTS = {"FLUX's": STUDENT, "SD3's": SD3_STUDENT}


def main() -> None:
    """Measure in turns, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60, help="captions")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3, help="turns, of which the fastest count")
    args = parser.parse_args()
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    _, texts = captions(-(-args.count // 3), held_out=True)
    texts = list(dict.fromkeys(texts))[: args.count]

    def compared() -> None:
        print(compare(pipe, STUDENTS, texts, pipeline_kwargs=CALL, batch_size=args.batch_size))

    ways: dict[str, Callable[[], None]] = {
        "bare passes": lambda: bare_passes(pipe, texts, args.batch_size), "compare": compared,
    }  # fmt: skip
    # On a CPU its own seconds: what else runs on the machine only adds to those of the clock.
    clock = time.perf_counter if pipe.device.type == "cuda" else time.process_time
    best: dict[str, tuple[float, float]] = {}
    for _ in tqdm(range(args.repeats), "measuring", unit="turn"):
        for name, way in ways.items():
            start, wall = clock(), time.perf_counter()
            way()
            took = clock() - start, time.perf_counter() - wall
            best[name] = min(best.get(name, took), took)
    for name, (seconds, wall) in best.items():
        print(f"{name:<12} {seconds:6.1f} s, {wall:6.1f} s on the clock")
    print(f"compare / bare passes: {best['compare'][0] / best['bare passes'][0]:.3f}")


def bare_passes(pipe: FluxPipeline, texts: list[str], batch_size: int) -> None:
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        for output_type in ("pil", "latent") * (1 + len(STUDENTS)):
            generators = [torch.Generator().manual_seed(0) for _ in batch]
            pipe(batch, generator=generators, output_type=output_type, **CALL)


if __name__ == "__main__":
    main()
