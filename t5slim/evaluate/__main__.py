"""`t5slim evaluate`: students compared with their teacher; see docs/comparing.md."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from ..distill.__main__ import command_parser, parse_arguments
from ..distill.pipeline import check_pipeline_kwargs
from ..errors import exit_on_error
from .compare import check_request, compare


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what can be checked without the pipeline is checked before it is loaded."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # cp1252 and ASCII lack the table's arrows
    parser = command_parser("t5slim evaluate")
    skip: set[str | int] = {"pipe", "judge", "distances"}
    names = parser.add_function_arguments(compare, skip=skip, as_positional=False)
    with exit_on_error():
        run, _ = parse_arguments(parser, arguments)
        check_request(run.students, run.prompts, run.seeds, run.output_dir)
        check_pipeline_kwargs(run.pipeline.cls, run.pipeline_kwargs)
        print(compare(run.pipeline.load(), **{name: run[name] for name in names}))
    if run.output_dir is not None:
        print(f"\nThe same with images: {run.output_dir}/comparison.html")


if __name__ == "__main__":
    main()
