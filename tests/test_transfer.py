"""What was made for the teacher's pipeline, under the student: the committed LoRA, ControlNet and
few-step denoiser, and how they are trained."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import t5slim
from t5slim.distill import velocity_gap

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import transfer
from shapes_world import judge, world
from shapes_world.painting import CALL, STUDENT, captions, load_pipeline, paint


@pytest.fixture
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def student():
    return t5slim.SlimT5Encoder.from_pretrained(STUDENT, dtype=torch.float32)


def right(scenes, pictures):
    """Share of the pictures that show their scene whole."""
    return np.mean([judge.read(p) == s for s, p in zip(scenes, pictures, strict=True)])


def apart(left, right):
    """Root mean square, of 255."""
    return np.sqrt(np.square(np.subtract(left, right, dtype=float)).mean())


@pytest.mark.parametrize("kind", transfer.KINDS)
def test_works_under_the_student_as_under_the_teacher(pipe, student, kind):
    scenes, texts = captions(2, held_out=True)
    wanted, changes = transfer.asked(kind, scenes)
    changes = {"num_inference_steps": 4} | changes
    without = right(wanted, paint(pipe, texts, num_inference_steps=2))
    pipe = transfer.load(kind, pipe)
    gap = velocity_gap(pipe, student, texts, pipeline_kwargs=CALL | changes, batch_size=len(texts))
    assert 0 < gap < 0.1
    of_teacher = right(wanted, paint(pipe, texts, **changes))
    assert of_teacher >= (1 if kind == "few-step" else without + 0.5)
    t5slim.patch_pipeline(pipe, student)
    assert right(wanted, paint(pipe, texts, **changes)) >= of_teacher - 1 / len(texts)


def test_lora_comes_and_goes_in_a_patched_pipeline(pipe, student):
    t5slim.patch_pipeline(pipe, student)
    _, texts = captions(1, held_out=True)
    call = {"num_inference_steps": 4}
    before = paint(pipe, texts, **call)
    transfer.load("lora", pipe)
    loaded = paint(pipe, texts, **call)
    assert apart(loaded, before) > 10
    pipe.fuse_lora()
    assert apart(paint(pipe, texts, **call), loaded) < 0.1
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    # Fusing and taking apart again rounds the weights.
    assert apart(paint(pipe, texts, **call), before) < 0.1


def test_unloading_a_lora_is_exact(pipe, student):
    t5slim.patch_pipeline(pipe, student)
    state = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    transfer.load("lora", pipe).unload_lora_weights()
    after = pipe.transformer.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert pipe.text_encoder_2 is student


def test_few_steps_come_closer_to_many(pipe, student):
    _, texts = captions(2, held_out=True)
    many = paint(pipe, texts, num_inference_steps=10)
    blurred = paint(pipe, texts, num_inference_steps=transfer.STEPS)
    transfer.load("few-step", pipe)
    sharp = paint(pipe, texts, num_inference_steps=transfer.STEPS)
    assert apart(sharp, many) < 0.8 * apart(blurred, many)
    t5slim.patch_pipeline(pipe, student)
    sharp = paint(pipe, texts, num_inference_steps=transfer.STEPS)
    assert apart(sharp, many) < 0.8 * apart(blurred, many)


@pytest.mark.parametrize("kind", transfer.KINDS)
def test_training_makes_what_loads(pipe, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TRANSFER", tmp_path / "transfer")
    transfer.MAKE[kind](pipe, tmp_path, count=12, steps=2)
    pipe = transfer.load(kind, load_pipeline())
    _, changes = transfer.asked(kind, [world.Scene("white", "word", (), "SUN", "red")])
    (picture,) = paint(pipe, ['the word "SUN" in red'], **changes | {"num_inference_steps": 1})
    assert picture.shape == (64, 64, 3)
