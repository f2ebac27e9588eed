"""Captions of the miniature world, its pipelines, and the images that they generate."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from t5slim.distill.report import image_grid

from . import world

PIPELINE = Path(__file__).parent / "pipeline"
SD3 = Path(__file__).parent / "sd3"  # only what is not the FLUX pipeline's, too
SD3_STUDENT = SD3 / "student"
STUDENT = Path(__file__).parent / "student"
SD3_CLIP_TOKENS = 8  # a quarter of T5's; longer captions are cut for the CLIPs, as SD3 does at 77
SMALL_T5 = Path(__file__).parent / "small_t5"  # that knows language, and nothing of images
# Arguments of the pipeline's call, as it was trained: `pipeline_kwargs` of `train`.
CALL = {
    "height": world.SIDE,
    "width": world.SIDE,
    "num_inference_steps": 20,
    "max_sequence_length": world.MAX_TOKENS,
    "guidance_scale": 2.5,  # SD3's, classifier-free; this FLUX takes none, as FLUX.1-schnell
}


# Without the instructions for it a CPU emulates bfloat16, 18 times slower than float32.
BF16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()


def load_pipeline(folder: Path = PIPELINE, flux: FluxPipeline | None = None) -> DiffusionPipeline:
    """A trained pipeline (`PIPELINE`, `SD3`, or a path), in float32, on a GPU if there is one.
    SD3 has its T5 and its autoencoder from `flux`, or from a FLUX pipeline of its own."""
    shared = {} if (folder / "vae").exists() else shared_parts(flux or load_pipeline())
    pipe = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, **shared)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)


def shared_parts(flux: FluxPipeline) -> dict[str, Any]:
    """Components that the SD3 pipeline shares with FLUX's: autoencoder, T5 and tokenizers."""
    clip_tokenizer = PreTrainedTokenizerFast.from_pretrained(
        PIPELINE / "tokenizer", model_max_length=SD3_CLIP_TOKENS
    )
    # Says of each caption longer than that what it cuts.
    logging.getLogger(
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"
    ).setLevel(logging.ERROR)
    return {
        "vae": flux.vae,
        "tokenizer": clip_tokenizer,
        "tokenizer_2": clip_tokenizer,
        "tokenizer_3": flux.tokenizer_2,
        "text_encoder_3": flux.text_encoder_2,
    }


def captions(
    count: int, *, held_out: bool, seed: int = 0, chatter: float = 0.5
) -> tuple[list[world.Scene], list[str]]:
    """`count` scenes of each criterion with their captions; the scenes don't depend on
    `chatter`."""
    scenes, texts = [], []
    for criterion in world.CRITERIA:
        for i in range(count):
            rng = random.Random(f"{seed} {criterion} {i} {held_out}")
            scenes.append(world.sample_scene(rng, criterion, held_out=held_out))
            texts.append(world.describe(scenes[-1], rng, chatter))
    return scenes, texts


def generate(
    pipe: DiffusionPipeline,
    texts: Sequence[str],
    *,
    seed: int = 0,
    batch_size: int = 50,
    **changes: Any,
) -> list[np.ndarray]:
    """A (64, 64, 3) uint8 image of each caption; the noise depends on `seed` and the place in the
    list alone. `changes`: arguments that differ from `CALL`."""
    images: list[np.ndarray] = []
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(texts), batch_size), "generating", unit="batch", leave=False):
        batch = list(texts[start : start + batch_size])
        generators = [
            torch.Generator("cpu").manual_seed(seed * 1_000_003 + start + i)
            for i in range(len(batch))
        ]
        output = pipe(batch, generator=generators, output_type="np", **CALL | changes).images
        images += list((output * 255).round().astype(np.uint8))
    return images


def grid(
    texts: Sequence[str], columns: Mapping[str, Sequence[np.ndarray]], cell: int = 192
) -> Image.Image:
    """An image grid: a line for each caption, a column for each name."""
    return image_grid(
        texts, {name: list(map(Image.fromarray, images)) for name, images in columns.items()}, cell
    )
