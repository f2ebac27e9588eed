"""What each layer of teacher and students knows of a caption: the picture of docs/lens.md.

python examples/lens.py --out lens.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from shapes_world.painting import CALL, SD3_STUDENT, STUDENT, load_pipeline

from t5slim.evaluate import lens

CAPTIONS = (
    "at the top a cyan circle and at the bottom a blue cross on a white background",
    'the yellow word "RL" on white',
)


def main() -> None:
    """Paint every layer, and put the sheets below each other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("lens.png"))
    parser.add_argument("--captions", nargs="+", default=CAPTIONS)
    args = parser.parse_args()
    pipe = load_pipeline()
    students = {"FLUX's student": STUDENT, "SD3's student": SD3_STUDENT}
    sheets = [
        lens(pipe, caption, students, pipeline_kwargs=CALL).sheet() for caption in args.captions
    ]
    size = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    whole, top = Image.new("RGB", size, "white"), 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    whole.save(args.out)


if __name__ == "__main__":
    main()
