"""Prompts for a distillation: lists, files, data sets, generators, mixtures and schedules."""

from .combined import (
    PromptMixture,
    Prompts,
    PromptSchedule,
    load_prompts,
    prompt_source,
    split_held_out,
)
from .sources import GeneratedPrompts, PromptList, PromptSource

__all__ = [
    "GeneratedPrompts",
    "PromptList",
    "PromptMixture",
    "PromptSchedule",
    "PromptSource",
    "Prompts",
    "load_prompts",
    "prompt_source",
    "split_held_out",
]
