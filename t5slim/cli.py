"""The console command `t5slim`."""

import argparse
import sys
from importlib import import_module

from . import __version__, students


def main() -> None:
    """Run a command of t5slim; `python -m t5slim.distill` and `.evaluate` do the same."""
    commands = {"distill": "distill", "compare": "evaluate", "students": ""}
    parser = argparse.ArgumentParser("t5slim", "t5slim {distill,compare,students} ... [--help]")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=commands)
    if module := commands[parser.parse_args(sys.argv[1:2]).command]:
        import_module(f"{__package__}.{module}.__main__").main(sys.argv[2:])  # loads diffusers
    else:
        print(students())
