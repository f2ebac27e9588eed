"""Sound."""

from __future__ import annotations

from tiny import call_kwargs, tiny_stable_audio

from .case import Case

CASES = [
    Case(
        "StableAudioPipeline",
        lambda cls: tiny_stable_audio(),
        lambda: call_kwargs(tiny_stable_audio(), steps=2),
        route="fallback",
        why="encoder_hidden_states depends on T5's output",
    ),
]
