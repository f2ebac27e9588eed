"""Peak memory and seconds of T5-XXL and of students, with denoisers of 16, 8 and 4 bits.

    python examples/benchmarks/memory.py                             # a GPU of 40 GB
    python examples/benchmarks/memory.py --denoisers 8 4 --offload   # one of 24 GB
    python examples/benchmarks/memory.py --tiny                      # the miniature FLUX, anywhere

The weights are random, in the shapes of the published checkpoints: the images are noise, but cost
as much. optimum-quanto quantizes linear layers, in place (`pip install optimum-quanto`).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import sizes
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from measuring import DEVICE, peak_gib, random_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast, T5EncoderModel

import t5slim
from t5slim.slot import TextSlot

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world.generation import load_pipeline
from shapes_world.students import fresh_student

PIPELINES = {"FLUX.1-dev": FluxPipeline, "SD3.5 medium": StableDiffusion3Pipeline}
ENCODERS = {"T5-XXL": 16, "T5-XXL in 8 bits": 8, "T5-XXL in 4 bits": 4, "base": 16, "small": 16}


def main() -> None:
    """Print a row for each denoiser and encoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=["FLUX.1-dev"])
    parser.add_argument("--denoisers", nargs="+", type=int, choices=(16, 8, 4), default=[16])
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--offload", action="store_true", help="enable_model_cpu_offload")
    parser.add_argument("--steps", type=int, default=4, help="of the denoiser, for an image")
    parser.add_argument(
        "--tiny", action="store_true", help="the miniature FLUX, to try this script"
    )
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {'model offload' if args.offload else 'resident'}\n")
    columns = ("pipeline", "bits", "encoder", "peak GiB", "first image, s", "next, s", "encode, ms")
    print(f"| {' | '.join(columns)} |", "|---|---:|---|---:|---:|---:|---:|", sep="\n")
    for name in args.pipelines:
        for bits in args.denoisers:
            pipe = load_pipeline() if args.tiny else full_size(name)
            quantize(pipe.transformer, bits)
            for encoder in args.encoders:
                pipe.remove_all_hooks()
                pipe.register_modules(**{TextSlot(pipe).name: None})  # the last one's memory
                pipe.register_modules(**{TextSlot(pipe).name: text_encoder(encoder, args.tiny)})
                if args.offload and DEVICE == "cuda":
                    pipe.enable_model_cpu_offload()
                else:
                    pipe.to(DEVICE)
                side = 64 if args.tiny else 1024
                row = measured(pipe, side, args.steps)
                print(f"| {name} | {bits} | {encoder} | {row} |", flush=True)
            del pipe


def quantize(module: nn.Module, bits: int) -> None:
    """Quantize the weights of linear layers in place; 16 bits are left as they are."""
    if bits < 16:
        from optimum import quanto

        quanto.quantize(module, weights=quanto.qint8 if bits == 8 else quanto.qint4)
        quanto.freeze(module)


def text_encoder(name: str, tiny: bool) -> nn.Module:
    """T5-XXL in so many bits, or the student of a preset; on the CPU."""
    if tiny:
        model = load_pipeline().text_encoder_2 if name.startswith("T5") else fresh_student()
    else:
        with torch.device("meta"):
            config = None if name.startswith("T5") else t5slim.SlimT5Config.preset(name)
            model = t5slim.SlimT5Encoder(config) if config else T5EncoderModel(sizes.XXL)
        model = random_weights(model, torch.bfloat16, "cpu")
    quantize(model, ENCODERS[name])
    return model


def full_size(name: str) -> Any:
    """The pipeline in bfloat16 without its T5, with random weights; its tokenizers know no word."""
    flux = name == "FLUX.1-dev"
    with torch.device("meta"):
        built = sizes.flux() if flux else sizes.sd3_medium()
    parts: dict[str, Any] = {
        key: random_weights(module, torch.bfloat16, "cpu") for key, module in built.items()
    }
    parts["text_encoder_2" if flux else "text_encoder_3"] = None
    for part in [key for key in parts if key.startswith("text_encoder")]:
        length = 77 if parts[part] else 512
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


def measured(pipe: Any, side: int, steps: int) -> str:
    """The most memory while images are generated, weights included; seconds to the first image and
    to that of another prompt; and milliseconds of `encode_prompt`, the shortest of three."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def seconds(what: Any, **kwargs: Any) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            what(**kwargs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    size = {"height": side, "width": side, "num_inference_steps": steps, "output_type": "pt"}
    first, following = (seconds(pipe, prompt=text, **size) for text in ("a cat", "a dog"))
    tokenizers = [key for key in pipe.components if key.startswith("tokenizer")]
    prompts = {key.replace("tokenizer", "prompt"): "a cat" for key in tokenizers}
    encode = min(seconds(pipe.encode_prompt, **prompts) for _ in range(3))
    return f"{peak_gib():.1f} | {first:.2f} | {following:.2f} | {encode * 1000:,.0f}"


if __name__ == "__main__":
    main()
