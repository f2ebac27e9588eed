"""The losses against values worked out by hand, and their weighted sum."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.training import quick
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_student

from t5slim.distill import Objective, TrajectoryReservoir
from t5slim.distill.objective import embedding_loss, fisher_information, velocity_loss
from t5slim.distill.pipeline import teacher_of
from t5slim.distill.replay import predictions


def test_velocity_loss_is_the_mean_squared_error_of_each_sample() -> None:
    prediction = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    target = torch.tensor([[[1.0, 4.0]], [[3.0, 1.0]]])
    assert velocity_loss(prediction, target).tolist() == [2.0, 5.0]
    # In float32: 257 and its square have no bfloat16.
    wide = velocity_loss(torch.full((1, 1), 256.0).bfloat16(), -torch.ones(1, 1).bfloat16())
    assert wide.dtype == torch.float32 and wide.item() == 257**2


def test_embedding_loss_counts_the_embeddings_of_the_mask() -> None:
    embeddings = torch.tensor([[[3.0, 3.0], [0.0, 0.0], [0.0, 0.0]]] * 2, requires_grad=True)
    target = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]]] * 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = embedding_loss(embeddings, target, mask)
    assert loss.tolist() == [4.0, 4.0]
    torch.testing.assert_close(embedding_loss(embeddings, target), torch.full((2,), 89 / 3))
    loss.sum().backward()
    assert embeddings.grad is not None
    assert torch.equal(embeddings.grad.any(-1), mask.bool())


def test_fisher_loss_weighs_directions_and_counts_the_embeddings_of_the_mask() -> None:
    fisher = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    target = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    embeddings = torch.zeros(1, 2, 2)
    loss = partial(embedding_loss, embeddings, target, fisher=fisher)
    assert loss().tolist() == [2.0 + 12.0]
    assert loss(torch.tensor([[1, 0]])).tolist() == [2.0]
    assert embedding_loss(-target, target, fisher=fisher).tolist() == [4 * 14.0]


@pytest.mark.parametrize("name", ["flux", "pixart_sigma"])
def test_fisher_loss_is_the_velocity_loss_of_small_errors(name: str) -> None:
    """On average over tokens, prompts and timesteps; and however the batches are cut."""
    pipe, generator, cpu = TINY_PIPELINES[name](), torch.Generator().manual_seed(0), "cpu"
    kwargs, teacher = call_kwargs(pipe), teacher_of(pipe)
    config = quick(batch_size=4, reservoir_size=8, max_steps=64, prompt_dropout=0.0)
    reservoir = TrajectoryReservoir(pipe, PROMPTS, config, pipeline_kwargs=kwargs)
    fisher = fisher_information(pipe, reservoir, config)
    assert torch.equal(fisher, fisher.T) and bool((torch.linalg.eigvalsh(fisher) > 0).all())

    def embeddings_of(known: dict[int, torch.Tensor], prompts: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([known[prompt] for prompt in prompts])

    sums = torch.zeros(2)
    for step in range(64):
        (batch,) = reservoir.batches(step)
        target = reservoir.teacher.get(teacher, batch.prompts, torch.device(cpu))
        _, mask = reservoir.teacher.tokens(batch.prompts, torch.device(cpu))
        disturbed = target + 1e-2 * torch.randn(target.shape, generator=generator)
        known = dict(zip(batch.prompts, disturbed, strict=True))
        disturbed = embeddings_of(known, batch.prompts)  # equal prompts have equal errors
        with torch.no_grad():
            (prediction,) = predictions(pipe, [batch], partial(embeddings_of, known))
        expected = embedding_loss(disturbed, target, mask, fisher=fisher).mean()
        sums += torch.stack([velocity_loss(prediction, batch.target).mean(), expected])
    # Not the same: a token of a short prompt counts for more than one of a long prompt.
    measured, predicted = sums.tolist()
    assert predicted == pytest.approx(measured, rel=0.4)
    halves = replace(config, batch_size=2, gradient_accumulation_steps=2)
    other = TrajectoryReservoir(pipe, PROMPTS, halves, pipeline_kwargs=kwargs)
    close = {"rtol": 1e-3, "atol": 1e-3 * fisher.max().item()}
    torch.testing.assert_close(fisher_information(pipe, other, halves), fisher, **close)


@pytest.mark.parametrize("name", ["flux", "pixart_sigma", "stable_audio"])
def test_the_objective_is_the_weighted_sum_of_its_losses(name: str) -> None:
    pipe = TINY_PIPELINES[name]()
    losses = {"velocity": 2.0, "embedding": 3.0, "fisher": 0.5}
    config = quick(prompt_dropout=0.0, objective=losses)
    student = tiny_student(pipe)
    reservoir = TrajectoryReservoir(pipe, PROMPTS, config, pipeline_kwargs=call_kwargs(pipe))
    objective = Objective(pipe, reservoir, config)
    (batch,) = reservoir.batches(0)

    def loss(**weights: float) -> Any:
        return objective(student, batch, weights)

    apart = [loss(velocity=1), loss(embedding=1), loss(fisher=1)]
    assert all(one.dtype == torch.float32 and one > 0 for one in apart)
    whole = loss(**losses)
    torch.testing.assert_close(whole, 2 * apart[0] + 3 * apart[1] + 0.5 * apart[2])
    whole.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("name, loss", [("flux", "fisher"), ("pixart_sigma", "embedding")])
def test_a_new_student_says_the_mean_of_each_token_whatever_stands_beside_it(
    name: str, loss: str
) -> None:
    pipe = TINY_PIPELINES[name]()
    config = quick(max_steps=8, prompt_dropout=0.0, objective=loss)
    reservoir = TrajectoryReservoir(pipe, PROMPTS, config, pipeline_kwargs=call_kwargs(pipe))
    prompts: Any = [p for step in range(8) for p in next(reservoir.batches(step, denoiser=False))]
    ids, mask = reservoir.teacher.tokens(prompts, pipe.device)
    counts = torch.ones_like(ids).bool() if mask is None else mask.bool()
    target = reservoir.teacher.get(teacher_of(pipe), prompts, pipe.device)[counts]
    student = tiny_student(pipe, d_model=12, initializer_factor=0.5).eval()
    objective = Objective(pipe, reservoir, config)
    objective.initialize(student, reservoir)
    token = torch.nn.functional.one_hot(ids[counts]).float()
    means = token.T @ target / token.sum(0)[:, None]
    # Of all tables with 11 channels, the one whose loss is the least.
    metric = torch.eye(means.shape[1]) if objective._fisher is None else objective._fisher
    values, vectors = torch.linalg.eigh(metric.double())
    root, inverse = ((vectors * values**power).float() for power in (0.5, -0.5))
    U, S, Vh = torch.linalg.svd(means[token.any(0)] @ root, full_matrices=False)
    means[token.any(0)] = (U * S)[:, :11] @ Vh[:11] @ inverse.T
    got = student(ids, attention_mask=mask)[0][counts]
    torch.testing.assert_close(got, means[ids[counts]], rtol=1e-3, atol=1e-3)
