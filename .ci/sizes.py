"""The bounds that keep t5slim small: `python .ci/sizes.py` exits with 1 past one of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

LIMITS = {
    "lines of t5slim/, docstrings included": 5_200,
    "modules of t5slim/": 24,
    "lines of the longest module": 450,
    "exported names": 30,
    "settings of DistillConfig": 24,
    "lines of tests/": 8_000,
    "bytes of examples/": 36_000_000,
    "words of docs/ without the log": 8_000,
}


def tracked(*patterns: str) -> list[Path]:
    """The files that git tracks."""
    command = ["git", "ls-files", "-z", *patterns]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := Path(name)).is_file()]


def lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def exported(path: Path) -> int:
    """How many names a package's `__all__` holds."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return len(ast.literal_eval(node.value))
    return 0


def settings(path: Path, name: str) -> int:
    """How many fields a dataclass has."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return sum(isinstance(child, ast.AnnAssign) for child in node.body)
    raise SystemExit(f"{path} has no class {name}.")


def main() -> int:
    package = tracked("t5slim/*.py")
    modules = [path for path in package if path.name != "__init__.py"]
    pages = [path for path in tracked("docs/*.md") if path.name != "log.md"]
    found = {
        "lines of t5slim/, docstrings included": sum(map(lines, package)),
        "modules of t5slim/": len(modules),
        "lines of the longest module": max(map(lines, package)),
        "exported names": sum(exported(p) for p in package if p.name == "__init__.py"),
        "settings of DistillConfig": settings(Path("t5slim/distill/config.py"), "DistillConfig"),
        "lines of tests/": sum(map(lines, tracked("tests/*.py"))),
        "bytes of examples/": sum(path.stat().st_size for path in tracked("examples")),
        "words of docs/ without the log": sum(len(p.read_text("utf-8").split()) for p in pages),
    }
    for name, limit in LIMITS.items():
        verdict = "" if found[name] <= limit else "  <- too many"
        print(f"{name:<40} {found[name]:>12,}  of {limit:>12,}{verdict}")
    return int(any(found[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
