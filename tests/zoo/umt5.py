"""Pipelines whose slot holds a UMT5: Wan and its kin, SkyReels..."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from tiny import TEXT_WIDTH, finish, t5_tokenizer, umt5_encoder
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from .case import Case
from .pictures import pictures as frames
from .video import call

SHAPE: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "text_dim": TEXT_WIDTH,
    "freq_dim": 16, "ffn_dim": 32, "in_channels": 16, "out_channels": 16,
}  # fmt: skip
# For those that are told of the latents of an image, and of what CLIP sees in it, too.
IMAGE_SHAPE = SHAPE | {"in_channels": 36, "image_dim": 4}


def wan(
    cls: type[DiffusionPipeline],
    denoiser: str = "WanTransformer3DModel",
    *,
    scheduler: Any = None,
    experts: int = 1,
    **shape: Any,
) -> DiffusionPipeline:
    """`denoiser`: its class, by name, since older versions of diffusers don't have all of them.

    `experts`: Wan 2.2 has a second denoiser for the later timesteps.
    """
    torch.manual_seed(0)
    shape = SHAPE | shape
    components: dict[str, Any] = {
        "tokenizer": t5_tokenizer(),
        "text_encoder": umt5_encoder(),
        "vae": diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        "scheduler": scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        "transformer": getattr(diffusers, denoiser)(**shape),
    }
    if shape.get("image_dim"):
        components["image_processor"] = CLIPImageProcessor(size=4, crop_size=4)
        components["image_encoder"] = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=4, num_hidden_layers=2, num_attention_heads=2, image_size=4,
                intermediate_size=16, patch_size=1,
            )
        )  # fmt: skip
    if experts == 2:
        components |= {
            "transformer_2": getattr(diffusers, denoiser)(**shape),
            "boundary_ratio": 0.9,
        }
    return finish(cls(**components))


def skyreels(cls: type[DiffusionPipeline], **shape: Any) -> DiffusionPipeline:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    return wan(cls, "SkyReelsV2Transformer3DModel", scheduler=scheduler, **shape)


def from_text() -> dict[str, Any]:
    return call(num_frames=5)


def from_image() -> dict[str, Any]:
    return call(num_frames=5, image=frames(1, 16)[0])


def helios_pyramid_call() -> dict[str, Any]:
    arguments = call(
        32, num_frames=5, num_latent_frames_per_chunk=2, pyramid_num_inference_steps_list=[1, 1]
    )
    del arguments["num_inference_steps"]
    return arguments


CASES = [
    Case("WanPipeline", wan, from_text),
    Case("WanImageToVideoPipeline", lambda cls: wan(cls, **IMAGE_SHAPE), from_image),
    Case("WanVideoToVideoPipeline", wan, lambda: call(video=frames(5, 16))),
    Case(
        "WanVACEPipeline",
        lambda cls: wan(cls, "WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=96),
        lambda: call(
            num_frames=5, video=frames(5, 16), mask=frames(5, 16), reference_images=frames(1, 16)[0]
        ),
        prompts=1,  # it refuses a list
        route="fallback",
        why="it can't be called with one prompt more",
    ),
    Case(
        "WanAnimatePipeline",
        lambda cls: wan(
            cls,
            "WanAnimateTransformer3DModel",
            **IMAGE_SHAPE,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=1,
        ),
        lambda: call(
            image=frames(1, 16)[0],
            pose_video=frames(5, 16),
            face_video=frames(5, 16),
            segment_frame_length=5,
        ),
    ),
    Case(
        "LucyEditPipeline",
        lambda cls: wan(cls, in_channels=32),
        lambda: call(num_frames=5, video=[frames(5, 16)] * 2),  # one for each prompt
    ),
    Case(
        "ChronoEditPipeline",
        lambda cls: wan(cls, "ChronoEditTransformer3DModel", **IMAGE_SHAPE),
        from_image,
    ),
    Case(
        "AnyFlowPipeline",
        lambda cls: wan(
            cls, "AnyFlowTransformer3DModel", scheduler=diffusers.FlowMapEulerDiscreteScheduler()
        ),
        from_text,
    ),
    Case(
        "AnyFlowFARPipeline",
        lambda cls: wan(
            cls, "AnyFlowFARTransformer3DModel", scheduler=diffusers.FlowMapEulerDiscreteScheduler()
        ),
        lambda: call(num_frames=5, chunk_partition=[2]),  # one chunk; see first_tensor
    ),
    Case(
        "HeliosPipeline",
        lambda cls: wan(
            cls,
            "HeliosTransformer3DModel",
            rope_dim=(4, 4, 4),
            scheduler=diffusers.HeliosScheduler(
                stage_range=[0, 1], stages=1, use_dynamic_shifting=True
            ),
        ),
        lambda: call(num_frames=10, num_latent_frames_per_chunk=2),  # two chunks
    ),
    Case(
        "HeliosPyramidPipeline",
        lambda cls: wan(
            cls,
            "HeliosTransformer3DModel",
            rope_dim=(4, 4, 4),
            # With its default `gamma`, 1/3, the covariance of its noise is singular to float32.
            scheduler=diffusers.HeliosScheduler(
                stages=2, stage_range=[0, 0.5, 1], use_dynamic_shifting=True, gamma=0.3
            ),
        ),
        helios_pyramid_call,
    ),
    Case("SkyReelsV2Pipeline", skyreels, from_text),
    Case("SkyReelsV2ImageToVideoPipeline", lambda cls: skyreels(cls, **IMAGE_SHAPE), from_image),
    Case(
        "SkyReelsV2DiffusionForcingPipeline",
        skyreels,
        # In two pieces, of which the second starts from the end of the first, with noise upon it.
        lambda: call(num_frames=9, base_num_frames=5, overlap_history=1, addnoise_condition=20),
    ),
    # It takes half of the images that it made for the batch: that works for 1 and 2 prompts.
    Case("SkyReelsV2DiffusionForcingImageToVideoPipeline", skyreels, from_image, prompts=1),
    Case(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        skyreels,
        lambda: call(video=frames(5, 16), num_frames=9, overlap_history=5),
    ),
]
