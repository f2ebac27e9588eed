"""What the trainer costs beside the passes that it makes, and what a series of students saves.

    OMP_NUM_THREADS=1 python examples/trainer_cost.py

Measured side by side in one run, in turns, each a whole call: a bare loop that does nothing but the
same passes of teacher, denoiser and student; and `t5slim.distill.train` with one student and with
three, on velocity alone, on velocity with two walked rows for each that is replayed (`reuse=0.5`),
and as by default, with a held-out prompt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers import FluxPipeline
from distill_shapes import fresh_student, settings
from shapes_world.painting import BF16, CALL, captions, load_pipeline
from torch.nn import functional as F
from tqdm.auto import tqdm

from t5slim.distill import train
from t5slim.distill.calls import autocast
from t5slim.distill.states import cpu_attention

DTYPE = torch.bfloat16 if BF16 else None
SERIES = 3
KINDS: dict[str, dict[str, Any]] = {
    "velocity": {"objective": "velocity"},
    "velocity, reuse 0.5": {"objective": "velocity", "reuse": 0.5},
    "as by default": {},
}


def main() -> None:
    """Measure in turns, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="walks of a measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    pipe, batch = load_pipeline(), args.batch_size
    walked = args.rounds * CALL["num_inference_steps"]  # updates through the denoiser
    # Fresh ones for each measurement: none profits from what another has encoded.
    _, prompts = captions(walked * batch // 3 + 1, held_out=False)
    # One, so that evaluations have about the share that they have in a long run, 2 to 3%.
    held_out = captions(1, held_out=True)[1][:1]

    def trained(students: int, changes: dict[str, Any]) -> None:
        config = settings(max_steps=walked, batch_size=batch, empty_prompt_share=0.0, **changes)
        train(
            pipe, [fresh_student(seed) for seed in range(students)], prompts, config,
            pipeline_kwargs=CALL, eval_prompts=None if changes else held_out,
        )  # fmt: skip

    ways: dict[tuple[str, int], Callable[[], None]] = {
        ("bare loop", 1): lambda: bare_loop(pipe, prompts[: args.rounds * batch], batch)
    }
    for kind, changes in KINDS.items():
        for students in (1, SERIES):
            ways[kind, students] = partial(trained, students, changes)
    # On a CPU its own seconds: what else runs on the machine only adds to those of the clock.
    clock = time.perf_counter if pipe.device.type == "cuda" else time.process_time
    seconds: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    for _ in tqdm(range(args.repeats), "measuring", unit="turn"):
        for way, measure in ways.items():
            start = clock()
            measure()
            seconds[way].append(clock() - start)
    least = {way: min(values) / walked * 1000 for way, values in seconds.items()}
    print(f"{'ms for each update through the denoiser':<42}{'one':>8}{SERIES:>8} together / runs")
    print(f"{'bare loop':<42}{least['bare loop', 1]:>8.1f}")
    for kind in KINDS:
        one, series = least[kind, 1], least[kind, SERIES]
        print(f"{f'train, {kind}':<42}{one:>8.1f}{series:>8.1f}{series / one / SERIES:>16.3f}")
    own = least["velocity", 1] / least["bare loop", 1]
    print(f"the trainer's own cost: {own:.3f} x a bare loop")


def bare_loop(pipe: FluxPipeline, prompts: list[str], batch: int) -> None:
    """Walk each batch of prompts with the teacher, then update the student at each step of it."""
    steps, device = CALL["num_inference_steps"], pipe.device
    student = fresh_student().to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    ids = pipe.tokenizer_2(
        prompts, padding="max_length", max_length=CALL["max_sequence_length"], return_tensors="pt"
    ).input_ids.to(device)
    sigmas = [*torch.linspace(1, 1 / steps, steps).tolist(), 0.0]
    img_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, device, torch.float32)

    def velocity(x: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        with autocast(device, DTYPE):
            return pipe.transformer(
                hidden_states=x,
                timestep=torch.full((len(x),), sigma, device=device),
                pooled_projections=pooled,
                encoder_hidden_states=rows,
                txt_ids=torch.zeros(rows.shape[1], 3, device=device),
                img_ids=img_ids,
                return_dict=False,
            )[0].float()

    pipe.transformer.requires_grad_(False)
    for start in range(0, len(prompts), batch):
        of_batch = ids[start : start + batch]
        with torch.no_grad():
            rows, pooled, _ = pipe.encode_prompt(
                prompts[start : start + batch],
                None,
                max_sequence_length=CALL["max_sequence_length"],
            )
            x, walk = torch.randn(len(of_batch), 16, 64, device=device), []
            for sigma, after in pairwise(sigmas):
                v = velocity(x, sigma, rows)
                walk.append((x, sigma, v))
                x = x + (after - sigma) * v
        for x, sigma, v in walk:
            with cpu_attention(device, DTYPE):
                with autocast(device, DTYPE):
                    student_rows = student(of_batch)[0]
                F.mse_loss(velocity(x, sigma, student_rows), v).backward()
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
