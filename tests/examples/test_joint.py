"""One student for two pipelines: updates take turns, and both learn."""

import pytest
from helpers.training import quick
from joint.joint import train_joint
from tiny import PROMPTS, call_kwargs, tiny_flux, tiny_sd3, tiny_student

from t5slim.distill import DistillConfig, train, velocity_gap


def two_pipelines():
    """FLUX and SD3 with one teacher, as T5-XXL is in both."""
    flux, sd3 = tiny_flux(), tiny_sd3()
    sd3.register_modules(text_encoder_3=flux.text_encoder_2)
    return [flux, sd3], [call_kwargs(flux, 2), call_kwargs(sd3, 2)]


def test_updates_take_turns_and_each_prompt_is_encoded_once():
    pipes, kwargs = two_pipelines()
    encoded = []
    # Of the stack within, as the teacher's own forward is intercepted.
    pipes[0].text_encoder_2.encoder.register_forward_hook(lambda *_: encoded.append(1))
    student = tiny_student(pipes[0])
    settings = quick(max_steps=8, prompt_dropout=0.0)
    flux, sd3 = train_joint(pipes, student, PROMPTS[:4], settings, pipeline_kwargs=kwargs)
    # 4 updates each; SD3 is guided, but batches hold as many samples.
    assert flux.student_samples == sd3.student_samples == 4 * 4
    assert len(encoded) == 2  # the prompts, and SD3's negative prompt
    assert not student.training
    pipes[1] = tiny_sd3()
    with pytest.raises(ValueError, match="share one T5, got 2"):
        train_joint(pipes, student, PROMPTS, settings, pipeline_kwargs=kwargs)


def test_gaps_reach_those_of_single_runs():
    """Untrained: 0.95 and 1.0."""
    pipes, kwargs = two_pipelines()
    changes = {"warmup_steps": 4, "learning_rate": 1e-2, "prompt_dropout": 0.0}
    changes |= {"objective": DistillConfig().objective}
    joint = tiny_student(pipes[0], dropout_rate=0.0)
    train_joint(pipes, joint, PROMPTS[:4], quick(max_steps=240, **changes), pipeline_kwargs=kwargs)
    for pipe, call in zip(pipes, kwargs, strict=True):
        alone = tiny_student(pipe, dropout_rate=0.0)
        train(pipe, alone, PROMPTS[:4], quick(max_steps=120, **changes), pipeline_kwargs=call)
        gap, single = (
            velocity_gap(pipe, student, PROMPTS[:4], pipeline_kwargs=call)
            for student in (joint, alone)
        )
        assert gap < 0.1 and single < 0.1
