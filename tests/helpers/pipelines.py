"""More tiny pipelines than `tiny` has, and what the tests of slot and patch do with them."""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable
from contextlib import suppress

import diffusers
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionXLPipeline
from tiny import PROMPTS, call_kwargs, tiny, tiny_flux, tiny_student

from t5slim import SlimT5Encoder, patch_pipeline
from t5slim.slot import TextSlot

OFFLOADS = {
    "none": lambda pipe: None,
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "group by leaf": lambda pipe: pipe.enable_group_offload("cpu", offload_type="leaf_level"),
    "group by block": lambda pipe: pipe.enable_group_offload("cpu", num_blocks_per_group=1),
}


def flux_student(**config) -> SlimT5Encoder:
    """A student that fits a tiny FLUX, or with other sizes than it needs."""
    return tiny_student(tiny_flux(), **config)


def patched_flux(**kwargs) -> FluxPipeline:
    return patch_pipeline(tiny_flux(), flux_student(), **kwargs)


def generate(pipe, prompt=PROMPTS[1], **kwargs) -> torch.Tensor:
    """The final latents: all that a text encoder can change."""
    kwargs = call_kwargs(pipe) | {"output_type": "latent", "return_dict": True} | kwargs
    output = pipe(prompt, generator=torch.Generator().manual_seed(0), **kwargs)
    return next(iter(output.values()))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def interrupted(call: Callable[[], object], nth: int = -1) -> int:
    """How many functions `call` enters in the files that change a pipeline.

    A Ctrl-C comes as it enters the nth, and goes no further than here.
    """
    files = ("t5slim/slot.py", "t5slim/patch.py", "pipelines/pipeline_utils.py")
    files += ("hooks/group_offloading.py", "accelerate/hooks.py", "accelerate/big_modeling.py")
    calls, before = 0, sys.gettrace()

    def trace(frame, event, argument):
        nonlocal calls
        calls += frame.f_code.co_filename.endswith(files)
        if calls == nth:
            sys.settrace(before)
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        sys.settrace(trace)
        try:
            call()
        finally:
            sys.settrace(before)
    return calls


def state_of(module) -> tuple:
    tensors = {name: (tensor.dtype, tensor.device) for name, tensor in module.named_parameters()}
    return tensors, [part.training for part in module.modules()], len(hooks_of(module))


def hooks_of(module) -> list:
    """The hooks of accelerate and diffusers on a module and its parts."""
    parts = [vars(part) for part in module.modules()]
    hooks = [part["_hf_hook"] for part in parts if "_hf_hook" in part]
    registries = [part["_diffusers_hook"] for part in parts if "_diffusers_hook" in part]
    return hooks + [hook for registry in registries for hook in registry.hooks]


def t5_of(pipe) -> torch.nn.Module:
    return TextSlot(pipe).encoder


def every_pipeline_class() -> list[type[DiffusionPipeline]]:
    """Also of modules that need a package which isn't here: as far as they can be imported."""
    classes: set[type] = set()
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        with suppress(ImportError):
            contents = vars(importlib.import_module(module.name)).values()
            classes |= {value for value in contents if inspect.isclass(value)}
    pipelines = [cls for cls in classes - {DiffusionPipeline} if issubclass(cls, DiffusionPipeline)]
    return sorted(pipelines, key=lambda cls: cls.__name__)


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """The text encoders of one, neither of which is a T5."""
    return tiny(StableDiffusionXLPipeline, vae=None, unet=None, scheduler=None)
