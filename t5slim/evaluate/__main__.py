"""Compare from the command line.

python -m t5slim.evaluate --pipeline black-forest-labs/FLUX.1-dev --prompts prompts.txt \
    --students my-student LifuWang/DistillT5 --out comparison height=512 num_inference_steps=20
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ..command import plain_errors
from ..distill.sources import PipelineSource
from ..distill.yaml_file import change
from .measure import compare


def main(arguments: Sequence[str] | None = None) -> None:
    """What `python -m t5slim.evaluate` does."""
    parser = argparse.ArgumentParser(
        prog="python -m t5slim.evaluate",
        description="Paint the same prompts under a pipeline's T5 and under students, and measure.",
    )
    parser.add_argument("--pipeline", required=True, help="a folder or a Hub id")
    parser.add_argument("--students", required=True, nargs="+", help="folders or Hub ids")
    parser.add_argument("--prompts", required=True, help="a file, as for distillation")
    parser.add_argument("--out", required=True, help="a folder; what is finished there, stays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the noise")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts painted together")
    parser.add_argument("--dtype", default="bfloat16", help="of the pipeline")
    parser.add_argument("--device", help="such as cuda:1; by default what there is")
    parser.add_argument("--offload", help="model or sequential")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")
    parser.add_argument("--tokens", action="store_true", help="own tokens and padding apart")
    parser.add_argument(
        "pipeline_kwargs", nargs="*", metavar="key=value",
        help="how the pipeline is called, values in YAML (height=512)",
    )  # fmt: skip
    given = parser.parse_intermixed_args(arguments)
    with plain_errors(f"Stopped. The same command goes on with what is finished in {given.out}."):
        kwargs: dict[str, object] = {}
        change(kwargs, given.pipeline_kwargs)
        source = PipelineSource(
            given.pipeline, dtype=given.dtype, device=given.device, offload=given.offload,
            local_files_only=given.local_files_only,
        )  # fmt: skip
        found = torch.accelerator.current_accelerator(check_available=True)
        pipe = source.load(source.pipeline_class(), found or torch.device("cpu"))
        comparison = compare(
            pipe, given.students, given.prompts, seeds=given.seeds, pipeline_kwargs=kwargs,
            batch_size=given.batch_size, tokens=given.tokens, output_dir=given.out,
        )  # fmt: skip
    print(comparison)
    print(f"\nThe same with pictures: {given.out}/comparison.html")


if __name__ == "__main__":
    main()
