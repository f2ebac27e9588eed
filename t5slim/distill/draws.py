"""Which prompts a run draws, and when: known before it, out of its settings and its first walk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .config import DistillConfig
from .prompts import PromptSource


@dataclass(frozen=True)
class WalkShape:
    """What a walk asks the denoiser for each of its prompts; the same in all walks of a run.

    Attributes:
        teacher_rows: rows that it predicts.
        calls: of each of its calls that reads the prompt, the rows that do.
        whole: its calls can't be taken apart into rows.
    """

    teacher_rows: int
    calls: tuple[int, ...]
    whole: bool


@dataclass(frozen=True)
class Turn:
    """What an update draws.

    Attributes:
        first_draw: number of the first of its new prompts, of which there are as many as lanes;
            None if it needs none.
        walked: whether these are walked, or only read.
        student_rows: denoiser rows that are asked for a student, of each lane.
    """

    first_draw: int | None
    walked: bool
    student_rows: int


def turns(config: DistillConfig, processes: int, shape: WalkShape) -> Iterator[Turn]:
    """What each update of a run will draw, from 0 to `config.max_steps`, as `Examples` does it.

    Exact, unless the denoiser's calls can't be taken apart, are drawn from a reservoir and differ
    in their rows: then each is counted as the largest.
    """
    lanes = lanes_of(config, processes)
    velocity = config.terms.get("velocity")
    due, position, rounds, readings = 0.0, len(shape.calls), 0, 0
    for update in range(config.max_steps):
        if velocity is None or not velocity.weight_at(update):
            yield Turn(readings * lanes, walked=False, student_rows=0)
            readings += 1
            continue
        if config.reservoir_walks:
            new = due <= 0
            if new:
                due += config.reuse * (config.batch_size * sum(shape.calls))
            rows = max(shape.calls) if shape.whole else 1
            due -= config.batch_size * rows
        else:
            new = position == len(shape.calls)
            position = 0 if new else position
            rows = shape.calls[position]
            position += 1
        yield Turn(rounds * lanes if new else None, walked=new, student_rows=rows)
        rounds += new


def prompts_of_run(
    prompts: PromptSource, config: DistillConfig, processes: int, shape: WalkShape
) -> list[str]:
    """The prompts that a run will draw, each once: what `cache_teacher` has to be given.

    Args:
        prompts: of the run, with or without end.
        config: the settings.
        processes: that it runs in.
        shape: of its walks.
    """
    lanes = lanes_of(config, processes)
    drawn: dict[str, None] = {}  # an ordered set
    for update, turn in enumerate(turns(config, processes, shape)):
        if turn.first_draw is not None:
            for draw in range(turn.first_draw, turn.first_draw + lanes):
                drawn[draw_prompt(prompts, config, draw, update)] = None
    return list(drawn)


def lanes_of(config: DistillConfig, processes: int) -> int:
    """How many prompts are walked together, over all processes."""
    return config.batch_size * config.gradient_accumulation_steps * processes


def draw_prompt(prompts: PromptSource, config: DistillConfig, draw: int, update: int) -> str:
    """Prompt number `draw` of a run, drawn in an update."""
    if random_of(config, "empty", draw).random() < config.empty_prompt_share:
        return ""
    return prompts.prompt(draw, config.seed, update)


def random_of(config: DistillConfig, *key: Any) -> random.Random:
    """The generator for one purpose, out of the seed alone."""
    # A string is hashed by SHA-512: the same on every machine, and no two keys alike.
    return random.Random(f"{config.seed}/{key}")
