"""A table without context in the place of the teacher, as a control for students.

    python examples/contextless/control.py --out examples/contextless/contextless.png

Teacher, table and the committed student generate the same held-out captions from the same noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from t5slim import SlimT5Encoder, patch_pipeline, unpatch_pipeline
from t5slim.distill import VelocityGap

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world import judge, world
from shapes_world.generation import CALL, STUDENT, captions, generate, grid, load_pipeline

from contextless.contextless import ContextlessEncoder


def main() -> None:
    """Measure velocity gap and accuracy, and draw the first captions of each criterion."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("contextless.png"), help="image grid")
    parser.add_argument("--student", default=STUDENT, help="a folder or Hub id")
    parser.add_argument("--captions", type=int, default=2000, help="to average, of each criterion")
    parser.add_argument("--count", type=int, default=33, help="to measure on, of each criterion")
    parser.add_argument("--steps", type=int, default=4, help="of each image")
    args = parser.parse_args()
    pipe = load_pipeline()
    prompts = captions(args.captions, held_out=False)[1]
    table = ContextlessEncoder.from_teacher(pipe, prompts, pipeline_kwargs=CALL)
    student = SlimT5Encoder.from_pretrained(args.student, dtype=pipe.dtype).to(pipe.device)
    scenes, texts = captions(args.count, held_out=True, seed=2)
    kwargs = CALL | {"num_inference_steps": args.steps}
    measure = VelocityGap(pipe, texts, pipeline_kwargs=kwargs)
    columns = {"teacher": generate(pipe, texts, **kwargs)}
    for name, encoder in {"table": table, "student": student}.items():
        print(f"{name}: velocity gap {measure.report(encoder)} on {len(measure.prompts)} captions")
        patch_pipeline(pipe, encoder, keep_teacher=True)
        columns[name] = generate(pipe, texts, **kwargs)
        unpatch_pipeline(pipe)
    for name, images in columns.items():
        right = judge.accuracy_with_intervals(scenes, images)
        print(f"{name}:", ", ".join(f"{key} {share}" for key, share in right.items()))
    of_each = range(min(2, args.count))
    shown = [k * args.count + i for k in range(len(world.CRITERIA)) for i in of_each]
    drawn = {name: [images[i] for i in shown] for name, images in columns.items()}
    image = grid([texts[i] for i in shown], drawn, cell=160)
    image.quantize(128).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
