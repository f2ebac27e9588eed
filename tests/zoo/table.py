"""Writes docs/pipelines.md out of what is measured on each pipeline class.

python tests/zoo/table.py                          # all
python tests/zoo/table.py FluxPipeline WanPipeline # print the lines of some
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tqdm.auto import tqdm

from zoo import CASES, NOT_COVERED
from zoo.facts import Facts, measure

TABLE = Path(__file__).parents[2] / "docs" / "pipelines.md"
HEAD = """\
# Pipelines

Every pipeline class of diffusers {version} with a T5 or UMT5 in a text slot, built tiny of its
own real components and measured by `python tests/zoo/table.py`, which writes this page;
`pytest tests/test_every_pipeline.py` measures again and compares.

For each class, a student changes what the pipeline generates, and `unpatch_pipeline` restores it,
bitwise. Wherever there is a route for distillation, each denoiser call predicts bitwise what it did
when it is given the teacher's own embeddings, and the loss reaches the student's weights:

- **gather**: the student's embeddings replace the teacher's in the denoiser's arguments.
- **fallback**: the student runs through the pipeline's own code, for the reason that follows
  ([how both work](architecture.md)).

{count} classes; {distilled} of them can be distilled for.

| pipeline | slot | encoder | route |
|---|---|---|---|
"""


def main() -> None:
    """Measure, and write or print."""
    import diffusers

    warnings.simplefilter("ignore")
    names = sys.argv[1:] or sorted(name for name, case in CASES.items() if case.cls is not None)
    facts: list[Facts] = [measure(CASES[name]) for name in tqdm(names, "pipelines")]
    lines = [one.line for one in facts]
    if sys.argv[1:]:
        print("\n".join(lines))
        return
    head = HEAD.format(
        version=diffusers.__version__,
        count=len(facts) + len(NOT_COVERED),
        distilled=sum(one.route != "none" for one in facts),
    )
    text = head + "\n".join(lines) + "\n"
    if NOT_COVERED:
        text += "\nNot covered:\n\n"
        text += "".join(f"- `{name}`: {why}\n" for name, why in sorted(NOT_COVERED.items()))
    TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
