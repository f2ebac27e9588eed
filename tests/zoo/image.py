"""Other pictures: PixArt, HunyuanDiT, AuraFlow, DeepFloyd IF, Kandinsky 3..."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    AutoencoderKLHunyuanImage,
    CogVideoXDDIMScheduler,
    CogView3PlusTransformer2DModel,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    GlmImageTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    Kandinsky3UNet,
    UNet2DConditionModel,
    VQModel,
)
from tiny import (
    MAX_TOKENS,
    TEXT_WIDTH,
    autoencoder,
    call_kwargs,
    clip_encoder,
    clip_tokenizer,
    t5_encoder,
    t5_tokenizer,
    tiny_pixart_sigma,
    umt5_encoder,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    ByT5Tokenizer,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from .case import Case
from .pictures import mask, picture, pictures

Cls = type[DiffusionPipeline]
QUOTED = ('a sign that says "hi"', 'a "red" circle')  # for those that let T5 read quotations only
PERTURBED = "it changes its denoiser's attention"
CALL: dict[str, Any] = {
    "height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 4.0,
}  # fmt: skip


def loud(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Of a fresh denoiser of these, the text would change no more than a hundredth."""
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return pipe


def pixart(cls: Cls) -> DiffusionPipeline:
    return cls(**tiny_pixart_sigma().components)


def pixart_call(**more: Any) -> dict[str, Any]:
    return call_kwargs(tiny_pixart_sigma(), steps=2) | more


def hunyuan_dit(cls: Cls, **more: Any) -> DiffusionPipeline:
    sizes: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3,
        "in_channels": 4, "cross_attention_dim": 24, "cross_attention_dim_t5": TEXT_WIDTH,
        "pooled_projection_dim": 4, "hidden_size": 24,
    }  # fmt: skip
    if "ControlNet" in cls.__name__:
        more["controlnet"] = HunyuanDiT2DControlNetModel(transformer_num_layers=4, **sizes)
    bert = BertConfig(
        vocab_size=20, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    return loud(
        cls(
            # The pipeline takes it for granted that a latent is 8 times smaller than its picture.
            vae=AutoencoderKL(
                block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=2,
            ),
            text_encoder=BertModel(bert),
            tokenizer=BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}),
            transformer=HunyuanDiT2DModel(
                num_layers=4, activation_fn="gelu-approximate", **sizes
            ),
            scheduler=DDPMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            text_encoder_2=t5_encoder(),
            tokenizer_2=t5_tokenizer(),
            **more,
        )
    )  # fmt: skip


def hunyuan_dit_call(**more: Any) -> dict[str, Any]:
    return CALL | {"height": 32, "width": 32, "use_resolution_binning": False} | more


def aura_flow(cls: Cls) -> DiffusionPipeline:
    return loud(
        cls(
            tokenizer=t5_tokenizer(),
            text_encoder=umt5_encoder(),
            vae=autoencoder(4),
            transformer=AuraFlowTransformer2DModel(
                sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
                num_attention_heads=4, joint_attention_dim=TEXT_WIDTH, caption_projection_dim=32,
                pos_embed_max_size=16,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    )  # fmt: skip


def cogview3(cls: Cls) -> DiffusionPipeline:
    return loud(
        cls(
            tokenizer=t5_tokenizer(),
            text_encoder=t5_encoder(),
            vae=autoencoder(4),
            transformer=CogView3PlusTransformer2DModel(
                in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
                num_attention_heads=4, text_embed_dim=TEXT_WIDTH, time_embed_dim=8,
                condition_dim=2, pos_embed_max_size=8, sample_size=8,
            ),
            scheduler=CogVideoXDDIMScheduler(),
        )
    )  # fmt: skip


def glm_image(cls: Cls) -> DiffusionPipeline:
    """Without the language model that draws `prior_token_ids`: the call brings some."""
    vae = autoencoder(4)
    return cls(
        tokenizer=ByT5Tokenizer(),
        processor=None,
        text_encoder=t5_encoder(vocab_size=384),
        vision_language_encoder=None,
        vae=vae,
        transformer=GlmImageTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, text_embed_dim=TEXT_WIDTH, time_embed_dim=8,
            condition_dim=4, prior_vq_quantizer_codebook_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def hidream(cls: Cls) -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(4),
        text_encoder=clip_encoder(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=LlamaForCausalLM(llama),
        tokenizer_4=tokenizer,
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
            attention_head_dim=8, num_attention_heads=4, caption_channels=[TEXT_WIDTH, 16],
            text_emb_dim=32, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32),
            llama_layers=[0, 1],
        ),
    )  # fmt: skip
    pipe.default_sample_size = 8  # it draws pictures of this area, whatever is asked for
    return loud(pipe)


def hunyuan_image(cls: Cls) -> DiffusionPipeline:
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "<|endoftext|>"])}
    qwen = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(vocab) + 2, "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 16,
        },
    )  # fmt: skip
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32),
            layers_per_block=1, spatial_compression_ratio=2, sample_size=16,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(qwen),
        tokenizer=Qwen2Tokenizer(vocab=vocab, merges=[]),
        text_encoder_2=t5_encoder(vocab_size=384),
        tokenizer_2=ByT5Tokenizer(),
        transformer=HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8,
            num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16,
            text_embed_2_dim=TEXT_WIDTH, rope_axes_dim=(4, 4),
        ),
        guider=AdaptiveProjectedMixGuidance(guidance_scale=3.0),
        ocr_guider=AdaptiveProjectedMixGuidance(guidance_scale=4.0),
    )  # fmt: skip
    # Lengths that aren't in the components' configs; the template alone has 190 bytes.
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = ": {}", 1
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 24, 24
    return pipe


def deepfloyd(cls: Cls) -> DiffusionPipeline:
    larger = "SuperResolution" in cls.__name__
    more: dict[str, Any] = {}
    unet: dict[str, Any] = {}
    if larger:
        more = {"image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2")}
        unet = {"class_embed_type": "timestep", "in_channels": 6}
    return cls(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        unet=UNet2DConditionModel(
            **{"sample_size": 16, "in_channels": 3, "out_channels": 6} | unet,
            layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=32, encoder_hid_dim=TEXT_WIDTH, attention_head_dim=8,
            addition_embed_type="text", addition_embed_type_num_heads=2, act_fn="gelu",
            cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift",
        ),
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", variance_type="learned_range",
            thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.0,
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **more,
    )  # fmt: skip


def deepfloyd_call(**more: Any) -> dict[str, Any]:
    return {"num_inference_steps": 2, "guidance_scale": 4.0, "clean_caption": False} | more


def kandinsky3(cls: Cls) -> DiffusionPipeline:
    return cls(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        unet=Kandinsky3UNet(
            time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3,
            block_out_channels=(8, 16), cross_attention_dim=4, encoder_hid_dim=TEXT_WIDTH,
        ),
        scheduler=DDPMScheduler(),
        movq=VQModel(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
            num_vq_embeddings=12, vq_embed_dim=4,
        ),
    )  # fmt: skip


CASES = [
    Case("PixArtAlphaPipeline", pixart, pixart_call),
    Case("PixArtSigmaPipeline", pixart, pixart_call),
    Case("PixArtSigmaPAGPipeline", pixart, pixart_call, route="fallback", why=PERTURBED),
    Case("HunyuanDiTPipeline", hunyuan_dit, hunyuan_dit_call),
    Case(
        "HunyuanDiTControlNetPipeline",
        hunyuan_dit,
        lambda: hunyuan_dit_call(control_image=picture(size=32)),
        route="fallback",
        why="controlnet_block_samples/0 depends on T5's output",
    ),
    Case("HunyuanDiTPAGPipeline", hunyuan_dit, hunyuan_dit_call, route="fallback", why=PERTURBED),
    Case("AuraFlowPipeline", aura_flow, lambda: CALL | {"max_sequence_length": MAX_TOKENS}),
    Case("CogView3PlusPipeline", cogview3, lambda: CALL | {"max_sequence_length": MAX_TOKENS}),
    Case(
        "GlmImagePipeline",
        glm_image,
        lambda: CALL | {"prior_token_ids": torch.arange(32).view(2, 16) % 16},
        route="fallback",
        why="beside its tensors",  # a cache of keys and values, made anew for each call
        prompts=QUOTED,
    ),
    Case("HiDreamImagePipeline", hidream, lambda: CALL | {"max_sequence_length": MAX_TOKENS}),
    Case(
        "HunyuanImagePipeline",
        hunyuan_image,
        lambda: {"height": 16, "width": 16, "num_inference_steps": 2},
        prompts=QUOTED,
        student={"d_model": TEXT_WIDTH},  # the width of the zeros for prompts without quotation
    ),
    Case("IFPipeline", deepfloyd, deepfloyd_call),
    Case("IFImg2ImgPipeline", deepfloyd, lambda: deepfloyd_call(image=pictures(), strength=1.0)),
    Case(
        "IFInpaintingPipeline",
        deepfloyd,
        lambda: deepfloyd_call(image=pictures(), mask_image=[mask()] * 2),
    ),
    Case("IFSuperResolutionPipeline", deepfloyd, lambda: deepfloyd_call(image=pictures(size=8))),
    Case(
        "IFImg2ImgSuperResolutionPipeline",
        deepfloyd,
        lambda: deepfloyd_call(image=pictures(size=8), original_image=pictures(), strength=1.0),
    ),
    Case(
        "IFInpaintingSuperResolutionPipeline",
        deepfloyd,
        lambda: deepfloyd_call(
            image=pictures(size=8), original_image=pictures(), mask_image=[mask()] * 2, strength=1.0
        ),
    ),
    Case("Kandinsky3Pipeline", kandinsky3, lambda: CALL),
    Case(
        "Kandinsky3Img2ImgPipeline",
        kandinsky3,
        lambda: {
            "image": picture(),
            "num_inference_steps": 2,
            "guidance_scale": 4.0,
            "strength": 1.0,
        },
    ),
]
