from __future__ import annotations

import json
import math
from typing import Any

import pytest

from t5slim.distill import DistillConfig
from t5slim.errors import ConfigError


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 0},
        {"max_steps": -5},
        {"max_steps": 2.5},
        {"max_steps": True},
        {"max_seconds": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": "1e-4"},
        {"weight_decay": -1.0},
        {"warmup_steps": -1},
        {"lr_schedule": "cyclic"},
        {"max_grad_norm": 0.0},
        {"reservoir_walks": 8, "batch_size": 32},
        {"reuse": 0.0},
        {"guidance_scales": (2.0, -1.0)},
        {"zero_pooled": 1},
        {"empty_prompt_share": 1.0},
        {"ema_decay": 1.0},
        {"mixed_precision": "fp8"},
        {"objective": "images"},
        {"eval_every": 0},
        {"seed": None},
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        DistillConfig(**changes)


def test_the_papers_settings() -> None:
    config = DistillConfig.paper(max_steps=10)
    assert config.max_steps == 10
    assert config.guidance_scales == (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
    assert (config.learning_rate, config.weight_decay, config.warmup_steps) == (1e-4, 1e-3, 500)
    assert config.batch_size == 32 and config.reservoir_walks == 0 and config.zero_pooled
    assert config.lr_schedule == "constant" and config.ema_decay == 0.0


def test_learning_rate_warms_up_and_ends_with_the_steps() -> None:
    config = DistillConfig(max_steps=1000, warmup_steps=9, learning_rate=1.0)
    assert config.learning_rate_at(0, 0.0) == pytest.approx(0.1)
    assert config.learning_rate_at(9, 0.0) == pytest.approx(1.0, abs=1e-3)
    assert config.learning_rate_at(500, 0.0) == pytest.approx(0.5)
    assert config.learning_rate_at(999, 0.0) == pytest.approx(0.0, abs=1e-5)


def test_learning_rate_ends_with_the_time_if_that_is_first() -> None:
    config = DistillConfig(max_steps=1000, max_seconds=60.0, warmup_steps=0, learning_rate=1.0)
    assert config.learning_rate_at(10, 30.0) == pytest.approx(0.5)
    assert config.learning_rate_at(500, 3.0) == pytest.approx(0.5)
    assert config.learning_rate_at(10, 61.0) == pytest.approx(0.0)


def test_settings_survive_json() -> None:
    config = DistillConfig(guidance_scales=(3.5,), seed=3)
    assert DistillConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_turns_may_be_shares_of_the_run() -> None:
    objective = {"embedding": {"until": 0.5}, "velocity": {"start": 0.5}}
    terms = DistillConfig(max_steps=500, objective=objective).terms
    assert terms["embedding"].until == terms["velocity"].start == 250
    assert terms["embedding"].weight_at(0) == 1 and terms["velocity"].weight_at(249) == 0
    short = DistillConfig(max_steps=2, objective=objective).terms
    assert short["velocity"].weight_at(1) == 1 and short["embedding"].weight_at(1) == 0


def test_by_default_velocity_is_there_from_the_start_and_alone_in_the_end() -> None:
    terms = DistillConfig(max_steps=500).terms
    assert [terms["velocity"].weight_at(update) for update in (0, 249, 499)] == [1, 1, 1]
    assert [terms["embedding"].weight_at(update) for update in (0, 125, 250, 499)] == [10, 5, 0, 0]
