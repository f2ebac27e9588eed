"""Every pipeline class of diffusers that has a T5, tiny and real: how it is made and called."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline
from PIL import Image
from tiny import PROMPTS, call_kwargs, tiny


def image(seed: int = 0, size: int = 16) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def images(count: int = 2, size: int = 16) -> list[Image.Image]:
    """Different ones: the frames of a video, or one for each prompt."""
    return [image(seed, size) for seed in range(count)]


def mask() -> Image.Image:
    """The left half is white: to be generated anew."""
    whole = Image.new("L", (16, 16))
    whole.paste(255, (0, 0, 8, 16))
    return whole


# Beside `tiny.call_kwargs`: what a class takes of these, unless its case says otherwise.
INPUTS: dict[str, Any] = {
    "image": image(), "mask_image": mask(), "strength": 1.0, "original_image": images(),
    "control_image": image(1), "control_mask": mask(), "control_video": [images(5)] * 2,
    "image_reference": image(1), "reference_images": image(), "cond_image": image(),
    "video": images(5), "pose_video": images(5), "face_video": images(5), "mask": images(5),
    "id_cond": torch.ones(1, 2), "id_vit_hidden": [torch.ones(1, 2, 2)],
    "max_area": 256, "_auto_resize": False, "upsampling_height": 32, "upsampling_width": 32,
    "skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0, "video_length": 2,
    "true_cfg_scale": 2.0, "num_latent_frames_per_chunk": 2,
    "pyramid_num_inference_steps_list": [1, 1],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A pipeline class: all in which it differs from what its signatures say."""

    name: str  # of the class in diffusers
    components: Mapping[str, Any] = field(default_factory=dict)  # arguments of `tiny`
    changes: Mapping[str, Any] = field(default_factory=dict)  # of a call; None takes one away
    # For one that a student runs through the pipeline's own code, and not with its embeddings put
    # where the teacher's stood: a part of the reason that the library gives.
    fallback: str = ""
    refused: str = ""  # for one that can't be distilled for: a part of the message
    # How many of `tiny.PROMPTS` go through it together, as some take one only; or which.
    prompts: int | tuple[str, ...] = 2
    # Set on the pipeline, for lengths that aren't in its components' configs.
    attributes: Mapping[str, Any] = field(default_factory=dict)
    # Sizes of the student, where the pipeline asks for more than its width.
    student: Mapping[str, int] = field(default_factory=dict)

    @property
    def cls(self) -> type[DiffusionPipeline]:
        if self.name == "ConsisIDPipeline":  # diffusers gives it out only where OpenCV is
            return ConsisIDPipeline
        return getattr(diffusers, self.name)

    def pipe(self) -> Any:
        pipe = tiny(self.cls, **self.components)
        for name, value in self.attributes.items():
            setattr(pipe, name, value)
        denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
        if denoiser is not None:  # fresh, some would be changed by the text no more than by 1 %
            with torch.no_grad():
                for parameter in denoiser.parameters():
                    parameter.mul_(2 if parameter.ndim > 1 else 1)
        return pipe

    def call(self) -> dict[str, Any]:
        """Arguments of a call of 2 steps beside prompt, generator and output_type."""
        takes = inspect.signature(self.cls.__call__).parameters
        inputs = {name: value for name, value in INPUTS.items() if name in takes}
        call = call_kwargs(self.cls, steps=2) | inputs | self.changes
        return {name: value for name, value in call.items() if value is not None}

    @property
    def route(self) -> str:
        """By which a student learns: "gather", "fallback" or "none"."""
        return "none" if self.refused else "fallback" if self.fallback else "gather"

    @property
    def texts(self) -> list[str]:
        return PROMPTS[: self.prompts] if isinstance(self.prompts, int) else list(self.prompts)
