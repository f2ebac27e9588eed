"""Finding the T5 slot: in every pipeline class of diffusers, and in real pipelines."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPriorReduxPipeline,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny import (
    TEXT_WIDTH,
    TINY_PIPELINES,
    autoencoder,
    clip_encoder,
    clip_tokenizer,
    t5_encoder,
    t5_tokenizer,
    tiny_flux,
    tiny_student,
)
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from t5slim import NoT5SlotError
from t5slim.slot import (
    TextSlot,
    denoiser_text_width,
    fill_slot,
    find_text_slot,
    restore_slot,
    slot_entry,
)


def every_pipeline_class() -> list[type[DiffusionPipeline]]:
    """Also of modules that need a package which isn't here: as far as they can be imported."""
    classes = set()
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        try:
            contents = vars(importlib.import_module(module.name))
        except ImportError:
            continue
        classes |= {
            value
            for value in contents.values()
            if inspect.isclass(value)
            and issubclass(value, DiffusionPipeline)
            and value is not DiffusionPipeline
        }
    return sorted(classes, key=lambda cls: cls.__name__)


def tiny_wan() -> WanPipeline:
    config = UMT5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(config).eval(),
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=TEXT_WIDTH, freq_dim=16, ffn_dim=32, num_layers=1,
        ),
    )  # fmt: skip


def tiny_hunyuan_dit() -> HunyuanDiTPipeline:
    """T5 is the second encoder of two, and the first one has a width of its own in the config."""
    return HunyuanDiTPipeline(
        vae=autoencoder(4),
        text_encoder=BertModel(
            BertConfig(
                vocab_size=20, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=24,
            )
        ),
        tokenizer=BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}),
        transformer=HunyuanDiT2DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
            in_channels=4, cross_attention_dim=24, cross_attention_dim_t5=TEXT_WIDTH,
            pooled_projection_dim=4, hidden_size=24, activation_fn="gelu-approximate",
        ),
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def tiny_sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=autoencoder(4),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        ),
        scheduler=DDIMScheduler(),
    )  # fmt: skip


def tiny_flux2() -> Flux2KleinPipeline:
    config = Qwen3Config(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=None,
        transformer=Flux2Transformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 4, 4),
        ),
    )  # fmt: skip


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
            assert [find_text_slot(cls).name] == expected, cls
            assert find_text_slot(cls).tokenizer_name in types, cls
            found[cls.__name__] = expected[0]
        else:
            with pytest.raises(NoT5SlotError, match=cls.__name__):
                find_text_slot(cls)
            without.add(cls.__name__)

    assert found["FluxPipeline"] == found["HunyuanDiTPipeline"] == "text_encoder_2"
    assert found["StableDiffusion3Pipeline"] == found["HiDreamImagePipeline"] == "text_encoder_3"
    for name in ("PixArtSigma", "Chroma", "LTX", "Wan", "CogVideoX", "AuraFlow", "StableAudio"):
        assert found[f"{name}Pipeline"] == "text_encoder"
    assert {"Flux2Pipeline", "StableDiffusionXLPipeline", "PRXPipeline"} < without
    assert len(found) > 70


@pytest.mark.parametrize("family", TINY_PIPELINES)
def test_real_pipelines(family):
    pipe = TINY_PIPELINES[family]()
    slot = find_text_slot(pipe)
    assert isinstance(getattr(pipe, slot.name), T5EncoderModel)
    assert slot == find_text_slot(type(pipe))
    assert denoiser_text_width(pipe) == TEXT_WIDTH
    pipe.register_modules(**{slot.name: None})  # as loaded without T5
    assert find_text_slot(pipe) == slot
    assert denoiser_text_width(pipe) == TEXT_WIDTH


def test_two_encoders_and_umt5():
    pipe = tiny_hunyuan_dit()
    assert find_text_slot(pipe) == TextSlot("text_encoder_2")
    assert find_text_slot(pipe).tokenizer_name == "tokenizer_2"
    assert denoiser_text_width(pipe) == TEXT_WIDTH
    assert find_text_slot(tiny_wan()) == TextSlot("text_encoder")


def test_a_student_is_found_as_a_t5():
    pipe = tiny_flux()
    pipe.register_modules(text_encoder_2=tiny_student(pipe))
    assert find_text_slot(pipe) == TextSlot("text_encoder_2")


def test_a_pipeline_without_denoiser_has_the_width_of_its_encoder():
    pipe = FluxPriorReduxPipeline(
        image_encoder=None, feature_extractor=None, image_embedder=None, text_encoder_2=t5_encoder()
    )
    assert denoiser_text_width(pipe) == TEXT_WIDTH
    pipe.register_modules(text_encoder_2=None)
    assert denoiser_text_width(pipe) is None


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
    assert denoiser_text_width(pipe) == width


@pytest.mark.parametrize(("build", "encoder"), [(tiny_sdxl, "CLIPText"), (tiny_flux2, "Qwen3")])
def test_no_t5(build, encoder):
    pipe = build()
    with pytest.raises(NoT5SlotError, match=rf"{type(pipe).__name__}.*text_encoder \({encoder}"):
        find_text_slot(pipe)


def test_no_t5_and_nothing_loaded():
    pipe = tiny_sdxl()
    pipe.register_modules(text_encoder=None)
    with pytest.raises(NoT5SlotError, match=r"text_encoder \(none, declared as CLIPTextModel\)"):
        find_text_slot(pipe)


def test_another_model_in_a_slot_that_may_hold_t5():
    """AudioLDM2's `text_encoder_2` may be a Vits; here a pipeline's T5 was replaced by CLIP."""
    pipe = tiny_flux()
    pipe.register_modules(text_encoder_2=clip_encoder())
    with pytest.raises(NoT5SlotError, match=r"text_encoder_2 \(CLIPTextModel\)"):
        find_text_slot(pipe)


def test_restoring_a_module_that_was_assigned_to_an_empty_slot():
    """`pipe.text_encoder_2 = t5`, on a pipeline loaded with None, leaves [null, null] there."""
    pipe = tiny_flux()
    host = pipe.text_encoder_2
    pipe.register_modules(text_encoder_2=None)
    pipe.text_encoder_2 = host
    slot = find_text_slot(pipe)
    entry = slot_entry(pipe, slot)
    assert pipe.config["text_encoder_2"] == (None, None)
    fill_slot(pipe, slot, t5_encoder())
    assert pipe.config["text_encoder_2"] == ("transformers", "T5EncoderModel")
    restore_slot(pipe, slot, host, entry)
    assert pipe.text_encoder_2 is host
    assert pipe.config["text_encoder_2"] == (None, None)
