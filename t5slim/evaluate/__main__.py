"""Command that compares students with their teacher.

python -m t5slim.evaluate --pipeline black-forest-labs/FLUX.1-dev --prompts prompts.txt \
    --students my-student LifuWang/DistillT5 --out comparison height=512 num_inference_steps=20
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import diffusers
import torch

from ..distill.pipeline import check_pipeline_kwargs
from ..encoder import SlimT5Encoder
from ..errors import exit_on_error
from ..hub import hub_errors
from .compare import check_request, compare


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what can be checked without the pipeline is checked before it is loaded."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # cp1252 and ASCII lack the table's arrows
    parser = argparse.ArgumentParser("python -m t5slim.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--pipeline", required=True, help="folder or Hub id")
    add("--students", required=True, nargs="+", help="folders or Hub ids")
    add("--prompts", required=True, help="a file, as for distillation")
    add("--out", required=True, dest="output_dir", help="folder for the result")
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of the noise")
    add("--batch-size", type=int, default=8, help="prompts generated together")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    add("--device", help="such as cuda:1; the default is the accelerator, if there is one")
    add("--offload", choices=["model", "sequential"], help="CPU offload of the pipeline")
    add("--tokens", action="store_true", help="also measure own tokens and padding apart")
    what = "argument of the pipeline's call: a number or other JSON, or text (height=512)"
    add("pipeline_kwargs", nargs="*", type=key_value, metavar="key=value", help=what)
    options = vars(parser.parse_intermixed_args(arguments))
    pipeline, device, offload = (options.pop(name) for name in ("pipeline", "device", "offload"))
    dtype, folder = getattr(torch, options.pop("dtype")), options["output_dir"]
    options["pipeline_kwargs"] = dict(options["pipeline_kwargs"])
    with exit_on_error():
        check_request(*(options[k] for k in ("students", "prompts", "seeds", "output_dir")))
        students = options.pop("students")
        students = {name: SlimT5Encoder.from_pretrained(name, dtype=dtype) for name in students}
        with hub_errors(pipeline):
            index = diffusers.DiffusionPipeline.load_config(pipeline)
            cls = getattr(diffusers, index["_class_name"])
            check_pipeline_kwargs(cls, options["pipeline_kwargs"])
            pipe = cls.from_pretrained(pipeline, use_safetensors=True, dtype=dtype)
        device = device or torch.accelerator.current_accelerator(True) or "cpu"
        if offload:
            getattr(pipe, f"enable_{offload}_cpu_offload")(device=device)
        else:
            pipe.to(device)
        comparison = compare(pipe, students, **options)
    print(f"{comparison}\n\nThe same with images: {os.path.join(folder, 'comparison.html')}")


def key_value(argument: str) -> tuple[str, Any]:
    """Split `key=value`; the value is JSON or, if it isn't, text."""
    key, value = argument.split("=", 1)
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


if __name__ == "__main__":
    main()
