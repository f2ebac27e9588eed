"""FLUX.1 and what shares its transformer: Chroma, Bria, VisualCloze."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    BriaTransformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
)
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from tiny import (
    TEXT_WIDTH,
    autoencoder,
    call_kwargs,
    clip_encoder,
    clip_tokenizer,
    finish,
    t5_encoder,
    t5_tokenizer,
    tiny_chroma,
    tiny_flux,
)
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from .case import Case
from .pictures import mask, picture

Cls = type[DiffusionPipeline]

LATENT = 16  # channels of a packed latent of `tiny.autoencoder(4)`; of its packed mask, too
TRUE_CFG = {"negative_prompt": "blue", "true_cfg_scale": 2.0}
CONTROLNET_READS_T5 = "controlnet_block_samples/0 depends on T5's output"


def flux(cls: Cls, channels: int = LATENT, **more: Any) -> DiffusionPipeline:
    """`channels`: those of the latents, and of what stands beside them."""
    return cls(**_components(channels), **more)


def _components(channels: int = LATENT) -> dict[str, Any]:
    """Without the image encoder of IP-Adapters, which some of the classes don't take."""
    components = tiny_flux(in_channels=channels).components
    return {name: module for name, module in components.items() if module is not None}


def flux_call(**more: Any) -> dict[str, Any]:
    return call_kwargs(tiny_flux(), steps=2) | more


def controlled(cls: Cls) -> DiffusionPipeline:
    components = _components()
    controlnet = FluxControlNetModel(
        patch_size=1, in_channels=LATENT, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=16,
        guidance_embeds=True, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return cls(**components, controlnet=controlnet)


def redux(cls: Cls) -> DiffusionPipeline:
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return cls(
        image_encoder=SiglipVisionModel(config),
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
        image_embedder=ReduxImageEncoder(redux_dim=16, txt_in_features=TEXT_WIDTH),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def cloze_call(**more: Any) -> dict[str, Any]:
    """One solved example and a query, whose second picture is to be made."""
    sample = [[picture(0), picture(1)], [picture(2), None]]
    # Long enough for the layout that it describes first, which the tiny tokenizer spells.
    call = flux_call(content_prompt="a star", image=[sample] * 2, max_sequence_length=160)
    return {name: value for name, value in call.items() if name not in ("height", "width")} | more


def chroma(cls: Cls) -> DiffusionPipeline:
    components = tiny_chroma().components
    # The key of FLUX's config that ChromaInpaintPipeline reads, and Chroma's own class hasn't.
    components["transformer"].register_to_config(guidance_embeds=False)
    return cls(**components)


def chroma_call(**more: Any) -> dict[str, Any]:
    return call_kwargs(tiny_chroma(), steps=2) | {"negative_prompt": "blue"} | more


def bria(cls: Cls) -> DiffusionPipeline:
    torch.manual_seed(0)
    return finish(
        cls(
            transformer=BriaTransformer2DModel(
                patch_size=1, in_channels=LATENT, num_layers=1, num_single_layers=1,
                attention_head_dim=16, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH,
                axes_dims_rope=[4, 4, 8],
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder(4),
            text_encoder=t5_encoder(),
            tokenizer=t5_tokenizer(),
        )
    )  # fmt: skip


def from_image(**more: Any) -> dict[str, Any]:
    return flux_call(image=picture(), strength=1.0) | more


CASES = [
    Case("FluxPipeline", flux, partial(flux_call, **TRUE_CFG)),
    Case("FluxImg2ImgPipeline", flux, partial(from_image, **TRUE_CFG)),
    Case("FluxInpaintPipeline", flux, partial(from_image, mask_image=mask(), **TRUE_CFG)),
    Case("FluxFillPipeline", partial(flux, channels=3 * LATENT),
         partial(from_image, mask_image=mask())),
    Case("FluxControlPipeline", partial(flux, channels=2 * LATENT),
         partial(flux_call, control_image=picture(1))),
    Case("FluxControlImg2ImgPipeline", partial(flux, channels=2 * LATENT),
         partial(from_image, control_image=picture(1))),
    Case("FluxControlInpaintPipeline", partial(flux, channels=2 * LATENT),
         partial(from_image, control_image=picture(1), mask_image=mask())),
    Case("FluxControlNetPipeline", controlled,
         partial(flux_call, control_image=picture(1), **TRUE_CFG),
         route="fallback", why=CONTROLNET_READS_T5),
    Case("FluxControlNetImg2ImgPipeline", controlled,
         partial(from_image, control_image=picture(1)),
         route="fallback", why=CONTROLNET_READS_T5),
    Case("FluxControlNetInpaintPipeline", controlled,
         partial(from_image, control_image=picture(1), mask_image=mask()),
         route="fallback", why=CONTROLNET_READS_T5),
    Case("FluxKontextPipeline", flux,
         partial(flux_call, image=picture(), max_area=256, _auto_resize=False, **TRUE_CFG)),
    Case("FluxKontextInpaintPipeline", flux,
         partial(from_image, mask_image=mask(), image_reference=picture(1), max_area=256,
                 _auto_resize=False, **TRUE_CFG)),
    Case("FluxPriorReduxPipeline", redux, lambda: {"image": [picture(0), picture(1)]},
         route="none", why="has no denoiser"),
    Case("VisualClozeGenerationPipeline", partial(flux, channels=3 * LATENT, resolution=16),
         cloze_call),
    Case("VisualClozePipeline", partial(flux, channels=3 * LATENT, resolution=16),
         partial(cloze_call, upsampling_height=32, upsampling_width=32)),
    Case("ChromaPipeline", chroma, chroma_call),
    Case("ChromaImg2ImgPipeline", chroma, partial(chroma_call, image=picture())),
    Case("ChromaInpaintPipeline", chroma,
         partial(chroma_call, image=picture(), mask_image=mask())),
    Case("BriaPipeline", bria,
         lambda: {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 4.0,
                  "negative_prompt": "blue", "max_sequence_length": 12}),
]  # fmt: skip
