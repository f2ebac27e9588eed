"""The pipeline classes, family by family."""

from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, LTXEulerAncestralRFScheduler
from sizes import levels
from transformers import CLIPImageProcessor, CLIPVisionModel, UMT5EncoderModel

from .case import Case, image, images, mask

# Reasons of the library for going through the pipeline.
CONTROLNET = "/0 depends on T5's output"
PERTURBED = "it changes its denoiser's attention"

NEGATIVE = {"negative_prompt": "blue"}
# With a generator for each prompt, as in training, some take an image or a video for each.
EACH = {"image": images()}
VIDEOS = {"video": [images(5)] * 2}

# --- FLUX.1 and what shares its transformer ---

# Latents have 16 channels, packed; so have those of an image or a mask that stand beside them.
BESIDE = {"transformer": {"in_channels": 32}}
FILLED = {"transformer": {"in_channels": 48}}
CLOZE = {
    "content_prompt": "a star",
    # One solved example and a query, whose second image is to be generated.
    "image": [[[image(0), image(1)], [image(2), None]]] * 2,
    # Long enough for the layout that it describes first, which the tiny tokenizer spells.
    "max_sequence_length": 160,
}

KINDS = ("", "Img2Img", "Inpaint")
FLUX = [
    *[Case(f"Flux{kind}Pipeline", changes=NEGATIVE) for kind in KINDS],
    Case("FluxFillPipeline", FILLED),
    *[Case(f"FluxControl{kind}Pipeline", BESIDE) for kind in KINDS],
    Case("FluxControlNetPipeline", changes=NEGATIVE, fallback=CONTROLNET),
    Case("FluxControlNetImg2ImgPipeline", fallback=CONTROLNET),
    Case("FluxControlNetInpaintPipeline", fallback=CONTROLNET),
    Case("FluxKontextPipeline", changes=NEGATIVE),
    Case("FluxKontextInpaintPipeline", changes=NEGATIVE),
    Case("FluxPriorReduxPipeline", changes=EACH, refused="has no denoiser"),
    Case("VisualClozeGenerationPipeline", FILLED | {"resolution": 16}, CLOZE),
    Case("VisualClozePipeline", FILLED | {"resolution": 16}, CLOZE),
    Case("ChromaPipeline", changes=NEGATIVE),
    Case("ChromaImg2ImgPipeline", changes=NEGATIVE),
    # It reads a key of FLUX's config, which Chroma's own class hasn't.
    Case("ChromaInpaintPipeline", {"transformer": {"guidance_embeds": False}}, NEGATIVE),
    Case("BriaPipeline", changes=NEGATIVE),
]

# --- Stable Diffusion 3 ---

STABLE_DIFFUSION_3 = [
    Case("StableDiffusion3Pipeline", changes=NEGATIVE),
    Case("StableDiffusion3Img2ImgPipeline", changes=NEGATIVE | EACH),
    Case(
        "StableDiffusion3InpaintPipeline",  # it takes latents of 16 channels only
        {"vae": {"latent_channels": 16}, "transformer": {"in_channels": 16, "out_channels": 16}},
        NEGATIVE,
    ),
    Case("StableDiffusion3ControlNetPipeline", changes=NEGATIVE, fallback=CONTROLNET),
    Case(
        "StableDiffusion3ControlNetInpaintingPipeline",
        {"controlnet": {"extra_conditioning_channels": 1}},
        NEGATIVE,
        fallback=CONTROLNET,
    ),
    Case("StableDiffusion3PAGPipeline", changes=NEGATIVE, fallback=PERTURBED),
    Case("StableDiffusion3PAGImg2ImgPipeline", changes=NEGATIVE | EACH, fallback=PERTURBED),
]

# --- Other images ---

BYT5 = {"vocab_size": 384}
QUOTED = ('a sign that says "hi"', 'a "red" circle')  # for those that let T5 read quotations only
LENGTHS = {
    "prompt_template_encode_start_idx": 1,
    "tokenizer_max_length": 24,
    "tokenizer_2_max_length": 24,
}
WIDTH_OF_ZEROS = {"d_model": 32}  # for prompts without quotation, zeros stand in
# The pipeline takes a latent 8 times smaller than its image for granted.
HUNYUAN_DIT = {"vae": levels(4)}
LARGER = {"height": 32, "width": 32}
DEEPFLOYD = {"scheduler": {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"}}
SUPER_RESOLUTION = DEEPFLOYD | {"unet": {"class_embed_type": "timestep", "in_channels": 6}}
SMALLER = {"image": images(size=8)}
MASKED = {"mask_image": [mask()] * 2}

IMAGE = [
    Case("PixArtAlphaPipeline"),
    Case("PixArtSigmaPipeline"),
    Case("PixArtSigmaPAGPipeline", fallback=PERTURBED),
    Case("HunyuanDiTPipeline", HUNYUAN_DIT, LARGER),
    Case("HunyuanDiTControlNetPipeline", HUNYUAN_DIT, LARGER, fallback=CONTROLNET),
    Case("HunyuanDiTPAGPipeline", HUNYUAN_DIT, LARGER, fallback=PERTURBED),
    Case("AuraFlowPipeline"),
    Case("CogView3PlusPipeline"),
    Case(
        "GlmImagePipeline",
        # Without the language model that draws `prior_token_ids`: the call brings some.
        {"text_encoder": BYT5, "processor": None, "vision_language_encoder": None},
        {"image": None, "prior_token_ids": torch.arange(32).view(2, 16) % 16},
        fallback="beside its tensors",  # a cache of keys and values, made anew for each call
        prompts=QUOTED,
    ),
    # It generates images of this area, whatever size the call gives.
    Case("HiDreamImagePipeline", attributes={"default_sample_size": 8}),
    Case(
        "HunyuanImagePipeline",
        {"text_encoder_2": BYT5, "guider": {}, "ocr_guider": {"guidance_scale": 4.0}},
        prompts=QUOTED,
        attributes=LENGTHS | {"prompt_template_encode": ": {}"},  # its own has 190 bytes
        student=WIDTH_OF_ZEROS,
    ),
    Case("IFPipeline", DEEPFLOYD),
    Case("IFImg2ImgPipeline", DEEPFLOYD, EACH),
    Case("IFInpaintingPipeline", DEEPFLOYD, EACH | MASKED),
    Case("IFSuperResolutionPipeline", SUPER_RESOLUTION, SMALLER),
    Case("IFImg2ImgSuperResolutionPipeline", SUPER_RESOLUTION, SMALLER),
    Case("IFInpaintingSuperResolutionPipeline", SUPER_RESOLUTION, SMALLER | MASKED),
    Case("Kandinsky3Pipeline"),
    Case("Kandinsky3Img2ImgPipeline"),
]

# --- Video with a UMT5: Wan and its kin ---

# The denoiser is told of the latents of an image, and of what CLIP sees in it, too.
SEEN = {"transformer": {"in_channels": 36, "image_dim": 4}}
FROM_IMAGE = SEEN | {"image_encoder": {}, "image_processor": {}}
SKYREELS = {"text_encoder": UMT5EncoderModel}
CLIP = {"image_encoder": CLIPVisionModel, "image_processor": CLIPImageProcessor}
HELIOS_SCHEDULER = {"stage_range": [0, 1], "stages": 1, "use_dynamic_shifting": True}
# With its default `gamma`, 1/3, the covariance of its noise is singular to float32.
PYRAMID_SCHEDULER = HELIOS_SCHEDULER | {"stage_range": [0, 0.5, 1], "stages": 2, "gamma": 0.3}
HELIOS = {"image": None, "video": None}

WAN = [
    Case("WanPipeline"),
    Case("WanImageToVideoPipeline", FROM_IMAGE),
    Case("WanVideoToVideoPipeline"),
    Case(
        "WanVACEPipeline",
        prompts=1,  # it refuses a list
        fallback="it can't be called with one prompt more",
    ),
    Case("WanAnimatePipeline", FROM_IMAGE, {"segment_frame_length": 5}),
    Case("LucyEditPipeline", {"transformer": {"in_channels": 32}}, VIDEOS),
    Case("ChronoEditPipeline", FROM_IMAGE),
    Case("AnyFlowPipeline", changes={"video": None}),
    # One chunk: between several, the denoiser is called to fill a cache.
    Case("AnyFlowFARPipeline", changes={"video": None, "chunk_partition": [2]}),
    # In two chunks.
    Case("HeliosPipeline", {"scheduler": HELIOS_SCHEDULER}, HELIOS | {"num_frames": 10}),
    Case("HeliosPyramidPipeline", {"scheduler": PYRAMID_SCHEDULER}, HELIOS | LARGER),
    Case("SkyReelsV2Pipeline", SKYREELS),
    Case("SkyReelsV2ImageToVideoPipeline", SKYREELS | SEEN | CLIP),
    Case(
        "SkyReelsV2DiffusionForcingPipeline",
        SKYREELS,
        # In two pieces, of which the second starts from the end of the first, with noise upon it.
        {"num_frames": 9, "base_num_frames": 5, "overlap_history": 1, "addnoise_condition": 20},
    ),
    # It takes half of the images that it made for the batch: that works for 1 and 2 prompts.
    Case("SkyReelsV2DiffusionForcingImageToVideoPipeline", SKYREELS, prompts=1),
    Case(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        SKYREELS,
        {"num_frames": 9, "overlap_history": 5},
    ),
]

# --- Video with a T5 ---


class SafetyChecker(torch.nn.Module):
    """Stands in for Cosmos' guardrail, which the pipelines insist on and is several large models.

    So it is in diffusers' own tests. What it lets through is none of a distillation's business.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames


COSMOS = {"safety_checker": SafetyChecker}
COSMOS_CALL = NEGATIVE | LARGER  # its own negative prompt is long
# Latents of an image or a video beside the noisy ones.
CONDITIONED = {"transformer": {"in_channels": 8}}
LEARNED_POSITIONS = {"transformer": {"in_channels": 8, "use_learned_positional_embeddings": True}}
COSMOS_2 = COSMOS | {"scheduler": {"use_karras_sigmas": True}}
HUNYUAN_VIDEO: dict[str, Any] = {
    "prompts": QUOTED,
    "attributes": LENGTHS | {"system_message": "a", "vision_num_semantic_tokens": 4},
    "student": WIDTH_OF_ZEROS,
}

VIDEO = [
    Case("AllegroPipeline", changes={"num_frames": 8}),
    Case("CogVideoXPipeline"),
    Case("CogVideoXFunControlPipeline", CONDITIONED | {"scheduler": CogVideoXDDIMScheduler}),
    Case("CogVideoXImageToVideoPipeline", LEARNED_POSITIONS, EACH | {"num_frames": 9}),
    Case("CogVideoXVideoToVideoPipeline", changes=VIDEOS),
    Case("ConsisIDPipeline", changes=EACH | {"num_frames": 9}),
    Case("CosmosTextToWorldPipeline", COSMOS, COSMOS_CALL),
    # A channel says which frames are given.
    Case(
        "CosmosVideoToWorldPipeline",
        COSMOS | {"transformer": {"in_channels": 5}},
        COSMOS_CALL | VIDEOS | {"image": None, "num_frames": 9},
    ),
    Case(
        "Cosmos2TextToImagePipeline",
        COSMOS_2 | {"transformer": {"in_channels": 16, "out_channels": 16}},
        COSMOS_CALL,
    ),
    Case(
        "Cosmos2VideoToWorldPipeline",
        COSMOS_2 | {"transformer": {"in_channels": 17, "out_channels": 16}},
        COSMOS_CALL | EACH | {"video": None, "num_frames": 9},
    ),
    # Their T5 is a ByT5 that reads what stands between quotation marks, and nothing else.
    Case("HunyuanVideo15Pipeline", {"text_encoder_2": BYT5}, **HUNYUAN_VIDEO),
    Case("HunyuanVideo15ImageToVideoPipeline", {"text_encoder_2": BYT5}, **HUNYUAN_VIDEO),
    Case("LTXPipeline"),
    Case("LTXImageToVideoPipeline", changes=EACH),
    Case("LTXConditionPipeline", changes={"video": None}),
    Case(
        "LTXI2VLongMultiPromptPipeline",
        {"scheduler": LTXEulerAncestralRFScheduler},
        # A window of the video for each prompt.
        {"num_frames": 33, "temporal_tile_size": 24, "temporal_overlap": 8},
        fallback="one tensor of T5's embeddings serves the whole batch",
    ),
    Case("LattePipeline"),
    # As published: the ids of "" are zeros, masked out.
    Case("MochiPipeline", {"force_zeros_for_empty_prompt": True}, {"num_frames": 7}),
]

# --- Sound ---

AUDIO = [
    Case("StableAudioPipeline", fallback="no token embedding of T5 reaches its denoiser"),
    Case(
        "LongCatAudioDiTPipeline",
        {"scheduler": {"invert_sigmas": True}},
        NEGATIVE | {"audio_duration_s": 4.0},
        refused="reads T5's hidden states",
        student=WIDTH_OF_ZEROS,  # it adds the first of them to its output
    ),
    # A GPT-2 writes embeddings of its own from those of T5 and CLAP; the denoiser reads both.
    Case(
        "AudioLDM2Pipeline",
        {"vae": {"in_channels": 1, "out_channels": 1}},
        {"audio_length_in_s": 0.004},
        fallback="encoder_hidden_states depends on T5's output",
    ),
]

CASES: dict[str, Case] = {
    case.name: case for case in [*FLUX, *STABLE_DIFFUSION_3, *IMAGE, *WAN, *VIDEO, *AUDIO]
}
