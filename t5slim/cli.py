"""The console command `t5slim`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from . import __version__


def main() -> None:
    """Run a command of t5slim; `python -m t5slim.<command>` does the same."""
    parser = argparse.ArgumentParser(prog="t5slim", usage="t5slim {distill,evaluate} ... [--help]")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=["distill", "evaluate"])
    command = parser.parse_args(sys.argv[1:2]).command
    import_module(f"{__package__}.{command}.__main__").main(sys.argv[2:])  # loads diffusers
