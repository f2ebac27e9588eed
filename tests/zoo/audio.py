"""Sound."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers  # for LongCat's classes, which older versions don't have
from diffusers import (
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from tiny import TEXT_WIDTH, call_kwargs, t5_encoder, t5_tokenizer, tiny_stable_audio, umt5_encoder
from transformers import (
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizerFast,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)
from transformers.models.clap.configuration_clap import ClapAudioConfig, ClapConfig, ClapTextConfig

from .case import Case


def longcat(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    with warnings.catch_warnings():  # its VAE still uses torch's old weight_norm
        warnings.simplefilter("ignore", FutureWarning)
        vae = diffusers.LongCatAudioDiTVae(
            channels=4, c_mults=[1, 2], strides=[2], latent_dim=4, encoder_latent_dim=8,
            downsampling_ratio=2, sample_rate=4,
        )  # fmt: skip
    return cls(
        vae=vae,
        text_encoder=umt5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=diffusers.LongCatAudioDiTTransformer(
            dit_dim=16, dit_depth=1, dit_heads=2, dit_text_dim=TEXT_WIDTH, latent_dim=4
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    )


def audioldm2(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    """A GPT-2 writes embeddings of its own from those of T5 and CLAP; the denoiser reads both."""
    tokenizer = RobertaTokenizerFast(
        vocab={t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefg"])},
        merges=[],
        model_max_length=8,
    )
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    clap = ClapConfig(
        text_config=ClapTextConfig(
            **small, vocab_size=len(tokenizer), intermediate_size=8, max_position_embeddings=16
        ).to_dict(),
        audio_config=ClapAudioConfig(
            window_size=4, num_mel_bins=16, spec_size=16, patch_size=4, patch_stride=4,
            hidden_size=8, patch_embeds_hidden_size=8, depths=[1], num_attention_heads=[2],
            num_hidden_layers=1,
        ).to_dict(),
        projection_dim=8,
    )  # fmt: skip
    return cls(
        vae=AutoencoderKL(
            in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=ClapModel(clap),
        text_encoder_2=t5_encoder(),
        projection_model=AudioLDM2ProjectionModel(
            text_encoder_dim=8, text_encoder_1_dim=TEXT_WIDTH, langauge_model_dim=16
        ),
        language_model=GPT2LMHeadModel(
            GPT2Config(
                vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=64, n_ctx=64,
                max_new_tokens=4,
            )
        ),
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer(),
        feature_extractor=ClapFeatureExtractor(
            feature_size=16, hop_length=64, fft_window_size=64
        ),
        unet=AudioLDM2UNet2DConditionModel(
            sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
            cross_attention_dim=[[None, 16, TEXT_WIDTH]] * 2,
        ),
        scheduler=DDIMScheduler(),
        vocoder=SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=4, sampling_rate=16000, upsample_initial_channel=8,
                upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4],
                resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
                normalize_before=False,
            )
        ),
    )  # fmt: skip


LONGCAT_CALL: dict[str, Any] = {
    "audio_duration_s": 4.0, "num_inference_steps": 2, "guidance_scale": 4.0,
    "negative_prompt": "blue",
}  # fmt: skip

CASES = [
    Case(
        "StableAudioPipeline",
        lambda cls: tiny_stable_audio(),
        lambda: call_kwargs(tiny_stable_audio(), steps=2),
        route="fallback",
        why="no token embedding of T5 reaches its denoiser",
    ),
    Case(
        "LongCatAudioDiTPipeline",
        longcat,
        lambda: LONGCAT_CALL,
        route="none",
        why="reads T5's hidden states",
        student={"d_model": TEXT_WIDTH},  # it adds the first of them to its output
    ),
    Case(
        "AudioLDM2Pipeline",
        audioldm2,
        lambda: {"audio_length_in_s": 0.004, "num_inference_steps": 2, "guidance_scale": 4.0},
        route="fallback",
        why="encoder_hidden_states depends on T5's output",
        since="0.42",  # 0.37 asks the GPT2 for a method that transformers 5.4 doesn't have
    ),
]
