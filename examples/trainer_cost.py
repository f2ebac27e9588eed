"""What the trainer costs beside the passes that it makes, and what a series of students saves.

    python examples/trainer_cost.py

Measured side by side in one run, in turns: a bare loop that does nothing but the same passes of
teacher, denoiser and student, `t5slim.distill.train`, and `train` with three students at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from diffusers import FluxPipeline
from distill_shapes import fresh_student, settings
from shapes_world.painting import CALL, captions, load_pipeline
from torch.nn import functional as F
from tqdm.auto import tqdm

import t5slim
from t5slim.distill import train
from t5slim.distill.states import cpu_attention

BATCH = 32


def main() -> None:
    """Measure in turns, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="walks of a measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each")
    args = parser.parse_args()
    pipe = load_pipeline()
    updates = args.rounds * CALL["num_inference_steps"]
    # Fresh ones for each measurement: none profits from what another has encoded.
    prompts = captions(args.rounds * BATCH // 3 + 1, held_out=False)[1][: args.rounds * BATCH]
    config = settings(objective="velocity", max_steps=updates, empty_prompt_share=0.0)

    def trained(students: int) -> Callable[[], float]:
        def measure() -> float:
            several = [fresh_student(seed) for seed in range(students)]
            results = train(pipe, several, prompts, config, pipeline_kwargs=CALL)
            return results[0].seconds

        return measure

    def bare() -> float:
        student = fresh_student().train()
        start = time.perf_counter()
        bare_loop(pipe, student, prompts)
        return time.perf_counter() - start

    ways = {"bare loop": bare, "train, one student": trained(1), "train, three": trained(3)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(args.repeats), "measuring", unit="turn"):
        for name, measure in ways.items():
            seconds[name].append(measure())
    # The least of several: what else runs on the machine only adds to it.
    least = {name: min(values) for name, values in seconds.items()}
    for name, value in least.items():
        print(f"{name:<20}{value / updates * 1000:>8.1f} ms an update")
    own = least["train, one student"] / least["bare loop"]
    print(f"the trainer's own cost: {own:.3f} x a bare loop")
    series = least["train, three"] / least["train, one student"] / 3
    print(f"a series of three students: {series:.3f} x three runs")


def bare_loop(pipe: FluxPipeline, student: t5slim.SlimT5Encoder, prompts: list[str]) -> None:
    """Walk each batch of prompts with the teacher, then update the student at each step of it."""
    steps, device = CALL["num_inference_steps"], pipe.device
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    ids = pipe.tokenizer_2(
        prompts, padding="max_length", max_length=CALL["max_sequence_length"], return_tensors="pt"
    ).input_ids.to(device)
    sigmas = [*torch.linspace(1, 1 / steps, steps).tolist(), 0.0]
    img_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, device, torch.float32)

    def velocity(x: torch.Tensor, sigma: float, rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
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
    for start in range(0, len(prompts), BATCH):
        of_batch = ids[start : start + BATCH]
        with torch.no_grad():
            rows, pooled, _ = pipe.encode_prompt(
                prompts[start : start + BATCH],
                None,
                max_sequence_length=CALL["max_sequence_length"],
            )
            x, walk = torch.randn(len(of_batch), 16, 64, device=device), []
            for sigma, after in pairwise(sigmas):
                v = velocity(x, sigma, rows)
                walk.append((x, sigma, v))
                x = x + (after - sigma) * v
        for x, sigma, v in walk:
            with cpu_attention(device, torch.bfloat16):
                with torch.autocast(device.type, torch.bfloat16):
                    student_rows = student(of_batch)[0]
                F.mse_loss(velocity(x, sigma, student_rows), v).backward()
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
