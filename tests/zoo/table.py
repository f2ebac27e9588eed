"""Writes the table of docs/pipelines.md: what is measured on each pipeline class.

python tests/zoo/table.py
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import diffusers
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from zoo import CASES
from zoo.facts import measure

TABLE = Path(__file__).parents[2] / "docs" / "pipelines.md"


def main() -> None:
    warnings.simplefilter("ignore")
    groups: dict[str, list[str]] = defaultdict(list)
    for case in tqdm(CASES.values(), "pipelines"):
        groups[measure(case).group].append(f"`{case.name}`")
    lines = [
        f"{group} {', '.join(sorted(groups[group]))} |"
        for group in sorted(groups, key=lambda group: (not group.startswith("| gather"), group))
    ]
    distilled = sum(case.route != "none" for case in CASES.values())
    text = re.sub(r"diffusers [\d.]+", f"diffusers {diffusers.__version__}", TABLE.read_text())
    text = re.sub(r"\d+ classes; \d+ of", f"{len(CASES)} classes; {distilled} of", text)
    head, *_ = text.partition("| gather")
    TABLE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
