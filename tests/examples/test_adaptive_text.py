"""Adaptive text embeddings, the example."""

import numpy as np
import pytest
import torch
from adaptive_text.adaptive_text import AdaptiveText
from tiny import PROMPTS, TINY_PIPELINES, call_kwargs, tiny_student

from t5slim import patch_pipeline
from t5slim.errors import DistillError


@pytest.mark.parametrize("name", ["flux", "sd3", "chroma"])
def test_the_score_rises_and_the_embeddings_stay_in_the_ball(name):
    pipe, scores, distances = TINY_PIPELINES[name](), [], []
    options = {"step_size": 0.01, "radius": 0.015, "updates": 3, "encoder": tiny_student(pipe)}
    sampler = AdaptiveText(pipe, steps=(1,), **options, pipeline_kwargs=call_kwargs(pipe))

    def score(clean, prompts):
        c, c_t = sampler._encoded[0], sampler.embeddings
        distances.append((c_t - c).flatten(1).norm(dim=1) / c.flatten(1).norm(dim=1))
        scores.append(-(clean - sampler.clean(sampler.slot_embeddings)).square().flatten(1).sum(1))
        return scores[-1]

    refined = sampler.generate(PROMPTS[:2], score)
    assert torch.stack(scores).diff(dim=0).gt(0).all()
    assert torch.allclose(torch.stack(distances)[:, 0], torch.tensor([0, 0.01, 0.015]), rtol=1e-3)
    sampler.steps = ()
    plain = sampler.generate(PROMPTS[:2], score)
    assert len(scores) == 3 and not np.array_equal(refined[0], plain[0])
    call = call_kwargs(pipe) | {"generator": torch.Generator().manual_seed(0), "output_type": "pil"}
    assert np.array_equal(plain, patch_pipeline(pipe, sampler.encoder)(PROMPTS[:2], **call).images)
    with pytest.raises(DistillError, match="DDIMScheduler; expected one of flow matching"):
        AdaptiveText(TINY_PIPELINES["pixart_sigma"](), steps=(), step_size=1, radius=1)
