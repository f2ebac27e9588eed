from __future__ import annotations

import pytest
import torch

from t5slim.distill import EmbeddingLoss, VelocityLoss


def test_velocity_loss_is_the_mean_squared_error_of_each_sample() -> None:
    prediction = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    target = torch.tensor([[[1.0, 4.0]], [[3.0, 1.0]]])
    assert VelocityLoss()(prediction, target).tolist() == [2.0, 5.0]


def test_velocity_loss_is_float32_whatever_comes() -> None:
    prediction, target = torch.randn(2, 3, 8, 8, 8).bfloat16()
    loss = VelocityLoss()(prediction, target)
    assert loss.dtype == torch.float32 and loss.shape == (3,)
    expected = (prediction.double() - target.double()).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_embedding_loss_counts_the_rows_of_the_mask() -> None:
    rows = torch.zeros(2, 3, 2)
    target = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]]] * 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert EmbeddingLoss()(rows, target, mask).tolist() == [2.5, 1.0]
    torch.testing.assert_close(EmbeddingLoss()(rows, target), torch.full((2,), 86 / 3))


def test_masked_rows_get_no_gradient() -> None:
    rows = torch.randn(1, 3, 2, requires_grad=True)
    EmbeddingLoss()(rows, torch.zeros(1, 3, 2), torch.tensor([[1, 1, 0]])).sum().backward()
    assert rows.grad is not None
    assert rows.grad[0, :2].all() and not rows.grad[0, 2].any()


@pytest.mark.parametrize("loss", [VelocityLoss(), EmbeddingLoss()])
def test_shapes_that_would_broadcast_are_refused(loss: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(1, 3, 4\)"):
        loss(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4))
