"""Finding the T5 slot: in every pipeline class of diffusers; in pipelines, see `zoo/table.py`."""

import pytest
from diffusers import FluxPipeline
from helpers.pipelines import every_pipeline_class
from tiny import TEXT_WIDTH, clip_encoder, t5_encoder
from transformers import T5EncoderModel, UMT5EncoderModel
from zoo import CASES

from t5slim import NoT5SlotError, SlimT5Encoder, patch_pipeline, unpatch_pipeline
from t5slim.slot import TextSlot


def test_every_pipeline_class_of_diffusers():
    """Against the types that diffusers itself resolves and checks components with."""
    found, without = {}, set()
    for cls in every_pipeline_class():
        types = cls._get_signature_types()
        expected = [
            name
            for name, declared in types.items()
            if name.startswith("text_encoder") and {T5EncoderModel, UMT5EncoderModel} & {*declared}
        ]
        if expected:
            assert [TextSlot(cls).name] == expected, cls
            assert TextSlot(cls).tokenizer_name in types, cls
            found[cls.__name__] = expected[0]
        else:
            with pytest.raises(NoT5SlotError, match=cls.__name__):
                TextSlot(cls)
            without.add(cls.__name__)

    assert found["FluxPipeline"] == found["HunyuanDiTPipeline"] == "text_encoder_2"
    assert found["StableDiffusion3Pipeline"] == found["HiDreamImagePipeline"] == "text_encoder_3"
    for name in ("PixArtSigma", "Chroma", "LTX", "Wan", "CogVideoX", "AuraFlow", "StableAudio"):
        assert found[f"{name}Pipeline"] == "text_encoder"
    assert {"Flux2Pipeline", "StableDiffusionXLPipeline", "PRXPipeline"} < without
    assert len(found) > 70
    assert found.keys() <= CASES.keys()  # so that each is tried in test_every_pipeline.py
    assert sum(case.route != "none" for case in CASES.values()) >= 40


def test_a_pipeline_without_denoiser_has_the_width_of_its_encoder():
    pipe = CASES["FluxPriorReduxPipeline"].pipe()
    assert TextSlot(pipe).width == TEXT_WIDTH
    pipe.register_modules(text_encoder_2=None)
    assert TextSlot(pipe).width is None


NOT_PIPELINES = ["me/flux", None, {}, 5, t5_encoder(), SlimT5Encoder, int]


@pytest.mark.parametrize("other", NOT_PIPELINES, ids=lambda other: type(other).__name__)
def test_not_a_pipeline(other):
    """Its type is named, and nothing of what is in it."""
    name = other.__name__ if isinstance(other, type) else type(other).__name__
    for call in (TextSlot, unpatch_pipeline, lambda pipe: patch_pipeline(pipe, "me/student")):
        with pytest.raises(NoT5SlotError, match=f"^expected a .*pipeline.*; got {name}.$"):
            call(other)
    with pytest.raises(NoT5SlotError, match="expected a pipeline, got the class FluxPipeline"):
        unpatch_pipeline(FluxPipeline)


def test_a_clip_in_the_place_of_t5(pipe):
    pipe.register_modules(text_encoder_2=clip_encoder())
    with pytest.raises(NoT5SlotError, match="FluxPipeline has no T5"):
        TextSlot(pipe)
