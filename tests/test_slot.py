"""Finding the T5 slot: in every pipeline class of diffusers, and in real pipelines."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from diffusers import FluxPriorReduxPipeline
from helpers.pipelines import every_pipeline_class, tiny_sdxl
from tiny import TEXT_WIDTH, TINY_PIPELINES, clip_encoder, t5_encoder, tiny_flux, tiny_student
from transformers import T5EncoderModel, UMT5EncoderModel
from zoo import CASES

from t5slim import NoT5SlotError
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


PIPELINES = TINY_PIPELINES | {
    "two encoders": CASES["HunyuanDiTPipeline"].pipe,
    "UMT5": CASES["WanPipeline"].pipe,
}


@pytest.mark.parametrize("family", PIPELINES)
def test_real_pipelines(family):
    """With T5, with a student, and as loaded without T5."""
    pipe = PIPELINES[family]()
    name = TextSlot(type(pipe)).name
    assert isinstance(getattr(pipe, name), (T5EncoderModel, UMT5EncoderModel))
    for module in (TextSlot(pipe).encoder, tiny_student(pipe), None):
        pipe.register_modules(**{name: module})
        slot = TextSlot(pipe)
        assert slot.name == name and slot.encoder is module
        assert slot.tokenizer is getattr(pipe, name.replace("text_encoder", "tokenizer"))
        assert slot.width == TEXT_WIDTH


def test_a_pipeline_without_denoiser_has_the_width_of_its_encoder():
    pipe = FluxPriorReduxPipeline(
        image_encoder=None, feature_extractor=None, image_embedder=None, text_encoder_2=t5_encoder()
    )
    assert TextSlot(pipe).width == TEXT_WIDTH
    pipe.register_modules(text_encoder_2=None)
    assert TextSlot(pipe).width is None


LATTE = {"caption_channels": 4096, "sample_size": 8, "patch_size": 2, "in_channels": 4}


# Denoisers at their default widths: T5-XXL's 4096, UMT5-XL's 2048 (AuraFlow), mT5-XL's 2048
# (HunyuanDiT), T5-11B's 1024 (Cosmos), ByT5-small's 1472 and T5-base's 768.
@pytest.mark.parametrize(
    ("pipeline", "denoiser", "width", "kwargs"),
    [
        ("FluxPipeline", "FluxTransformer2DModel", 4096, {"num_single_layers": 1}),
        ("StableDiffusion3Pipeline", "SD3Transformer2DModel", 4096, {}),
        ("BriaPipeline", "BriaTransformer2DModel", 4096, {"num_single_layers": 1}),
        ("AuraFlowPipeline", "AuraFlowTransformer2DModel", 2048, {}),
        ("AllegroPipeline", "AllegroTransformer3DModel", 4096, {}),
        ("CogVideoXPipeline", "CogVideoXTransformer3DModel", 4096, {}),
        ("CogView3PlusPipeline", "CogView3PlusTransformer2DModel", 4096, {}),
        ("Cosmos2TextToImagePipeline", "CosmosTransformer3DModel", 1024, {}),
        ("GlmImagePipeline", "GlmImageTransformer2DModel", 1472, {}),
        ("HeliosPipeline", "HeliosTransformer3DModel", 4096, {}),
        ("HunyuanVideo15Pipeline", "HunyuanVideo15Transformer3DModel", 1472, {}),
        ("LTXPipeline", "LTXVideoTransformer3DModel", 4096, {}),
        ("LattePipeline", "LatteTransformer3DModel", 4096, LATTE),
        ("MochiPipeline", "MochiTransformer3DModel", 4096, {}),
        ("PixArtAlphaPipeline", "PixArtTransformer2DModel", 4096, {"caption_channels": 4096}),
        ("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", 4096, {}),
        ("WanPipeline", "WanTransformer3DModel", 4096, {}),
    ],
)  # fmt: skip
def test_widths_of_the_published_denoisers(pipeline, denoiser, width, kwargs):
    denoiser = getattr(diffusers, denoiser)
    if "num_layers" in inspect.signature(denoiser).parameters:
        kwargs = {"num_layers": 1, **kwargs}
    pipe = object.__new__(getattr(diffusers, pipeline))  # no component but the one that is asked
    with torch.device("meta"):
        pipe.transformer = denoiser(**kwargs)
    assert TextSlot(pipe).width == width


def test_no_t5():
    """Another encoder, nothing where none is declared, or a CLIP in the place of T5."""
    sdxl, flux = tiny_sdxl(), tiny_flux()
    flux.register_modules(text_encoder_2=clip_encoder())
    for pipe, encoder in (
        (sdxl, r"text_encoder \(CLIPTextModel\), text_encoder_2 \(CLIP"),
        (sdxl, r"text_encoder \(none, declared as CLIPTextModel\)"),
        (flux, r"text_encoder_2 \(CLIPTextModel\)"),
    ):
        with pytest.raises(NoT5SlotError, match=rf"{type(pipe).__name__}.*{encoder}"):
            TextSlot(pipe)
        sdxl.register_modules(text_encoder=None)


def test_restoring_a_module_that_was_assigned_to_an_empty_slot():
    """`pipe.text_encoder_2 = t5`, on a pipeline loaded with None, leaves [null, null] there."""
    pipe = tiny_flux()
    teacher = pipe.text_encoder_2
    pipe.register_modules(text_encoder_2=None)
    pipe.text_encoder_2 = teacher
    slot = TextSlot(pipe)
    assert pipe.config["text_encoder_2"] == (None, None)
    original = slot.replace(t5_encoder())
    assert pipe.config["text_encoder_2"] == ("transformers", "T5EncoderModel")
    slot.restore(original)
    assert pipe.text_encoder_2 is teacher
    assert pipe.config["text_encoder_2"] == (None, None)
