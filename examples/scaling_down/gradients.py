r"""Share of signal in a batch's gradient, where a student is halfway through `study.py`'s runs.

    python examples/scaling_down/gradients.py --runs runs

The gradients of two batches agree in what all prompts have in common, and differ in the rest. The
part that they share, of their squared length, is what an update learns. The rest is noise, by which
an optimizer that divides by the gradient's own size steps just as far.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from t5slim import SlimT5Encoder
from t5slim.distill import capture
from t5slim.distill.objective import embedding_loss, velocity_loss
from t5slim.distill.pipeline import call_encoder, frozen
from t5slim.distill.replay import collate, predict, split_trajectory
from t5slim.distill.teacher import TeacherEmbeddings

sys.path.insert(0, str(Path(__file__).parents[1]))
from scaling_down.study import SIZES, Group
from shapes_world.generation import CALL, captions, load_pipeline

TRAJECTORIES, BATCHES = 64, 24
BATCH_SIZES = {"embedding": 16, "velocity": 8}  # as in the study


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="where the study's students are")
    args = parser.parse_args()
    pipe, teacher, rng = load_pipeline(), TeacherEmbeddings(), random.Random(0)
    texts = rng.sample(captions(500, held_out=False)[1], TRAJECTORIES)
    samples = []
    for i in range(0, TRAJECTORIES, 16):
        trajectory = capture(pipe, texts[i : i + 16], pipeline_kwargs=CALL, seed=i, teacher=teacher)
        for call in split_trajectory(trajectory):
            samples += [(call, place) for place in range(len(call))]
    prompts = sorted({prompt for call, _ in samples for prompt in call.prompts})

    def of_embeddings(student: nn.Module) -> Tensor:
        batch = rng.sample(prompts, BATCH_SIZES["embedding"])
        target = teacher.get(pipe.text_encoder_2, batch, pipe.device)
        return embedding_loss(call_encoder(student, *teacher.tokens(batch, pipe.device)), target)

    def of_predictions(student: nn.Module) -> Tensor:
        batch = collate(rng.sample(samples, BATCH_SIZES["velocity"]))
        embeddings = call_encoder(student, *teacher.tokens(batch.prompts, pipe.device))
        return velocity_loss(predict(pipe, batch, embeddings), batch.target)

    print("| size | embedding | velocity |\n|---|---:|---:|")
    with frozen(pipe, gradient_checkpointing=False):
        for size in SIZES:
            folder = args.runs / Group(size, 0).name / "embedding"
            if folder.exists():
                student = SlimT5Encoder.from_pretrained(folder, dtype=torch.float32)
                student.to(pipe.device)
                shares = [signal(student, losses) for losses in (of_embeddings, of_predictions)]
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
