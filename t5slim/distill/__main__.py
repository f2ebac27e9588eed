"""Distil from the command line.

python -m t5slim.distill --config run.yaml
python -m t5slim.distill --config run.yaml --dry-run config.max_steps=1000
accelerate launch --num_processes 8 -m t5slim.distill --config run.yaml
torchrun --nproc_per_node 8 -m t5slim.distill --config run.yaml
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..command import plain_errors


def main(arguments: Sequence[str] | None = None) -> None:
    """What `python -m t5slim.distill` does."""
    parser = argparse.ArgumentParser(
        prog="python -m t5slim.distill",
        description="Distil a student for a diffusers pipeline, as a YAML file says.",
    )
    parser.add_argument("--config", required=True, help="the YAML file")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan: memory, rows, disk, time"
    )
    parser.add_argument(
        "changes", nargs="*", metavar="key=value",
        help="what differs from the file: dotted keys, values in YAML (config.max_steps=1000)",
    )  # fmt: skip
    given = parser.parse_intermixed_args(arguments)
    with plain_errors():
        from accelerate import PartialState  # type: ignore[import-untyped]

        from .run import DistillRun

        run = DistillRun.load(given.config, given.changes)
        outcome = run.plan() if given.dry_run else run.train()
        if PartialState().is_main_process:
            for part in outcome if isinstance(outcome, list) else [outcome]:
                print(part)


if __name__ == "__main__":
    main()
