"""LoRA, ControlNet and few-step denoiser of the teacher's pipeline, under the student."""

import numpy as np
import pytest
import torch
from shapes_world import judge, world
from shapes_world.generation import CALL, STUDENT, captions, generate, load_pipeline
from transfer import transfer

import t5slim
from t5slim.distill import velocity_gap


@pytest.fixture
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def student():
    return t5slim.SlimT5Encoder.from_pretrained(STUDENT, dtype=torch.float32)


def right(scenes, images):
    """Share of the images that show their scene whole."""
    return np.mean([judge.read(i) == s for s, i in zip(scenes, images, strict=True)])


def distance(left, right):
    """Root mean square, of 255."""
    return np.sqrt(np.square(np.subtract(left, right, dtype=float)).mean())


@pytest.mark.parametrize("kind", transfer.KINDS)
def test_works_under_the_student_as_under_the_teacher(pipe, student, kind):
    scenes, texts = captions(2, held_out=True)
    wanted, changes = transfer.task(kind, scenes)
    changes = {"num_inference_steps": 4} | changes
    without = right(wanted, generate(pipe, texts, num_inference_steps=2))
    pipe = transfer.load(kind, pipe)
    gap = velocity_gap(pipe, student, texts, pipeline_kwargs=CALL | changes, batch_size=len(texts))
    assert 0 < gap < 0.1
    of_teacher = right(wanted, generate(pipe, texts, **changes))
    assert of_teacher >= (1 if kind == "few-step" else without + 0.5)
    t5slim.patch_pipeline(pipe, student)
    assert right(wanted, generate(pipe, texts, **changes)) >= of_teacher - 1 / len(texts)


def test_lora_comes_and_goes_in_a_patched_pipeline(pipe, student):
    t5slim.patch_pipeline(pipe, student)
    _, texts = captions(1, held_out=True)
    call = {"num_inference_steps": 4}
    before = generate(pipe, texts, **call)
    transfer.load("lora", pipe)
    assert distance(generate(pipe, texts, **call), before) > 10
    pipe.unload_lora_weights()
    assert distance(generate(pipe, texts, **call), before) == 0
    assert pipe.text_encoder_2 is student


def test_few_steps_come_closer_to_many(pipe, student):
    _, texts = captions(2, held_out=True)
    many = generate(pipe, texts, num_inference_steps=10)
    blurred = generate(pipe, texts, num_inference_steps=transfer.STEPS)
    transfer.load("few-step", pipe)
    sharp = generate(pipe, texts, num_inference_steps=transfer.STEPS)
    assert distance(sharp, many) < 0.8 * distance(blurred, many)
    t5slim.patch_pipeline(pipe, student)
    sharp = generate(pipe, texts, num_inference_steps=transfer.STEPS)
    assert distance(sharp, many) < 0.8 * distance(blurred, many)


@pytest.mark.parametrize("kind", transfer.KINDS)
def test_training_makes_what_loads(pipe, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TRANSFER", tmp_path / "transfer")
    transfer.MAKE[kind](pipe, tmp_path, count=12, steps=2)
    pipe = transfer.load(kind, load_pipeline())
    _, changes = transfer.task(kind, [world.Scene("white", "word", (), "SUN", "red")])
    (image,) = generate(pipe, ['the word "SUN" in red'], **changes | {"num_inference_steps": 1})
    assert image.shape == (64, 64, 3)
