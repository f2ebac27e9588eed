from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from t5slim.distill import DistillConfig
from t5slim.errors import ConfigError


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 2.5},
        {"learning_rate": math.nan},
        {"prompt_dropout": 1.0},
        {"mixed_precision": "fp8"},
        {"objective": "images"},
        {"objective": {"velocity": 0}},
        {"annealing": 1.5},
        {"seed": 2**31},
        {"max_steps": 10**9},
        {"max_grad_norm": 10**400},
        {"gradient_checkpointing": "no"},
        {"guidance_scales": [1, "2"]},
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(changes))}.*expected"):
        DistillConfig(**changes)


def test_numbers_of_numpy_are_taken_as_pythons() -> None:
    config = DistillConfig(batch_size=np.int64(4), reuse=np.float32(1.5), zero_pooled=np.bool_(1))
    assert config == DistillConfig(batch_size=4, reuse=1.5, zero_pooled=True)
    assert json.dumps(vars(config))


def test_the_papers_settings() -> None:
    config = DistillConfig.paper(max_steps=10)
    assert config.max_steps == 10
    assert (config.learning_rate, config.weight_decay, config.warmup_steps) == (1e-4, 1e-3, 500)
    assert config.batch_size == 32 and config.reservoir_size == 0 and config.zero_pooled
    assert config.lr_schedule == "constant" and config.ema_decay == 0.0
    assert config.weights_at(0) == config.weights_at(9) == {"velocity": 1}


@pytest.mark.parametrize(
    "settings, step, expected",
    [
        ({}, 0, {"velocity": 1, "embedding": 10}),
        ({}, 125, {"velocity": 1, "embedding": 5}),
        ({}, 249, {"velocity": 1, "embedding": 0.04}),
        ({}, 250, {"velocity": 1}),
        ({"objective": {"velocity": 2, "relational": 3}, "annealing": 0}, 499, [2, 3]),
        ({"objective": {"embedding": 2, "relational": 3}}, 499, [2, 3]),  # nothing to make room for
        ({"objective": {"velocity": 2, "relational": 3}, "annealing": 1}, 499, [2, 0.006]),
    ],
)
def test_embedding_matching_is_annealed_to_zero(
    settings: dict[str, Any], step: int, expected: Any
) -> None:
    weights = DistillConfig(max_steps=500, **settings).weights_at(step)
    weights = weights if isinstance(expected, dict) else list(weights.values())
    assert weights == pytest.approx(expected)
