"""The trainer's own cost: `train` over a bare loop of the same passes.

    OMP_NUM_THREADS=1 python examples/benchmarks/trainer_cost.py

Measured side by side in one run, in turns, each a whole call: a bare loop that does nothing but the
passes of teacher, denoiser and student; and `t5slim.distill.train` on velocity alone, on velocity
with two captured samples for each that is replayed (`reuse=0.5`), and as by default, with a
held-out prompt.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from paper_procedure import distil
from torch.nn import functional as F
from tqdm.auto import tqdm

from t5slim.distill import train

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world.generation import BF16, CALL, captions, load_pipeline
from shapes_world.students import fresh_student, settings

KINDS: dict[str, dict[str, Any]] = {
    "velocity": {"objective": "velocity"},
    "velocity, reuse 0.5": {"objective": "velocity", "reuse": 0.5},
    "as by default": {},
}


def main() -> None:
    """Measure in turns, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="trajectories of a measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    updates, seconds = costs(args.rounds, args.repeats, args.batch_size)
    print("ms for each update")
    for way, values in seconds.items():
        print(f"{way:<28}{min(values) / updates * 1000:>8.1f}")
    own = min(seconds["train, velocity"]) / min(seconds["bare loop"])
    print(f"the trainer's own cost: {own:.3f} x a bare loop")


def costs(rounds: int, repeats: int, batch: int) -> tuple[int, dict[str, list[float]]]:
    """Updates of a measurement, and the seconds of each way, in turns."""
    pipe, updates = load_pipeline(), rounds * CALL["num_inference_steps"]
    # New ones for each measurement: none profits from what another has encoded.
    _, prompts = captions(updates * batch // 3 + 1, held_out=False)
    # One, so that evaluations have about the share that they have in a long run, 2 to 3%.
    held_out = captions(1, held_out=True)[1][:1]

    def trained(changes: dict[str, Any]) -> None:
        config = settings(max_steps=updates, batch_size=batch, prompt_dropout=0.0, **changes)
        train(
            pipe, fresh_student(), prompts, config,
            pipeline_kwargs=CALL, eval_prompts=None if changes else held_out,
        )  # fmt: skip

    ways: dict[str, Callable[[], None]] = {
        "bare loop": lambda: bare_loop(pipe, prompts[: rounds * batch], batch),
        "paper's procedure": lambda: distil(pipe, fresh_student(), prompts, updates, batch),
    }
    ways |= {f"train, {kind}": partial(trained, changes) for kind, changes in KINDS.items()}
    # On a CPU its own seconds: what else runs on the machine only adds to those of the clock.
    clock = time.perf_counter if pipe.device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in tqdm(range(repeats), "measuring", unit="turn"):
        for way, measure in ways.items():
            start = clock()
            measure()
            seconds[way].append(clock() - start)
    return updates, seconds


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=BF16)


def bare_loop(pipe: FluxPipeline, prompts: list[str], batch: int) -> None:
    """Sample trajectories with the teacher, then update the student at each step of them."""
    steps, device = CALL["num_inference_steps"], pipe.device
    student = fresh_student().to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    ids = pipe.tokenizer_2(
        prompts, padding="max_length", max_length=CALL["max_sequence_length"], return_tensors="pt"
    ).input_ids.to(device)
    sigmas = [*torch.linspace(1, 1 / steps, steps).tolist(), 0.0]
    img_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, device, torch.float32)

    def velocity(x: torch.Tensor, sigma: float, text: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            return pipe.transformer(
                hidden_states=x,
                timestep=torch.full((len(x),), sigma, device=device),
                pooled_projections=pooled,
                encoder_hidden_states=text,
                txt_ids=torch.zeros(text.shape[1], 3, device=device),
                img_ids=img_ids,
                return_dict=False,
            )[0].float()

    pipe.transformer.requires_grad_(False)
    for start in range(0, len(prompts), batch):
        of_batch = ids[start : start + batch]
        with torch.no_grad():
            text, pooled, _ = pipe.encode_prompt(
                prompts[start : start + batch],
                None,
                max_sequence_length=CALL["max_sequence_length"],
            )
            x, trajectory = torch.randn(len(of_batch), 16, 64, device=device), []
            for sigma, after in pairwise(sigmas):
                v = velocity(x, sigma, text)
                trajectory.append((x, sigma, v))
                x = x + (after - sigma) * v
        for x, sigma, v in trajectory:
            with autocast(device):
                of_student = student(of_batch)[0]
            F.mse_loss(velocity(x, sigma, of_student), v).backward()
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
