"""Accuracy of a miniature pipeline on held-out captions, with and without an idle sentence.

python examples/shapes_world/measure.py --count 500
python examples/shapes_world/measure.py --count 500 --student examples/shapes_world/student
python examples/shapes_world/measure.py --count 500 --pipeline examples/shapes_world/sd3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import t5slim

sys.path.insert(0, str(Path(__file__).parents[1]))
from shapes_world import judge, world
from shapes_world.generation import PIPELINE, captions, generate, load_pipeline


def main() -> None:
    """Generate the same scenes from the same noise twice, and let the judge read them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--student", help="a folder or Hub id; default: the teacher")
    parser.add_argument("--count", type=int, default=300, help="captions of each criterion")
    parser.add_argument(
        "--max-sequence-length", type=int, default=world.MAX_TOKENS, help="of T5: text and padding"
    )
    args = parser.parse_args()
    pipe = load_pipeline(args.pipeline)
    if args.student:
        t5slim.patch_pipeline(pipe, args.student)
    results = {}
    for name, chatter in (("caption alone", 0.0), ("with a sentence", 1.0)):
        scenes, texts = captions(args.count, held_out=True, chatter=chatter)
        images = generate(pipe, texts, max_sequence_length=args.max_sequence_length)
        results[name] = judge.accuracy(scenes, images)
    print(" " * 12 + "".join(f"{name:>18}" for name in results))
    for key in next(iter(results.values())):
        print(f"{key:<12}" + "".join(f"{result[key]:>18.1%}" for result in results.values()))


if __name__ == "__main__":
    main()
