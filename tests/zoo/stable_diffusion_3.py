"""Stable Diffusion 3, with guidance and without, from pictures, with ControlNets."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import DiffusionPipeline, SD3ControlNetModel
from tiny import call_kwargs, tiny_sd3

from .case import Case
from .pictures import mask, picture

Cls = type[DiffusionPipeline]

CONTROLNET_READS_T5 = "block_controlnet_hidden_states/0 depends on T5's output"
PERTURBED = "it changes its denoiser's attention"


def sd3(cls: Cls, channels: int = 4, **more: Any) -> DiffusionPipeline:
    components = tiny_sd3(channels=channels).components
    # Without the image encoder of IP-Adapters, which some of the classes don't take.
    given = {name: module for name, module in components.items() if module is not None}
    return cls(**given, **more)


def sd3_call(**more: Any) -> dict[str, Any]:
    return call_kwargs(tiny_sd3(), steps=2) | {"negative_prompt": "blue"} | more


def controlled(cls: Cls, mask_channels: int = 0) -> DiffusionPipeline:
    controlnet = SD3ControlNetModel.from_transformer(
        tiny_sd3().transformer, num_layers=1, num_extra_conditioning_channels=mask_channels
    )
    return sd3(cls, controlnet=controlnet)


CASES = [
    Case("StableDiffusion3Pipeline", sd3,
         partial(sd3_call, skip_guidance_layers=[0], skip_layer_guidance_start=0.0,
                 skip_layer_guidance_stop=1.0)),
    # With a generator for each prompt, as in training, it takes a picture for each only.
    Case("StableDiffusion3Img2ImgPipeline", sd3,
         partial(sd3_call, image=[picture(0), picture(1)], strength=1.0)),
    # It takes latents of 16 channels only.
    Case("StableDiffusion3InpaintPipeline", partial(sd3, channels=16),
         partial(sd3_call, image=picture(), mask_image=mask(), strength=1.0)),
    Case("StableDiffusion3ControlNetPipeline", controlled,
         partial(sd3_call, control_image=picture(1)),
         route="fallback", why=CONTROLNET_READS_T5),
    Case("StableDiffusion3ControlNetInpaintingPipeline", partial(controlled, mask_channels=1),
         partial(sd3_call, control_image=picture(1), control_mask=mask()),
         route="fallback", why=CONTROLNET_READS_T5),
    Case("StableDiffusion3PAGPipeline", partial(sd3, pag_applied_layers=["blocks.0"]), sd3_call,
         route="fallback", why=PERTURBED),
    Case("StableDiffusion3PAGImg2ImgPipeline", partial(sd3, pag_applied_layers=["blocks.0"]),
         partial(sd3_call, image=[picture(0), picture(1)], strength=1.0),
         route="fallback", why=PERTURBED),
]  # fmt: skip
