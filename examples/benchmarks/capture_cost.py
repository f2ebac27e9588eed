"""The cost of capturing a trajectory, over that of the pipeline's own call.

    python examples/benchmarks/capture_cost.py [--repeats 7]

Both run in turns on the miniature FLUX, 16 prompts and 20 steps, T5 included, and are compared by
processor time. The guard, which runs once for each set of shapes, is timed apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world.generation import CALL, captions, load_pipeline

from t5slim.distill import capture


def seconds(function: Callable[[], Any]) -> float:
    """The processor time of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = captions(16, held_out=False)[1][:16]
    kwargs = CALL | {"num_inference_steps": 20}
    layouts: dict[Any, Any] = {}

    def call() -> None:
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        pipe(prompts, generator=generators, output_type="latent", **kwargs)

    def captured() -> None:
        capture(pipe, prompts, pipeline_kwargs=kwargs, seed=range(len(prompts)), layouts=layouts)

    call()  # warm-up
    guard = seconds(captured)
    pairs = [(seconds(call), seconds(captured)) for _ in range(arguments.repeats)]
    ratios = sorted(captured / call for call, captured in pairs)
    plain, own = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(
        f"pipeline {plain:.2f} s, capture {own:.2f} s: {statistics.median(ratios):.3f} x "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f}); with the guard {guard:.2f} s"
    )


if __name__ == "__main__":
    main()
