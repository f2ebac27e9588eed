"""Parameters and memory of T5-XXL's encoder, of students, and of the pipelines that they are for.

    python examples/benchmarks/sizes.py

Counted on the real classes with the configs of the published checkpoints, without weights.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

import t5slim

XXL = T5Config(
    d_model=4096,
    d_kv=64,
    num_heads=64,
    d_ff=10240,
    num_layers=24,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)
CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    projection_dim=768,
)  # fmt: skip
CLIP_G = CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    projection_dim=1280,
)  # fmt: skip


def encoders() -> dict[str, nn.Module]:
    """T5-XXL and the students' presets."""
    presets = {
        name: t5slim.SlimT5Encoder(t5slim.SlimT5Config.preset(name))
        for name in ("xl", "large", "base", "small")
    }
    return {"T5-XXL": T5EncoderModel(XXL), **presets}


def pipelines() -> dict[str, dict[str, nn.Module]]:
    """The components of each pipeline beside its T5."""
    return {
        "FLUX.1-dev": flux(),
        "SD3.5 large": sd3_large(),
        "SD3.5 medium": sd3_medium(),
        "PixArt-Sigma": pixart(),
    }


def flux() -> dict[str, nn.Module]:
    transformer = FluxTransformer2DModel(guidance_embeds=True)
    return {"transformer": transformer, "text_encoder": CLIPTextModel(CLIP_L), "vae": vae()}


def sd3_large() -> dict[str, nn.Module]:
    return _sd3(38, pos_embed_max_size=192)


def sd3_medium() -> dict[str, nn.Module]:
    return _sd3(24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)))


def _sd3(layers: int, **of_transformer: Any) -> dict[str, nn.Module]:
    transformer = SD3Transformer2DModel(
        sample_size=128, num_layers=layers, num_attention_heads=layers, attention_head_dim=64,
        caption_projection_dim=layers * 64, joint_attention_dim=4096, pooled_projection_dim=2048,
        out_channels=16, qk_norm="rms_norm", **of_transformer,
    )  # fmt: skip
    return {
        "transformer": transformer,
        "text_encoder": CLIPTextModelWithProjection(CLIP_L),
        "text_encoder_2": CLIPTextModelWithProjection(CLIP_G),
        "vae": vae(),
    }


def pixart() -> dict[str, nn.Module]:
    transformer = PixArtTransformer2DModel(
        sample_size=128, interpolation_scale=2, caption_channels=4096, cross_attention_dim=1152,
        in_channels=4, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return {"transformer": transformer, "vae": vae()}


def vae() -> AutoencoderKL:
    blocks = 4
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
        scaling_factor=0.3611, shift_factor=0.1159,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
    )  # fmt: skip


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def gib(module: nn.Module, bits: float = 16) -> float:
    """Memory if the weights of its linear layers take so many bits, and all else 16: as does T5's
    `wo`, which transformers never quantizes."""
    named = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    linear = sum(m.weight.numel() for name, m in named if not name.endswith(".wo"))
    return (linear * bits + (count(module) - linear) * 16) / 8 / 2**30


# GiB at 1024 x 1024: an H100 took 33.9 for FLUX.1-dev in bf16, of which the weights are 31.4.
# Decoding takes the most, and the other pipelines' autoencoders have the same shape.
ACTIVATIONS = 2.5
# bitsandbytes' 4 bits hold a float32 for each 64 weights as well.
PRECISIONS = {"bf16": 16, "8 bits": 8, "NF4": 4.5}


def main() -> None:
    """Print the tables of README.md and docs/choosing.md."""
    with torch.device("meta"):  # shapes without weights
        of_text, of_pipelines = encoders(), pipelines()
    xxl = of_text["T5-XXL"]
    print("| encoder | parameters | GiB in bf16 | of T5-XXL |\n|---|---:|---:|---:|")
    for name, encoder in of_text.items():
        share = "1" if encoder is xxl else f"1/{count(xxl) / count(encoder):.0f}"
        print(f"| {name} | {count(encoder) / 1e6:,.0f} M | {gib(encoder):.2f} | {share} |")
    columns = {
        "T5-XXL": gib(xxl),
        "in 8 bits": gib(xxl, 8),
        "in 4 bits": gib(xxl, PRECISIONS["NF4"]),
        **{f"`{name}`": gib(of_text[name]) for name in ("xl", "large", "base", "small")},
    }
    print(f"\n| GiB | denoiser | {' | '.join(columns)} |\n|---|---|{'---:|' * len(columns)}")
    for name, parts in of_pipelines.items():
        denoiser = parts.pop("transformer")
        rest = sum(map(gib, parts.values())) + ACTIVATIONS
        for precision, bits in PRECISIONS.items():
            sizes = (rest + gib(denoiser, bits) + size for size in columns.values())
            print(f"| {name} | {precision} | {' | '.join(f'{size:.1f}' for size in sizes)} |")


if __name__ == "__main__":
    main()
