import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from t5slim.distill import DistillConfig
from t5slim.errors import ConfigError


@pytest.mark.parametrize(
    "changes",
    [
        *({"max_steps": steps} for steps in (2.5, 10**9)),
        {"learning_rate": math.nan},
        {"prompt_dropout": 1.0},
        {"mixed_precision": "fp8"},
        {"objective": "images"},
        {"objective": {"velocity": 0}},
        {"embedding_phase": 1.5},
        {"seed": 2**31},
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
    (group,) = config.adamw([nn.Parameter(torch.ones(1))], 768).param_groups
    assert (group["lr"], group["weight_decay"], config.warmup_steps) == (1e-4, 1e-3, 500)
    assert config.batch_size == 32 and config.reservoir_size == 0 and config.zero_pooled
    assert config.lr_schedule == "constant" and config.ema_decay == 0.0
    assert config.weights_at(0) == config.weights_at(9) == {"velocity": 1}


@pytest.mark.parametrize(
    "settings, with_velocity",
    [
        ({}, [50, 66, 82, 98]),
        ({"embedding_phase": 0.9, "velocity_every": 4}, [90, 94, 98]),
        ({"embedding_phase": 0.0, "velocity_every": 1}, list(range(100))),
        ({"embedding_phase": 1.0}, []),
        ({"objective": {"embedding": 2, "fisher": 3}}, []),
        ({"objective": "velocity"}, list(range(100))),  # it has nothing to wait for
    ],
)
def test_when_velocity_takes_part(settings: dict[str, Any], with_velocity: list[int]) -> None:
    config = DistillConfig(max_steps=100, **settings)
    weights = [config.weights_at(step) for step in range(100)]
    assert [step for step, of_step in enumerate(weights) if "velocity" in of_step] == with_velocity
    for of_step in weights:
        assert of_step | {"velocity": None} == dict(config.objective) | {"velocity": None}
