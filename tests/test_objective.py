"""The losses against values worked out by hand, and their weighted sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.training import quick
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_student

from t5slim.distill import Objective, TrajectoryReservoir
from t5slim.distill.objective import embedding_loss, relational_loss, velocity_loss


def test_velocity_loss_is_the_mean_squared_error_of_each_sample() -> None:
    prediction = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    target = torch.tensor([[[1.0, 4.0]], [[3.0, 1.0]]])
    assert velocity_loss(prediction, target).tolist() == [2.0, 5.0]
    # In float32: 257 and its square have no bfloat16.
    wide = velocity_loss(torch.full((1, 1), 256.0).bfloat16(), -torch.ones(1, 1).bfloat16())
    assert wide.dtype == torch.float32 and wide.item() == 257**2


def test_embedding_loss_counts_the_embeddings_of_the_mask() -> None:
    embeddings = torch.zeros(2, 3, 2, requires_grad=True)
    target = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]]] * 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = embedding_loss(embeddings, target, mask)
    assert loss.tolist() == [2.5, 1.0]
    torch.testing.assert_close(embedding_loss(embeddings, target), torch.full((2,), 86 / 3))
    loss.sum().backward()
    assert embeddings.grad is not None
    assert torch.equal(embeddings.grad.any(-1), mask.bool())


def test_relational_loss_compares_the_distances_of_prompts() -> None:
    # Three prompts of one token: the teacher's are 3, 4 and 5 apart, 4 on average.
    target = torch.tensor([[[0.0, 0.0]], [[3.0, 0.0]], [[0.0, 4.0]]])
    loss = relational_loss
    assert loss(target + 7, target).tolist() == [0, 0, 0]  # only distances count
    collapsed = torch.ones(3, 1, 2, requires_grad=True)
    expected = [(9 + 16) / 16 / 2, (9 + 25) / 16 / 2, (16 + 25) / 16 / 2]
    assert loss(collapsed, target).tolist() == pytest.approx(expected)
    assert loss(2 * target, target).tolist() == pytest.approx(expected)
    loss(collapsed, target).sum().backward()
    assert collapsed.grad is not None and collapsed.grad.isfinite().all()
    padded = torch.cat([target, torch.randn(3, 1, 2)], 1)
    mask = torch.tensor([[1, 0]] * 3)
    assert loss(torch.zeros(3, 2, 2), padded, mask).tolist() == pytest.approx(expected)
    assert loss(target[:1], target[:1] + 1).tolist() == [0]  # alone


@pytest.mark.parametrize("name", ["flux", "pixart_sigma", "stable_audio"])
def test_the_objective_is_the_weighted_sum_of_its_losses(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    config = quick(prompt_dropout=0.0)
    student = tiny_student(pipe)
    reservoir = TrajectoryReservoir(pipe, PROMPTS, config, pipeline_kwargs=call_kwargs(pipe))
    objective = Objective(pipe, reservoir.teacher, config)
    (batch,) = reservoir.batches(0)

    def loss(**weights: float) -> Any:
        return objective(student, batch, weights)

    apart = [loss(velocity=1), loss(embedding=1), loss(relational=1)]
    assert all(one.dtype == torch.float32 and one > 0 for one in apart)
    whole = loss(velocity=2, embedding=3, relational=0.5)
    torch.testing.assert_close(whole, 2 * apart[0] + 3 * apart[1] + 0.5 * apart[2])
    whole.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
