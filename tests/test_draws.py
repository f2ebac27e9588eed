"""What a run draws is known before it: compared with what the run then asks for."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import TINY_PIPELINES, call_kwargs, tiny_student

from t5slim.distill import DistillConfig, GeneratedPrompts, PromptSchedule, train
from t5slim.distill.draws import prompts_of_run, turns
from t5slim.distill.examples import Examples
from t5slim.distill.prompts import PromptSource
from t5slim.distill.states import frozen
from t5slim.distill.teacher import PromptTable

WARM_UP = {"embedding": {"until": 4}, "velocity": {"start": 3}}


class Noted(PromptSource):
    """A schedule that remembers what it was asked."""

    def __init__(self) -> None:
        stages = [(GeneratedPrompts(kind), 5) for kind in ("compositional", "text_rendering")]
        self.inner = PromptSchedule(stages)
        self.asked: set[str] = set()

    def prompt(self, index: int, seed: int | str = 0, update: int = 0) -> str:
        prompt = self.inner.prompt(index, seed, update)
        self.asked.add(prompt)
        return prompt

    def facts(self) -> dict[str, Any]:
        return self.inner.facts()

    def fingerprint(self) -> str:
        return "noted"

    def _held_out(self, share: float) -> Any:
        raise NotImplementedError

    def _without(self, share: float) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    "name, settings",
    [
        ("flux", {"reuse": 0.7}),
        ("sd3", {"reuse": 2.0, "gradient_accumulation_steps": 2}),
        ("flux", {"reservoir_walks": 0}),
        ("flux", {"objective": WARM_UP}),
        ("stable_audio", {}),
        ("stable_audio", {"reservoir_walks": 0}),
        ("flux", {"objective": "embedding"}),
    ],
)
def test_prompts_and_rows_are_those_of_the_run(name: str, settings: dict[str, Any]) -> None:
    pipe = TINY_PIPELINES[name]()
    config = DistillConfig(
        **{"objective": "velocity", "max_steps": 14, "batch_size": 2, "reservoir_walks": 8}
        | {"empty_prompt_share": 0.1}
        | settings
    )
    kwargs = call_kwargs(pipe)
    with frozen(pipe, False):
        examples = Examples(pipe, GeneratedPrompts("compositional"), config, kwargs, PromptTable())
        shape = examples.walk()
    assert examples.walk_bytes > 0

    source = Noted()
    result = train(pipe, tiny_student(pipe), source, config, pipeline_kwargs=kwargs)
    planned = list(turns(config, 1, shape))
    lanes = config.batch_size * config.gradient_accumulation_steps
    assert set(prompts_of_run(source.inner, config, 1, shape)) - {""} == source.asked
    assert result.student_rows == lanes * sum(turn.student_rows for turn in planned)
    walks = sum(turn.walked for turn in planned)
    assert result.teacher_rows == lanes * shape.teacher_rows * walks
    assert len(planned) == config.max_steps
