"""The miniature world, its committed pipelines and students, and the quickstart."""

import random
import sys
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import FluxControlNetModel, SD3Transformer2DModel
from quickstart import quickstart
from safetensors.torch import load_file
from shapes_world import generation, judge, train, world
from shapes_world.generation import SD3, SD3_STUDENT, STUDENT, captions, generate, load_pipeline
from transformers import AutoConfig

import t5slim
from t5slim.distill import velocity_gap
from t5slim.slot import TextSlot

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("criterion", world.CRITERIA)
def test_judge_reads_drawn_scenes(criterion):
    rng = random.Random(0)
    scenes = [world.sample_scene(rng, criterion, held_out=i % 2 == 1) for i in range(200)]
    images = [world.draw(scene, rng) for scene in scenes]
    assert judge.accuracy(scenes, images)[criterion] >= 0.995


def test_judge_sees_what_is_wrong():
    thing = world.Thing("red", "circle")
    scene = world.Scene("white", "left-right", (thing, world.Thing("blue", "square")))
    swapped = world.Scene("white", "left-right", scene.things[::-1])
    recoloured = world.Scene("white", "left-right", (thing, world.Thing("green", "square")))
    one_more = world.Scene("white", "row", (world.Thing("red", "circle", "row"),) * 3)
    misspelled = world.Scene("white", "word", (), "SUM", "red")
    for other in (swapped, recoloured, one_more):
        assert judge.accuracy([scene], [world.draw(other)])["semantics"] == 0
    word = world.Scene("white", "word", (), "SUN", "red")
    assert judge.accuracy([word], [world.draw(misspelled)]) == {"text": 0, "letters": 2 / 3}


def test_training_and_held_out_scenes_are_disjoint():
    rng = random.Random(0)
    for criterion in world.CRITERIA:
        drawn = {
            split: {world.sample_scene(rng, criterion, held_out=split) for _ in range(500)}
            for split in (False, True)
        }
        assert len(drawn[True]) > 20
        assert not drawn[True] & drawn[False]


def test_captions_keep_their_scene_when_a_sentence_is_added():
    plain, talkative = (captions(20, held_out=True, chatter=chatter) for chatter in (0, 1))
    assert plain[0] == talkative[0]
    for short, long in zip(plain[1], talkative[1], strict=True):
        assert short in long
        assert short != long


def test_no_caption_is_truncated():
    _, texts = captions(500, held_out=False, chatter=1)
    tokenizer = load_pipeline().tokenizer_2
    for ids in tokenizer(texts).input_ids:
        assert len(ids) <= world.MAX_TOKENS
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("folder", sorted(EXAMPLES.glob("shapes_world/*/text_encoder*")), ids=str)
def test_committed_text_encoder_loads_whole(folder):
    """transformers names the weights of CLIP otherwise from version to version."""
    cls = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
    _, found = cls.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


@pytest.mark.parametrize(
    "cls, folder",
    [
        (SD3Transformer2DModel, SD3 / "transformer"),
        (FluxControlNetModel, EXAMPLES / "shapes_world/transfer/controlnet"),
    ],
)
def test_eight_bit_weights_load_as_float32_and_are_written_again(cls, folder, tmp_path):
    model = cls.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    train.eight_bit(model.half())
    model.save_pretrained(tmp_path)
    committed, written = (
        load_file(where / "diffusion_pytorch_model.safetensors") for where in (folder, tmp_path)
    )
    assert {tensor.dtype for tensor in committed.values()} == {torch.float8_e4m3fn, torch.float16}
    assert committed.keys() == written.keys()
    for name, tensor in committed.items():
        assert tensor.dtype == written[name].dtype
        assert torch.equal(tensor.float(), written[name].float())


@pytest.mark.parametrize("folder", [generation.PIPELINE, SD3])
def test_committed_student_is_small_and_close_to_its_teacher(folder):
    pipe = load_pipeline(folder)
    where = SD3_STUDENT if folder == SD3 else STUDENT
    student = t5slim.SlimT5Encoder.from_pretrained(where, dtype=torch.float32)
    assert student.num_parameters() <= TextSlot(pipe).encoder.num_parameters() / 20
    _, texts = captions(2, held_out=True)
    assert velocity_gap(pipe, student, texts, pipeline_kwargs=generation.CALL) <= 0.05


def test_sd3_generates_held_out_captions_under_guidance():
    scenes, texts = captions(2, held_out=True)
    pipe = t5slim.patch_pipeline(load_pipeline(SD3), SD3_STUDENT)
    images = generate(pipe, texts)
    assert pipe.do_classifier_free_guidance
    right = [judge.read(image) == scene for scene, image in zip(scenes, images, strict=True)]
    assert sum(right) >= 5  # of 6


def test_weights_are_safetensors():
    assert not [p for p in EXAMPLES.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_quickstart_shows_both_encoders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--count", "2"])
    quickstart.main()
    assert Path("quickstart.png").exists()
    printed = capsys.readouterr().out
    for line in ("parameters", "velocity gap", "quality correct", "letters correct"):
        assert line in printed
