"""Memory and time of T5-XXL and of a student on a GPU, in pipelines of full size.

    python examples/benchmarks/memory.py

The weights are random, in the shapes of the published checkpoints: the images are noise, but cost
as much. FLUX.1-dev needs a GPU of 40 GB, SD3.5 medium one of 24 (`--pipelines`).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import sizes
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, T5EncoderModel

import t5slim

PIPELINES = {"FLUX.1-dev": FluxPipeline, "SD3.5 medium": StableDiffusion3Pipeline}


def main() -> None:
    """Print a table of docs/choosing.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| pipeline | encoder | peak memory, GiB | ms to encode |\n|---|---|---:|---:|")
    for name in args.pipelines:
        pipe = full_size(name)
        print(f"| {name} | T5-XXL | {measured(pipe)} |", flush=True)
        t5slim.patch_pipeline(pipe, t5slim.SlimT5Encoder(t5slim.SlimT5Config.preset("base")))
        print(f"| {name} | base | {measured(pipe)} |", flush=True)
        del pipe


def full_size(name: str) -> Any:
    """The pipeline in bfloat16 on the GPU, with random weights; its tokenizers know no word."""
    torch.set_default_dtype(torch.bfloat16)  # twice the memory for a moment, otherwise
    try:
        with torch.device("cuda"):
            t5 = T5EncoderModel(sizes.XXL)
            if name == "FLUX.1-dev":
                parts: dict[str, Any] = {**sizes.flux(), "text_encoder_2": t5}
            else:
                parts = {**sizes.sd3_medium(), "text_encoder_3": t5}
    finally:
        torch.set_default_dtype(torch.float32)
    for part in [*parts]:
        if part.startswith("text_encoder"):
            length = 512 if parts[part] is t5 else 77
            parts[part.replace("text_encoder", "tokenizer")] = tokenizer(length)
    pipe = PIPELINES[name](scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    names = ["<pad>", "</s>", "<unk>", *map(str, range(3, 32_100))]  # as many as T5 has
    words = WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), model_max_length=length,
        pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip


def measured(pipe: Any) -> str:
    """The most memory while an image of 1024 x 1024 is generated, weights included, in GiB; and
    milliseconds of `encode_prompt`, the shortest of three."""
    prompts = dict.fromkeys(("prompt", "prompt_2", "prompt_3"), "a cat")
    if "text_encoder_3" not in pipe.components:
        del prompts["prompt_3"]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pipe(**prompts, height=1024, width=1024, num_inference_steps=2, output_type="pt")
    peak = torch.cuda.max_memory_allocated() / 2**30
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            pipe.encode_prompt(**prompts)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return f"{peak:.1f} | {min(times) * 1000:,.0f}"


if __name__ == "__main__":
    main()
