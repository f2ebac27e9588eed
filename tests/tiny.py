"""Tiny real pipelines: the classes of diffusers and transformers, random weights, no download.

Every builder takes a seed and returns a pipeline on the CPU in float32 and eval mode, with about a
hundred thousand parameters; `call_kwargs(pipe)` gives what a fast call of it needs. Nothing here
imitates a class that a user would have: only the sizes are small.
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderOobleck,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    ModelMixin,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5TokenizerFast,
)

TEXT_WIDTH = 32  # channels of the teacher's rows, the width that every tiny denoiser reads
T5_VOCAB = 256
MAX_TOKENS = 12
CLIP_TOKENS = 64

COLOURS = ["red", "green", "blue"]
SHAPES = ["circle", "square", "star", "sign"]
SMALL_WORDS = ("a", "the", "small", "large", "on", "of", "left", "right", "above", "two")
WORDS = [*COLOURS, *SHAPES, *SMALL_WORDS]
PROMPTS = [
    "a red circle",
    "two small blue squares on the left of a star",
    "a sign that says hi",
    "the large green star above a red square",
    "blue",
    "a small circle right of the large sign",
]


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer (Unigram) that knows `WORDS` and spells the rest; `len` is `T5_VOCAB`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in WORDS]
    pieces += [(char, -6.0) for char in string.ascii_letters + string.digits + string.punctuation]
    pieces += [(f"▁filler{i}", -20.0) for i in range(T5_VOCAB - 100 - len(pieces))]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return T5TokenizerFast(vocab=pieces, model_max_length=MAX_TOKENS)


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE without merges, so it spells)."""
    chars = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["<|startoftext|>", "<|endoftext|>", *chars, *(char + "</w>" for char in chars)]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=CLIP_TOKENS
    )


def t5_encoder(width: int = TEXT_WIDTH, vocab_size: int = T5_VOCAB, kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab_size, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, feed_forward_proj="gated-gelu", dropout_rate=0.1,
    )  # fmt: skip
    encoder = getattr(transformers, f"{kind}EncoderModel")(config)
    # T5's own initialisation leaves attention and feed-forward almost silent.
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "layer_norm" not in name:
                parameter.normal_(0, 1.0 if "shared" in name else 0.3)
    return encoder


def umt5_encoder(width: int = TEXT_WIDTH, vocab_size: int = T5_VOCAB) -> Any:
    """As in Wan or AuraFlow: each of its layers has a relative attention bias of its own."""
    return t5_encoder(width, vocab_size, "UMT5")


def clip_encoder(cls: type = CLIPTextModel) -> CLIPTextModel:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, projection_dim=16,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return cls(config)


def autoencoder(latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=2,
        latent_channels=latent_channels, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.1, scaling_factor=1.5,
    )  # fmt: skip


def tiny_flux(seed: int = 0, guidance_embeds: bool = True, in_channels: int = 16) -> FluxPipeline:
    torch.manual_seed(seed)
    return finish(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder(4),
            text_encoder=clip_encoder(),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5_encoder(),
            tokenizer_2=t5_tokenizer(),
            transformer=FluxTransformer2DModel(
                patch_size=1, in_channels=in_channels, out_channels=16, num_layers=1,
                num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
                guidance_embeds=guidance_embeds,
            ),
        )
    )  # fmt: skip


def tiny_sd3(seed: int = 0, channels: int = 4) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    return finish(
        StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder(channels),
            text_encoder=clip_encoder(CLIPTextModelWithProjection),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(),
            tokenizer_3=t5_tokenizer(),
            transformer=SD3Transformer2DModel(
                sample_size=32, patch_size=1, in_channels=channels, out_channels=channels,
                num_layers=2,
                attention_head_dim=8, num_attention_heads=4, joint_attention_dim=TEXT_WIDTH,
                caption_projection_dim=32, pooled_projection_dim=32,
            ),
        )
    )  # fmt: skip


def tiny_chroma(seed: int = 0) -> ChromaPipeline:
    torch.manual_seed(seed)
    return finish(
        ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder(4),
            text_encoder=t5_encoder(),
            tokenizer=t5_tokenizer(),
            transformer=ChromaTransformer2DModel(
                patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
                attention_head_dim=16, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH,
                axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
                approximator_layers=1,
            ),
        )
    )  # fmt: skip


def tiny_pixart_sigma(seed: int = 0) -> PixArtSigmaPipeline:
    torch.manual_seed(seed)
    return finish(
        PixArtSigmaPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=t5_encoder(),
            vae=autoencoder(4),
            scheduler=DDIMScheduler(),
            transformer=PixArtTransformer2DModel(
                sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8,
                num_attention_heads=3, caption_channels=TEXT_WIDTH, in_channels=4,
                cross_attention_dim=24, out_channels=8, num_embeds_ada_norm=1000,
                norm_elementwise_affine=False, norm_eps=1e-6, use_additional_conditions=False,
            ),
        )
    )  # fmt: skip


def tiny_ltx(seed: int = 0) -> LTXPipeline:
    torch.manual_seed(seed)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), patch_size=1, patch_size_t=1,
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False), upsample_factor=(1, 1, 1, 1),
    )  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return finish(
        LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=t5_encoder(),
            tokenizer=t5_tokenizer(),
            transformer=LTXVideoTransformer3DModel(
                in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4,
                attention_head_dim=8, cross_attention_dim=32, num_layers=1,
                caption_channels=TEXT_WIDTH,
            ),
        )
    )  # fmt: skip


def tiny_stable_audio(seed: int = 0) -> StableAudioPipeline:
    """Its `projection_model` is a learned layer behind T5: the denoiser's rows are no copies."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # AutoencoderOobleck still uses torch's old weight_norm
        warnings.simplefilter("ignore", FutureWarning)
        vae = AutoencoderOobleck(
            encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3,
            decoder_input_channels=3, audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
        )  # fmt: skip
    return finish(
        StableAudioPipeline(
            vae=vae,
            text_encoder=t5_encoder(),
            projection_model=StableAudioProjectionModel(
                text_encoder_dim=TEXT_WIDTH, conditioning_dim=16, min_value=0, max_value=32
            ),
            tokenizer=t5_tokenizer(),
            transformer=StableAudioDiTModel(
                sample_size=8, in_channels=3, num_layers=2, attention_head_dim=4,
                num_key_value_attention_heads=2, out_channels=3, cross_attention_dim=16,
                time_proj_dim=8, global_states_input_dim=32, num_attention_heads=4,
                cross_attention_input_dim=16,
            ),
            scheduler=EDMDPMSolverMultistepScheduler(solver_order=2, sigma_schedule="exponential"),
        )
    )  # fmt: skip


TINY_PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "flux": tiny_flux,
    "sd3": tiny_sd3,
    "chroma": tiny_chroma,
    "pixart_sigma": tiny_pixart_sigma,
    "ltx": tiny_ltx,
    "stable_audio": tiny_stable_audio,
}

_IMAGE: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": MAX_TOKENS}
_GUIDED = _IMAGE | {"guidance_scale": 4.0}
_CALL_KWARGS: dict[str, dict[str, Any]] = {
    "FluxPipeline": _IMAGE,
    "StableDiffusion3Pipeline": _GUIDED,
    "ChromaPipeline": _GUIDED,
    "PixArtSigmaPipeline": _GUIDED | {"use_resolution_binning": False, "clean_caption": False},
    "LTXPipeline": _IMAGE | {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 3.0},
    "StableAudioPipeline": {"guidance_scale": 3.0},
}


def call_kwargs(pipe: DiffusionPipeline, steps: int = 3) -> dict[str, Any]:
    """Arguments of a small fast call of `pipe`, beside prompt, generator and output_type."""
    names = [cls.__name__ for cls in type(pipe).__mro__]
    known = next(name for name in names if name in _CALL_KWARGS)
    return {**_CALL_KWARGS[known], "num_inference_steps": steps}


def tiny_student(
    pipe: DiffusionPipeline, seed: int = 1, *, d_model: int = 16, num_layers: int = 1, **config: Any
) -> Any:
    """A student (`SlimT5Encoder`) with the vocabulary and output width that `pipe` needs."""
    from t5slim import SlimT5Config, SlimT5Encoder
    from t5slim.slot import TextSlot

    slot = TextSlot(pipe).encoder
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": slot.config.vocab_size, "d_model": d_model, "d_kv": 8, "d_ff": 2 * d_model,
        "num_layers": num_layers, "num_heads": 2, "relative_attention_num_buckets": 8,
        "feed_forward_proj": "gated-gelu", "project_in_dim": d_model,
        "project_out_dim": slot.config.d_model,
    }  # fmt: skip
    return SlimT5Encoder(SlimT5Config(**shape | config)).eval()


def finish(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Eval mode, as from_pretrained leaves it, and no progress bar in the tests' output.

    Zero-initialised layers (adaLN gates, output projections) would make a fresh denoiser ignore its
    text, and a test of anything that reaches it through the text would pass whatever came.
    """
    for name, module in pipe.components.items():
        if isinstance(module, ModelMixin) and name != "vae":
            with torch.no_grad():
                for parameter in module.parameters():
                    if not parameter.any():
                        parameter.normal_(0, 0.1)
        if isinstance(module, torch.nn.Module):
            module.eval()
    for part in (pipe, *vars(pipe).values()):  # VisualCloze is made of two pipelines
        if isinstance(part, DiffusionPipeline):
            part.set_progress_bar_config(disable=True)
    return pipe
