"""How the commands of t5slim end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import T5SlimError


@contextmanager
def plain_errors(stopped: str = "Stopped.") -> Iterator[None]:
    """End with a message and an exit status, without a traceback, at an error of t5slim and at
    Ctrl-C; `stopped` is what is said then, if the interrupt itself says nothing.
    """
    try:
        yield
    except T5SlimError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{str(stop) or stopped}\n")
        sys.exit(130)
