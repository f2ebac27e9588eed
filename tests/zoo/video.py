"""Video with a T5: LTX, CogVideoX, Mochi, Cosmos, Latte..."""

from __future__ import annotations

from typing import Any

import diffusers  # not its classes: older versions don't have all of them
import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline
from tiny import (
    MAX_TOKENS,
    TEXT_WIDTH,
    autoencoder,
    call_kwargs,
    t5_encoder,
    t5_tokenizer,
    tiny_ltx,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from .case import Case
from .pictures import pictures as frames


def call(size: int = 16, **more: Any) -> dict[str, Any]:
    return {
        "height": size, "width": size, "num_inference_steps": 2, "guidance_scale": 5.0,
        "max_sequence_length": MAX_TOKENS, **more,
    }  # fmt: skip


def text() -> dict[str, Any]:
    return {"tokenizer": t5_tokenizer(), "text_encoder": t5_encoder()}


# --- Allegro, Latte, Mochi ---


def allegro(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    return cls(
        **text(),
        vae=diffusers.AutoencoderKLAllegro(
            block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1,
            norm_num_groups=2,
        ),
        transformer=diffusers.AllegroTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, num_layers=1, cross_attention_dim=24,
            caption_channels=TEXT_WIDTH, sample_width=2, sample_height=2, sample_frames=2,
        ),
        scheduler=diffusers.DDIMScheduler(),
    )  # fmt: skip


def latte(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    return cls(
        **text(),
        vae=autoencoder(4),
        transformer=diffusers.LatteTransformer3DModel(
            sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8,
            num_attention_heads=3, caption_channels=TEXT_WIDTH, in_channels=4, out_channels=8,
            cross_attention_dim=24, attention_bias=True, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6, video_length=2,
        ),
        scheduler=diffusers.DDIMScheduler(),
    )  # fmt: skip


def latte_call() -> dict[str, Any]:
    arguments = call(video_length=2, clean_caption=False)
    del arguments["max_sequence_length"]  # always 120
    return arguments


def mochi(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    return cls(
        **text(),
        vae=diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        transformer=diffusers.MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, in_channels=12,
            pooled_projection_dim=16, text_embed_dim=TEXT_WIDTH, time_embed_dim=4,
            max_sequence_length=MAX_TOKENS,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=True,  # as published: the ids of "" are zeros, masked out
    )  # fmt: skip


# --- CogVideoX, ConsisID ---


def cogvideox_vae() -> ModelMixin:
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )


COGVIDEOX_SHAPE = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "time_embed_dim": 4,
    "out_channels": 4, "text_embed_dim": TEXT_WIDTH, "max_text_seq_length": MAX_TOKENS,
    "sample_width": 2, "sample_height": 2, "sample_frames": 9,
    "use_rotary_positional_embeddings": True,
}  # fmt: skip


def cogvideox(
    cls: type[DiffusionPipeline], conditioned: bool = False, **changes: Any
) -> DiffusionPipeline:
    """`conditioned`: latents of an image or video are joined to x_t's channels."""
    return cls(
        **text(),
        vae=cogvideox_vae(),
        transformer=diffusers.CogVideoXTransformer3DModel(
            **COGVIDEOX_SHAPE | changes, in_channels=8 if conditioned else 4
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def consisid(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    return cls(
        **text(),
        vae=cogvideox_vae(),
        transformer=diffusers.ConsisIDTransformer3DModel(
            **COGVIDEOX_SHAPE, in_channels=8, use_learned_positional_embeddings=True,
            is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=4,
            cross_attn_num_heads=1, LFE_id_dim=2, LFE_vit_dim=2, LFE_depth=1, LFE_dim_head=4,
            LFE_num_heads=1, LFE_num_id_token=1, LFE_num_querie=1, LFE_output_dim=21,
            LFE_ff_mult=1, LFE_num_scale=1,
        ),
        scheduler=diffusers.CogVideoXDPMScheduler(),
    )  # fmt: skip


# --- Cosmos ---


class SafetyChecker(ModelMixin, ConfigMixin):
    """Stands in for Cosmos' guardrail, which the pipelines insist on and is several large models.

    So it is in diffusers' own tests. What it lets through is none of a distillation's business.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(1), persistent=False)

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames


def cosmos(
    cls: type[DiffusionPipeline], conditioned: bool = False, second: bool = False
) -> DiffusionPipeline:
    """`conditioned`: a channel says which frames are given. `second`: Cosmos-Predict2."""
    channels = 16 if second else 4
    vae: Any = diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(4, 4, 4, 4), num_layers=1,
        decode_block_out_channels=(4, 4, 4, 4), attention_resolutions=(8,), resolution=64,
        spatial_compression_ratio=4, temporal_compression_ratio=4, latents_mean=None,
        latents_std=None,
    )  # fmt: skip
    scheduler: Any = diffusers.EDMEulerScheduler(
        sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
    )
    if second:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
        vae = diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return cls(
        **text(),
        vae=vae,
        transformer=diffusers.CosmosTransformer3DModel(
            in_channels=channels + conditioned, out_channels=channels, num_attention_heads=2,
            attention_head_dim=16, num_layers=1, mlp_ratio=2, text_embed_dim=TEXT_WIDTH,
            adaln_lora_dim=4, max_size=(4, 32, 32),
            concat_padding_mask=False,  # which would be resized with torchvision
        ),
        scheduler=scheduler,
        safety_checker=SafetyChecker(),
    )  # fmt: skip


def cosmos_call(**more: Any) -> dict[str, Any]:
    return call(32, negative_prompt="blue", **more)  # its own is long


# --- HunyuanVideo-1.5 ---


def hunyuan_video_15(cls: type[DiffusionPipeline], image: bool = False) -> DiffusionPipeline:
    """Its T5 is a ByT5 that reads what stands between quotation marks, and nothing else."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    more: dict[str, Any] = {}
    if image:
        more["feature_extractor"] = SiglipImageProcessor(size={"height": 8, "width": 8})
        more["image_encoder"] = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                image_size=8, patch_size=4, vision_use_head=False,
            )
        )  # fmt: skip
    pipe = cls(
        text_encoder=Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16,
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                rope_parameters={
                    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]
                },
            )
        ),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(vocab_size=len(ByT5Tokenizer())),
        tokenizer_2=ByT5Tokenizer(),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(16, 16), layers_per_block=1,
            spatial_compression_ratio=4, temporal_compression_ratio=2,
            downsample_match_channel=False, upsample_match_channel=False,
        ),
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8,
            num_layers=1, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16,
            text_embed_2_dim=TEXT_WIDTH, image_embed_dim=16, rope_axes_dim=(2, 2, 4),
            target_size=16,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
        **more,
    )  # fmt: skip
    # Lengths that aren't in the components' configs.
    pipe.system_message, pipe.prompt_template_encode_start_idx = "a", 1
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 16, 24
    pipe.vision_num_semantic_tokens = 4
    return pipe


GLYPHS = ('a sign that says "hi"', 'the "red" sign')


# --- LTX ---


def ltx(cls: type[DiffusionPipeline], **changes: Any) -> DiffusionPipeline:
    return cls(**tiny_ltx().components | changes)


def ltx_call(**more: Any) -> dict[str, Any]:
    return call_kwargs(tiny_ltx(), steps=2) | more


CASES = [
    Case("AllegroPipeline", allegro, lambda: call(num_frames=8, clean_caption=False)),
    Case("CogVideoXPipeline", cogvideox, lambda: call(num_frames=5)),
    Case(
        "CogVideoXFunControlPipeline",
        lambda cls: cogvideox(cls, conditioned=True),
        lambda: call(control_video=[frames(5, 16)] * 2),  # one for each prompt
    ),
    Case(
        "CogVideoXImageToVideoPipeline",
        lambda cls: cogvideox(cls, conditioned=True, use_learned_positional_embeddings=True),
        lambda: call(num_frames=9, image=frames(2, 16)),
    ),
    Case("CogVideoXVideoToVideoPipeline", cogvideox, lambda: call(video=[frames(5, 16)] * 2)),
    Case(
        "ConsisIDPipeline",
        # diffusers gives it out only where OpenCV is, with which it draws the key points of faces.
        lambda cls: consisid(ConsisIDPipeline),
        lambda: call(
            num_frames=9,
            image=frames(2, 16),
            id_cond=torch.ones(1, 2),
            id_vit_hidden=[torch.ones(1, 2, 2)],
        ),
    ),
    Case("CosmosTextToWorldPipeline", cosmos, lambda: cosmos_call(num_frames=5)),
    Case(
        "CosmosVideoToWorldPipeline",
        lambda cls: cosmos(cls, conditioned=True),
        lambda: cosmos_call(num_frames=9, video=[frames(5, 32)] * 2),
    ),
    Case("Cosmos2TextToImagePipeline", lambda cls: cosmos(cls, second=True), cosmos_call),
    Case(
        "Cosmos2VideoToWorldPipeline",
        lambda cls: cosmos(cls, conditioned=True, second=True),
        lambda: cosmos_call(num_frames=9, image=frames(2, 32)),
    ),
    Case(
        "HunyuanVideo15Pipeline",
        hunyuan_video_15,
        lambda: {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2},
        prompts=GLYPHS,
        student={"d_model": TEXT_WIDTH},  # the width of the zeros for prompts without quotation
    ),
    Case(
        "HunyuanVideo15ImageToVideoPipeline",
        lambda cls: hunyuan_video_15(cls, image=True),
        lambda: {"image": frames(1, 16)[0], "num_frames": 5, "num_inference_steps": 2},
        prompts=GLYPHS,
        student={"d_model": TEXT_WIDTH},
    ),
    Case("LTXPipeline", ltx, ltx_call),
    Case("LTXImageToVideoPipeline", ltx, lambda: ltx_call(image=frames(2, 32))),
    Case("LTXConditionPipeline", ltx, lambda: ltx_call(image=frames(1, 32)[0])),
    Case(
        "LTXI2VLongMultiPromptPipeline",
        lambda cls: ltx(cls, scheduler=diffusers.LTXEulerAncestralRFScheduler()),
        # A window of the video for each prompt.
        lambda: ltx_call(
            cond_image=frames(1, 32)[0], num_frames=33, temporal_tile_size=24, temporal_overlap=8
        ),
        route="fallback",
        why="one tensor of T5's embeddings serves the whole batch",
    ),
    Case("LattePipeline", latte, latte_call),
    Case("MochiPipeline", mochi, lambda: call(num_frames=7)),
]
