"""Sizes of tiny components: what a class of diffusers or transformers is made with, by its name.

For a class of diffusers these are arguments, for a model of transformers entries of its config.
"""

import string
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

TEXT_WIDTH = 32  # channels of the teacher's embeddings, the width that every tiny denoiser reads
T5_VOCAB = 256
MAX_TOKENS = 12
CLIP_TOKENS = 64

WORDS = "red green blue circle square star sign a the small large on of left right above two"


def t5_pieces() -> list[tuple[str, float]]:
    """A Unigram vocabulary that knows `WORDS` and spells the rest; `len` is `T5_VOCAB`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in WORDS.split()]
    pieces += [(char, -6.0) for char in string.ascii_letters + string.digits + string.punctuation]
    pieces += [(f"▁filler{i}", -20.0) for i in range(T5_VOCAB - 100 - len(pieces))]
    return pieces + [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]


def numbered(*tokens: str) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


_CHARS = string.ascii_lowercase + string.digits + string.punctuation
# Byte-level BPE without merges: they spell.
CLIP_VOCAB = numbered(
    "<|startoftext|>", "<|endoftext|>", *_CHARS, *(char + "</w>" for char in _CHARS)
)
QWEN_VOCAB = numbered(*sorted(ByteLevel.alphabet()), "<|endoftext|>")


def levels(count: int) -> dict[str, tuple[Any, ...]]:
    """Of an autoencoder, whose latents are 2 ** (count - 1) times smaller than its images."""
    return {
        "block_out_channels": (4,) * count,
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
    }


# By an argument's name, for every class of diffusers that takes it and has nothing else in `SIZES`.
COMMON: dict[str, Any] = {
    # All the names that T5's width has.
    "joint_attention_dim": TEXT_WIDTH, "caption_channels": TEXT_WIDTH, "text_dim": TEXT_WIDTH,
    "text_embed_dim": TEXT_WIDTH, "text_embed_2_dim": TEXT_WIDTH, "encoder_hid_dim": TEXT_WIDTH,
    "cross_attention_dim_t5": TEXT_WIDTH, "dit_text_dim": TEXT_WIDTH, "text_emb_dim": TEXT_WIDTH,
    "text_encoder_dim": TEXT_WIDTH, "text_encoder_1_dim": TEXT_WIDTH, "txt_in_features": TEXT_WIDTH,
    # Of denoisers, and what stands beside them.
    "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "layers_per_block": 1,
    "num_mmdit_layers": 1, "num_single_dit_layers": 1, "dit_depth": 1, "vace_layers": [0],
    "num_attention_heads": 2, "attention_head_dim": 8, "dit_heads": 2, "dit_dim": 16,
    "caption_projection_dim": 32, "adaln_lora_dim": 4, "freq_dim": 16, "ffn_dim": 32,
    "prior_vq_quantizer_codebook_size": 16, "redux_dim": 16, "langauge_model_dim": 16,
    "conditioning_dim": 16, "min_value": 0, "max_value": 32, "max_text_seq_length": MAX_TOKENS,
    "concat_padding_mask": False,  # which Cosmos would resize with torchvision
    # Of autoencoders, for images and videos, and for sound.
    "latent_channels": 4, "norm_num_groups": 2, "encoder_block_out_channels": (4,) * 4,
    "decode_block_out_channels": (4,) * 4, "base_dim": 3, "dim_mult": [1] * 4, "num_res_blocks": 1,
    "encoder_hidden_size": 6, "downsampling_ratios": [1, 2], "decoder_channels": 3,
    "decoder_input_channels": 3, "channel_multiples": [2, 4], "sampling_rate": 4, "channels": 4,
    "c_mults": [1, 2], "strides": [2], "sample_rate": 4,
}  # fmt: skip

_T5 = {
    "vocab_size": T5_VOCAB, "d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 37, "num_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 8, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_HIDDEN = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
_QWEN = _HIDDEN | {
    "vocab_size": len(QWEN_VOCAB) + 2, "num_key_value_heads": 2,
    "bos_token_id": None, "eos_token_id": len(QWEN_VOCAB) - 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}  # fmt: skip
_FLUX = {"in_channels": 16, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)}
_FLUX_POOLED = _FLUX | {"pooled_projection_dim": 16, "guidance_embeds": True}
_SD3 = {
    "sample_size": 32, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "num_attention_heads": 4, "pooled_projection_dim": 32,
}  # fmt: skip
_HUNYUAN_DIT = {
    "sample_size": 8, "patch_size": 2, "num_attention_heads": 3, "in_channels": 4,
    "cross_attention_dim": 24, "pooled_projection_dim": 4, "hidden_size": 24,
}  # fmt: skip
_COGVIDEOX = {
    "attention_head_dim": 16, "time_embed_dim": 4, "in_channels": 4, "out_channels": 4,
    "sample_width": 2, "sample_height": 2, "sample_frames": 9,
    "use_rotary_positional_embeddings": True,
}  # fmt: skip

SIZES: dict[str, dict[str, Any]] = {
    # Tokenizers and processors.
    "T5Tokenizer": {"vocab": t5_pieces(), "model_max_length": MAX_TOKENS},
    "CLIPTokenizer": {"vocab": CLIP_VOCAB, "merges": [], "model_max_length": CLIP_TOKENS},
    "Qwen2Tokenizer": {
        "vocab": QWEN_VOCAB, "merges": [],
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    },
    "BertTokenizer": {"vocab": numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]")},
    "RobertaTokenizer": {
        "vocab": numbered("<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefg"), "merges": [],
        "model_max_length": 8,
    },
    "ByT5Tokenizer": {},
    "CLIPImageProcessor": {"size": 4, "crop_size": 4},
    "SiglipImageProcessor": {"size": {"height": 16, "width": 16}},
    "ClapFeatureExtractor": {"feature_size": 16, "hop_length": 64, "fft_window_size": 64},
    # Models of transformers.
    "T5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
    "CLIPTextModel": _HIDDEN | {
        "vocab_size": len(CLIP_VOCAB), "projection_dim": 16, "max_position_embeddings": CLIP_TOKENS,
        "bos_token_id": 0, "eos_token_id": 1,
    },
    "CLIPVisionModel": _HIDDEN | {"hidden_size": 4, "image_size": 4, "patch_size": 1},
    "SiglipVisionModel": _HIDDEN | {"image_size": 16, "patch_size": 8, "vision_use_head": False},
    "BertModel": _HIDDEN | {"vocab_size": 4, "hidden_size": 24},
    "LlamaForCausalLM": _HIDDEN | {"vocab_size": T5_VOCAB},
    "Qwen2_5_VLTextModel": _QWEN,
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": _QWEN,
        "vision_config": {
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 16,
        },
    },
    "ClapModel": {
        "text_config": _HIDDEN | {"vocab_size": 12, "max_position_embeddings": 16},
        "audio_config": {
            "hidden_size": 8, "patch_embeds_hidden_size": 8, "depths": [1], "window_size": 4,
        },
        "projection_dim": 8,
    },
    "GPT2LMHeadModel": {
        "vocab_size": 99, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64,
        "max_new_tokens": 4,
    },
    "SpeechT5HifiGan": {
        "model_in_dim": 4, "upsample_initial_channel": 8, "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1]], "normalize_before": False,
    },
    # Autoencoders.
    "AutoencoderKL": levels(2) | {
        "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1,
        "scaling_factor": 1.5,
    },
    "VQModel": levels(2) | {"block_out_channels": (8, 16), "norm_num_groups": 4, "vq_embed_dim": 4},
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8, "block_out_channels": (8,) * 4, "patch_size": 1,
        "decoder_block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5,
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
    },
    "AutoencoderKLAllegro": {"block_out_channels": (4, 4, 4, 4)},
    "AutoencoderKLMochi": {
        "latent_channels": 12, "encoder_block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (32,) * 4, "layers_per_block": (1,) * 5,
    },
    "AutoencoderKLCogVideoX": {"block_out_channels": (4, 4, 4, 4)},
    "AutoencoderKLCosmos": {"latents_mean": None, "latents_std": None},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 32),
        "spatial_compression_ratio": 2, "sample_size": 16,
    },
    "AutoencoderKLHunyuanVideo15": {
        "block_out_channels": (16, 16), "spatial_compression_ratio": 4,
        "downsample_match_channel": False, "upsample_match_channel": False,
    },
    # Denoisers, and what stands beside them.
    "FluxTransformer2DModel": _FLUX_POOLED | {"out_channels": 16},
    "FluxControlNetModel": _FLUX_POOLED,
    "ChromaTransformer2DModel": _FLUX | {
        "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1,
    },
    "BriaTransformer2DModel": _FLUX,
    "SD3Transformer2DModel": _SD3,
    "SD3ControlNetModel": _SD3,
    "PixArtTransformer2DModel": {
        "sample_size": 8, "num_layers": 2, "num_attention_heads": 3, "cross_attention_dim": 24,
        "use_additional_conditions": False,
    },
    "HunyuanDiT2DModel": _HUNYUAN_DIT | {"num_layers": 4},
    "HunyuanDiT2DControlNetModel": _HUNYUAN_DIT | {"transformer_num_layers": 4},
    "AuraFlowTransformer2DModel": {"num_attention_heads": 4},
    "CogView3PlusTransformer2DModel": {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8},
    "GlmImageTransformer2DModel": {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 4, "max_resolution": (32, 32),
        "caption_channels": [TEXT_WIDTH, 16], "llama_layers": [0, 1], "axes_dims_rope": (4, 2, 2),
    },
    "HunyuanImageTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "text_embed_dim": 16, "rope_axes_dim": (4, 4),
    },
    "UNet2DConditionModel": {  # DeepFloyd IF's
        "sample_size": 16, "in_channels": 3, "out_channels": 6, "block_out_channels": (8, 16),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "num_attention_heads": None,
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "cross_attention_dim": 32, "norm_num_groups": 4, "act_fn": "gelu",
        "addition_embed_type": "text", "addition_embed_type_num_heads": 2,
        "cross_attention_norm": "group_norm", "resnet_time_scale_shift": "scale_shift",
    },
    "Kandinsky3UNet": {
        "time_embedding_dim": 4, "groups": 2, "attention_head_dim": 4, "layers_per_block": 3,
        "block_out_channels": (8, 16), "cross_attention_dim": 4,
    },
    "WanAnimateTransformer3DModel": {
        "latent_channels": 16, "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4,
        "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1,
    },
    "HeliosTransformer3DModel": {"attention_head_dim": 12, "rope_dim": (4, 4, 4)},
    "AllegroTransformer3DModel": {"attention_head_dim": 12, "cross_attention_dim": 24},
    "LatteTransformer3DModel": {
        "sample_size": 8, "patch_size": 2, "num_attention_heads": 3, "in_channels": 4,
        "out_channels": 8, "cross_attention_dim": 24, "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "video_length": 2,
    },
    "MochiTransformer3DModel": {"num_layers": 2, "pooled_projection_dim": 16, "time_embed_dim": 4},
    "CogVideoXTransformer3DModel": _COGVIDEOX,
    "ConsisIDTransformer3DModel": _COGVIDEOX | {
        "in_channels": 8, "use_learned_positional_embeddings": True, "is_train_face": True,
        "cross_attn_interval": 1, "cross_attn_dim_head": 4, "cross_attn_num_heads": 1,
        "LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 1, "LFE_dim_head": 4, "LFE_num_heads": 1,
        "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 21, "LFE_ff_mult": 1,
        "LFE_num_scale": 1,
    },
    "CosmosTransformer3DModel": {"in_channels": 4, "out_channels": 4, "attention_head_dim": 16},
    "HunyuanVideo15Transformer3DModel": {
        "in_channels": 9, "out_channels": 4, "mlp_ratio": 2.0, "text_embed_dim": 16,
        "image_embed_dim": 16, "rope_axes_dim": (2, 2, 4), "target_size": 16,
    },
    "LTXVideoTransformer3DModel": {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "cross_attention_dim": 32,
    },
    "StableAudioDiTModel": {
        "sample_size": 8, "in_channels": 3, "num_layers": 2, "attention_head_dim": 4,
        "num_key_value_attention_heads": 2, "out_channels": 3, "cross_attention_dim": 16,
        "time_proj_dim": 8, "global_states_input_dim": 32, "num_attention_heads": 4,
        "cross_attention_input_dim": 16,
    },
    "LongCatAudioDiTTransformer": {"latent_dim": 4},
    "AudioLDM2ProjectionModel": {"text_encoder_dim": 8},
    "AudioLDM2UNet2DConditionModel": {
        "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4,
        "num_attention_heads": None, "cross_attention_dim": [[None, 16, TEXT_WIDTH]] * 2,
    },
    # Schedulers and guiders.
    "EDMDPMSolverMultistepScheduler": {"sigma_schedule": "exponential"},
    "EDMEulerScheduler": {"final_sigmas_type": "sigma_min"},
    "UniPCMultistepScheduler": {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0,
    },
}  # fmt: skip
