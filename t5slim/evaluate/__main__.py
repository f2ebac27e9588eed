"""`t5slim compare`: students compared with their teacher; see docs/comparing.md."""

import sys
from collections.abc import Sequence

from ..distill.arguments import Prompts, command_parser, exit_on_error, parse_arguments
from ..distill.pipeline import check_pipeline_kwargs
from .compare import check_request, compare


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what can be checked without the pipeline is checked before it is loaded."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # cp1252 and ASCII lack the table's arrows
    parser = command_parser("t5slim compare", as_positional=True)
    parser.add_argument("students", nargs="+", help="folders or Hub ids, before the options")
    parser.add_argument("prompts", type=Prompts, help="file, or folder with one for each category")
    skip: set[str | int] = {"pipe", "students", "prompts", "judge", "distances"}
    parser.add_function_arguments(compare, skip=skip)
    with exit_on_error():
        run, _ = parse_arguments(parser, arguments)
        check_request(run.students, run.prompts, run.seeds, run.output_dir)
        check_pipeline_kwargs(run.pipeline.cls, run.pipeline_kwargs)
        print(compare(run.pop("pipeline").load(), **vars(run)))
    if run.output_dir is not None:
        print(f"\nThe same with images: {run.output_dir}/comparison.html")


if __name__ == "__main__":
    main()
