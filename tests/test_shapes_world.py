"""The miniature world: what it says of itself, and the committed pipeline and student."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig

import t5slim
from t5slim.distill import velocity_gap

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from shapes_world import judge, world  # noqa: E402
from shapes_world.painting import (  # noqa: E402
    CALL,
    SD3,
    SD3_STUDENT,
    STUDENT,
    captions,
    load_pipeline,
    paint,
)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture(scope="module")
def sd3(pipe):
    return load_pipeline(SD3, pipe)


@pytest.mark.parametrize("criterion", world.CRITERIA)
def test_judge_reads_the_generators_own_pictures(criterion):
    rng = random.Random(0)
    scenes = [world.sample_scene(rng, criterion, held_out=i % 2 == 1) for i in range(400)]
    pictures = [world.draw(scene, rng) for scene in scenes]
    assert judge.accuracy(scenes, pictures)[criterion] >= 0.995


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


def test_judge_refuses_what_is_no_picture():
    with pytest.raises(ValueError, match=r"expected a \(64, 64, 3\) uint8 picture"):
        judge.read(torch.zeros(3, 64, 64).numpy())


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


def test_no_caption_is_truncated(pipe):
    _, texts = captions(500, held_out=False, chatter=1)
    for ids in pipe.tokenizer_2(texts).input_ids:
        assert len(ids) <= world.MAX_TOKENS
        assert pipe.tokenizer_2.unk_token_id not in ids


@pytest.mark.parametrize(
    "folder",
    sorted(EXAMPLES.glob("shapes_world/*/text_encoder*")),
    ids=lambda f: f"{f.parent.name}-{f.name}",
)
def test_committed_text_encoder_loads_whole(folder):
    """transformers names the weights of CLIP otherwise from version to version."""
    config = AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    _, found = cls.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


def test_committed_student_is_small_and_close_to_its_teacher(pipe):
    student = t5slim.SlimT5Encoder.from_pretrained(STUDENT, dtype=torch.float32)
    teacher = pipe.text_encoder_2
    assert student.num_parameters() <= teacher.num_parameters() / 20
    _, texts = captions(8, held_out=True)
    assert velocity_gap(pipe, student, texts, pipeline_kwargs=CALL) <= 0.05


@pytest.mark.parametrize("encoder", ["teacher", "student"])
def test_sd3_paints_held_out_captions_under_guidance(sd3, encoder):
    scenes, texts = captions(2, held_out=True)
    if encoder == "student":
        t5slim.patch_pipeline(sd3, SD3_STUDENT, keep_teacher=True)
    try:
        pictures = paint(sd3, texts)
    finally:
        if encoder == "student":
            t5slim.unpatch_pipeline(sd3)
    assert sd3.do_classifier_free_guidance
    right = [judge.read(picture) == scene for scene, picture in zip(scenes, pictures, strict=True)]
    assert sum(right) >= 5  # of 6


def test_sd3_keeps_away_from_a_negative_prompt(sd3):
    brightness = {}
    for background in ("black", "white"):
        away = f"a red circle to the left of a blue square on a {background} background"
        corners = [picture[0, 0].mean() for picture in paint(sd3, [""] * 4, negative_prompt=away)]
        brightness[background] = sum(corners) / len(corners)
    assert brightness["black"] > brightness["white"] + 60


def test_sd3_student_is_close_to_the_same_teacher(sd3):
    student = t5slim.SlimT5Encoder.from_pretrained(SD3_STUDENT, dtype=torch.float32)
    assert student.num_parameters() <= sd3.text_encoder_3.num_parameters() / 20
    _, texts = captions(2, held_out=True)
    assert velocity_gap(sd3, student, texts, pipeline_kwargs=CALL) <= 0.1


def test_examples_stay_small():
    files = [p for p in EXAMPLES.rglob("*") if p.is_file() and "work" not in p.parts]
    assert sum(path.stat().st_size for path in files) <= 45e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_quickstart_shows_both_encoders(tmp_path):
    picture = tmp_path / "quickstart.png"
    command = [sys.executable, EXAMPLES / "quickstart.py", "--count", "2", "--out", picture]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert picture.exists()
    for row in ("parameters", "velocity gap", "quality right", "semantics right", "letters right"):
        assert row in done.stdout
