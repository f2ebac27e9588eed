"""The console command `t5slim`."""

import argparse
import sys
from importlib import import_module

from . import __version__, students


def main() -> None:
    """Run a command of t5slim; `python -m t5slim.distill` and `.evaluate` do the same."""
    packages = {"distill": "distill", "compare": "evaluate", "students": ""}
    parser = argparse.ArgumentParser(prog="t5slim", usage="t5slim {distill,compare,students} ...")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=packages)
    if not (package := packages[parser.parse_args(sys.argv[1:2]).command]):
        return print(students())
    try:
        module = import_module(f"{__package__}.{package}.__main__")  # loads diffusers
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is missing: pip install 't5slim[train,evaluate]'")
    module.main(sys.argv[2:])
