"""The paper's procedure, as its published training script has it, on the miniature FLUX.

    OMP_NUM_THREADS=1 python examples/benchmarks/paper_procedure.py
    OMP_NUM_THREADS=1 python examples/benchmarks/paper_procedure.py --passes 150000 \
        --learning-rates 1e-4 --seeds 0 1 2

The peer of `t5slim.distill.train`. As in `train_flux.py` of github.com/LifuWang-66/DistillT5:

* Each batch of prompts is followed through the 20 steps of its trajectories, with an update of the
  student at each, so that consecutive updates see the same prompts.
* T5 and the student encode the batch again at each step.
* The pooled CLIP vector is zeroed, and a guidance scale from 2 to 5 drawn, where it is an input.
* AdamW at a constant rate without warm-up; the gradients that it clips aren't the student's.

A pass takes one sample through the denoiser, or back: an update costs three for each prompt.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from t5slim import SlimT5Encoder
from t5slim.distill import VelocityGap

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world.generation import BF16, CALL, captions, load_pipeline
from shapes_world.students import fresh_student


def main() -> None:
    """Distil at each learning rate from each seed, and print the gaps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=30_000, help="of the denoiser, for a student")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=32, help="captions of each criterion")
    args = parser.parse_args()
    pipe = load_pipeline()
    _, prompts = captions(2000, held_out=False)
    _, held_out = captions(args.held_out, held_out=True, seed=1)
    measure = VelocityGap(pipe, held_out, pipeline_kwargs=CALL)
    updates = args.passes // (3 * args.batch_size)
    for rate in args.learning_rates:
        for seed in args.seeds:
            student = fresh_student(seed)
            distil(pipe, student, prompts, updates, args.batch_size, learning_rate=rate, seed=seed)
            print(f"learning rate {rate:g}, seed {seed}: gap {measure(student):.4f}", flush=True)


def distil(
    pipe: FluxPipeline,
    student: SlimT5Encoder,
    prompts: Sequence[str],
    updates: int,
    batch_size: int,
    *,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> None:
    """Train `student` in place by so many updates of `batch_size` prompts each."""
    torch.manual_seed(seed)
    random.seed(seed)
    device, scheduler = pipe.device, pipe.scheduler
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False)
    student.to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=1e-3)
    # As accelerate's mixed precision, where a CPU doesn't emulate bfloat16.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=BF16)
    batches = iter(DataLoader(list(prompts), batch_size, shuffle=True, drop_last=True))
    batch: list[str] = []
    for update in tqdm(range(updates), "the paper's procedure", leave=False):
        step = update % CALL["num_inference_steps"]
        if step == 0:
            batch = next(batches, [])
            if not batch:
                batches = iter(DataLoader(list(prompts), batch_size, shuffle=True, drop_last=True))
                batch = next(batches)
            channels = pipe.transformer.config.in_channels
            side = CALL["height"] // pipe.vae_scale_factor // 2
            x = torch.randn(batch_size, side * side, channels, device=device)
            positions = pipe._prepare_latent_image_ids(batch_size, side, side, device, x.dtype)
            scheduler.set_timesteps(
                CALL["num_inference_steps"], device=device, mu=calculate_shift(side * side)
            )
            guidance = None
            if pipe.transformer.config.guidance_embeds:
                scale = random.choice([2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0])
                guidance = torch.full((batch_size,), scale, device=device)

        with autocast:
            ids = pipe.tokenizer_2(
                batch, padding="max_length", max_length=CALL["max_sequence_length"],
                truncation=True, return_tensors="pt",
            ).input_ids.to(device)  # fmt: skip
            with torch.no_grad():
                pooled = pipe._get_clip_prompt_embeds(batch, device=device)
                kwargs = {
                    "hidden_states": x,
                    "timestep": scheduler.timesteps[step].expand(batch_size) / 1000,
                    "guidance": guidance,
                    "pooled_projections": torch.zeros_like(pooled),
                    "txt_ids": torch.zeros(ids.shape[1], 3, device=device),
                    "img_ids": positions,
                    "return_dict": False,
                }
                of_teacher = pipe.text_encoder_2(ids)[0]
                (target,) = pipe.transformer(encoder_hidden_states=of_teacher, **kwargs)
            (prediction,) = pipe.transformer(encoder_hidden_states=student(ids)[0], **kwargs)
        F.mse_loss(prediction.float(), target.float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        x = scheduler.step(target.float(), scheduler.timesteps[step], x, return_dict=False)[0]


if __name__ == "__main__":
    main()
