"""What distilling a student for a real pipeline costs: FLOPs, GPU hours and disk, computed.

    python examples/benchmarks/real_cost.py
    python examples/benchmarks/real_cost.py --check

FLOPs are counted on the real classes with the configs of the published checkpoints, without
weights. `--check` counts those of the miniature world's pipeline, and measures their times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import sizes
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5EncoderModel

import t5slim
from t5slim.distill import DistillConfig

GPUS = {"RTX 4090": 165e12, "H100": 989e12}  # FLOPS of dense matrix products in bfloat16
UTILISATION = 0.4  # of them, by all of training
WIDTH = 4096  # of T5-XXL and UMT5-XXL, whose embeddings are cached in bfloat16
# As many updates as the paper's, of which every 32nd goes through the denoiser.
DEFAULTS = [DistillConfig(max_steps=320_000)]
PAPER = [DistillConfig.paper(max_steps=steps) for steps in (50_000, 70_000, 200_000)]


@dataclass(frozen=True)
class Pipeline:
    """A denoiser as it is called in training: one sample of latents (C, ...) and T tokens."""

    make: Callable[[], nn.Module]
    latents: tuple[int, ...]
    tokens: int
    guided: bool = False  # with a negative prompt: two samples to a prompt and step


def wan(heads: int, layers: int, width: int) -> Callable[[], nn.Module]:
    """Wan 2.1's denoiser of text to video."""
    shape: dict[str, Any] = {"num_attention_heads": heads, "num_layers": layers}
    return lambda: diffusers.WanTransformer3DModel(**shape, ffn_dim=width)


def flux() -> nn.Module:
    """FLUX.1-dev's denoiser."""
    return sizes.flux()["transformer"]


PIPELINES = {
    "FLUX.1-dev, 512 px": Pipeline(flux, (1024, 64), 77),
    "FLUX.1-dev, 512 px, 512 tokens": Pipeline(flux, (1024, 64), 512),
    "FLUX.1-dev, 1024 px": Pipeline(flux, (4096, 64), 77),
    "FLUX.1-dev, 1024 px, 512 tokens": Pipeline(flux, (4096, 64), 512),
    "SD3.5 medium, 512 px": Pipeline(
        lambda: sizes.sd3_medium()["transformer"], (16, 64, 64), 256, True
    ),
    "PixArt-Sigma, 512 px": Pipeline(lambda: sizes.pixart()["transformer"], (4, 64, 64), 300, True),
    "Wan 2.1 1.3B, 480p, 81 frames": Pipeline(wan(12, 30, 8960), (16, 21, 60, 104), 512, True),
    "Wan 2.1 14B, 480p, 81 frames": Pipeline(wan(40, 40, 13824), (16, 21, 60, 104), 512, True),
}


@dataclass(frozen=True)
class Cost:
    """FLOPs of a sample's pass through the denoiser, without and with gradients back to the text;
    of a prompt's through the student, there and back; and through T5."""

    teacher: float
    there_and_back: float
    student: float
    t5: float

    def of(self, config: DistillConfig, guided: bool, prompts: int) -> float:
        """FLOPs of a run on so many prompts, with `gradient_accumulation_steps` of 1."""
        matching, through = updates(config)
        samples = config.batch_size * through
        if config.reservoir_size == 0:  # whole denoiser calls, and each once
            samples *= 1 + guided
        reuse = config.reuse if config.reservoir_size else 1
        again = config.gradient_checkpointing  # a second forward pass
        total = samples * (self.there_and_back + self.teacher * (again + 1 / reuse))
        total += config.batch_size * (matching + through) * self.student
        return total + min(prompts, config.batch_size * (matching + through)) * self.t5


def updates(config: DistillConfig) -> tuple[int, int]:
    """How many updates match embeddings alone, and how many go through the denoiser."""
    through = sum("velocity" in config.weights_at(step) for step in range(config.max_steps))
    return config.max_steps - through, through


def inputs(denoiser: nn.Module, latents: tuple[int, ...], tokens: int, batch: int = 1) -> dict:
    """Arguments of a denoiser, with gradients in the text (B, T, D)."""
    config: Any = denoiser.config
    width = getattr(config, "joint_attention_dim", None) or getattr(config, "text_dim", None)
    text = torch.randn(batch, tokens, width or WIDTH, requires_grad=True)
    kwargs: dict[str, Any] = {"hidden_states": torch.randn(batch, *latents)}
    kwargs |= {"timestep": torch.ones(batch), "encoder_hidden_states": text}
    if getattr(config, "guidance_embeds", False):
        kwargs["guidance"] = torch.ones(batch)
    if isinstance(denoiser, diffusers.FluxTransformer2DModel):
        kwargs |= {"img_ids": torch.zeros(latents[0], 3), "txt_ids": torch.zeros(tokens, 3)}
    if pooled := getattr(config, "pooled_projection_dim", None):
        kwargs["pooled_projections"] = torch.randn(batch, pooled)
    if isinstance(denoiser, diffusers.PixArtTransformer2DModel):
        kwargs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return kwargs


def counted(function: Callable[[], Any]) -> float:
    """FLOPs of a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def passes(denoiser: nn.Module, encoder: nn.Module, *shape: Any) -> dict[str, Callable[[], Any]]:
    """A teacher's sample, a student's there and back, and an update by embeddings, as calls."""
    denoiser.requires_grad_(False).eval()
    kwargs = inputs(denoiser, *shape)
    text: Tensor = kwargs["encoder_hidden_states"]
    ids = torch.zeros(text.shape[:2], dtype=torch.long)
    return {
        "teacher": torch.no_grad()(lambda: denoiser(**kwargs)),
        "there_and_back": lambda: denoiser(**kwargs)[0].sum().backward(),
        "student": lambda: encoder(ids)[0].sum().backward(),
    }


def cost(pipeline: Pipeline) -> Cost:
    """The FLOPs of a pipeline, a student of the preset "base" and T5-XXL."""
    with torch.device("meta"):  # shapes without weights
        student = t5slim.SlimT5Encoder(t5slim.SlimT5Config.preset("base"))
        calls = passes(pipeline.make(), student, pipeline.latents, pipeline.tokens)
        t5, ids = T5EncoderModel(sizes.XXL), torch.zeros(1, pipeline.tokens, dtype=torch.long)
        of_t5 = counted(torch.no_grad()(lambda: t5(ids)))
        return Cost(**{name: counted(call) for name, call in calls.items()}, t5=of_t5)


def check() -> None:
    """Print the miniature world's FLOPs and times, over those of a teacher's sample."""
    world = Path(__file__).parents[1] / "shapes_world"
    pipe = diffusers.FluxPipeline.from_pretrained(world / "pipeline")
    student = t5slim.SlimT5Encoder.from_pretrained(world / "student").float()
    calls = passes(pipe.transformer, student, (16, 64), 32, 32)
    print("| | GFLOP | counted | measured |\n|---|---:|---:|---:|")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(12):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    flops = {name: counted(call) for name, call in calls.items()}
    for name, value in flops.items():
        ratio = min(times[name]) / min(times["teacher"])
        print(f"| {name} | {value / 1e9:.2f} | {value / flops['teacher']:.3f} | {ratio:.3f} |")


def main() -> None:
    """Print the table of docs/distill.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=50_000)
    parser.add_argument("--check", action="store_true", help="measure the miniature world")
    args = parser.parse_args()
    if args.check:
        return check()
    hours = " | ".join(f"{way}: hours on a {gpu}" for way in ("paper", "defaults") for gpu in GPUS)
    print(f"| pipeline | TFLOP per sample: forward; forward and backward | cache, GB | {hours} |")
    print(f"|---|---:|---:|{'---:|' * 2 * len(GPUS)}")
    for name, pipeline in PIPELINES.items():
        found = cost(pipeline)
        cells = [f"{found.teacher / 1e12:.1f}, {found.there_and_back / 1e12:.1f}"]
        cells.append(f"{args.prompts * pipeline.tokens * WIDTH * 2 / 1e9:.0f}")
        for configs in (PAPER, DEFAULTS):
            total = sum(found.of(c, pipeline.guided, args.prompts) for c in configs)
            cells += [f"{total / (UTILISATION * speed) / 3600:,.0f}" for speed in GPUS.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
