"""More tiny pipelines than `tiny` has, and what the tests of slot and patch do with them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny import PROMPTS, autoencoder, call_kwargs, clip_encoder, clip_tokenizer, tiny_student
from transformers import CLIPTextModelWithProjection

from t5slim import SlimT5Config, SlimT5Encoder
from t5slim.slot import TextSlot

GROUP = {"onload_device": "cpu", "offload_type": "leaf_level"}
BLOCKS = {"onload_device": "cpu", "offload_type": "block_level", "num_blocks_per_group": 1}
OFFLOADS = {
    "none": lambda pipe: None,
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "group by leaf": lambda pipe: pipe.enable_group_offload(**GROUP),
    "group by block": lambda pipe: pipe.enable_group_offload(**BLOCKS),
}


def generate(pipe, prompt=PROMPTS[1], **kwargs) -> torch.Tensor:
    """The final latents: all that a text encoder can change."""
    kwargs = call_kwargs(pipe) | {"output_type": "latent", "return_dict": True} | kwargs
    output = pipe(prompt, generator=torch.Generator().manual_seed(0), **kwargs)
    return next(iter(output.values()))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def student_for(pipe, **config) -> SlimT5Encoder:
    """A student of other sizes than `pipe` needs."""
    sizes = tiny_student(pipe).config.to_dict() | config
    return SlimT5Encoder(SlimT5Config.from_dict(sizes)).eval()


def state(pipe) -> tuple:
    """Everything that a failed patch, or a patch and its undoing, must leave as it was."""
    modules = {name: part for name, part in pipe.components.items() if part is not None}
    return (
        {name: id(part) for name, part in pipe.components.items()},
        dict(pipe.config),
        {key for key in vars(pipe) if key != "_progress_bar_config"},
        {
            name: (part.dtype, part.device, type(getattr(part, "_hf_hook", None)), part.training)
            for name, part in modules.items()
            if isinstance(part, torch.nn.Module)
        },
        len(getattr(pipe, "_all_hooks", [])),
    )


def t5_of(pipe) -> torch.nn.Module:
    return TextSlot(pipe).encoder


def every_pipeline_class() -> list[type[DiffusionPipeline]]:
    """Also of modules that need a package which isn't here: as far as they can be imported."""
    classes = set()
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        try:
            contents = vars(importlib.import_module(module.name))
        except ImportError:
            continue
        classes |= {
            value
            for value in contents.values()
            if inspect.isclass(value)
            and issubclass(value, DiffusionPipeline)
            and value is not DiffusionPipeline
        }
    return sorted(classes, key=lambda cls: cls.__name__)


def tiny_sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=autoencoder(4),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        ),
        scheduler=DDIMScheduler(),
    )  # fmt: skip
