r"""How much of a batch's gradient is signal, where a student is halfway through `study.py`'s runs.

    python examples/scaling_down/gradients.py --runs runs

Two batches' gradients agree in what all prompts ask for, and differ in the rest. What they share,
as a part of their squared length, is what an update learns. The rest is noise, by which an
optimizer that divides by the gradient's own size steps just as far.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from scaling_down.study import SIZES, Group
from shapes_world.painting import CALL, captions, load_pipeline

from t5slim import SlimT5Encoder
from t5slim.distill import EmbeddingLoss, VelocityLoss, capture
from t5slim.distill.replay import collate, predict, split_walk
from t5slim.distill.states import frozen
from t5slim.distill.teacher import PromptTable, encode_prompts

WALKS, BATCHES = 64, 24
ROWS_OF_BATCH = {"embedding": 16, "velocity": 8}  # as in the study


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="where the study's students are")
    args = parser.parse_args()
    pipe, table, rng = load_pipeline(), PromptTable(), random.Random(0)
    texts = rng.sample(captions(500, held_out=False)[1], WALKS)
    walks = [
        split_walk(pipe, capture(pipe, texts[i : i + 16], pipeline_kwargs=CALL, seed=i), table)
        for i in range(0, WALKS, 16)
    ]
    examples = [(call, row) for walk in walks for call in walk for row in range(len(call))]
    numbers = sorted({number for call, _ in examples for number in call.prompts})

    def of_rows(student: nn.Module) -> Tensor:
        batch = rng.sample(numbers, ROWS_OF_BATCH["embedding"])
        target = table.rows(pipe.text_encoder_2, batch, pipe.device)
        return EmbeddingLoss()(encode_prompts(student, table, batch, pipe.device), target)

    def of_predictions(student: nn.Module) -> Tensor:
        call = collate(rng.sample(examples, ROWS_OF_BATCH["velocity"]))
        rows = encode_prompts(student, table, call.prompts, pipe.device)
        return VelocityLoss()(predict(pipe, call, rows), call.target)

    print("| size | embedding | velocity |\n|---|---:|---:|")
    with frozen(pipe, gradient_checkpointing=False):
        for size in SIZES:
            folder = args.runs / Group(size, 0).name / "embedding"
            if folder.exists():
                student = SlimT5Encoder.from_pretrained(folder, dtype=torch.float32)
                student.to(pipe.device)
                shares = [signal(student, losses) for losses in (of_rows, of_predictions)]
                print(f"| {size} | {shares[0]:.1%} | {shares[1]:.1%} |", flush=True)


def signal(student: nn.Module, losses: Callable[[nn.Module], Tensor]) -> float:
    """The mean scalar product of two batches' gradients, over the mean square of one's length."""
    parameters = list(student.parameters())
    gradients = []
    for _ in range(BATCHES):
        parts = torch.autograd.grad(losses(student).mean(), parameters)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    squares = sum(gradient.square().sum() for gradient in gradients)
    products = sum(gradients).square().sum() - squares
    return (products / (BATCHES - 1) / squares).item()


if __name__ == "__main__":
    main()
