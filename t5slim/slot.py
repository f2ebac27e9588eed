"""The T5 slot of a diffusers pipeline: finding it, and putting another module in it.

A pipeline keeps its T5 in one component: `text_encoder`, `text_encoder_2` or `text_encoder_3`.
Which one is read from the module that is there (its `config.model_type`) and, where there is none
because T5 was skipped when the pipeline was loaded, from the annotations of the pipeline's
`__init__`, or from what the blocks of a modular pipeline expect. So this file holds no table of
pipelines, and doesn't import diffusers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]
from torch import nn

from .errors import NoT5SlotError, PatchError

_COMPONENT = re.compile(r"text_encoder(_\d+)?")
_T5_CLASS = re.compile(r"\b((UM|M)?T5EncoderModel|SlimT5Encoder)\b")
_T5_MODEL_TYPES = frozenset({"t5", "mt5", "umt5", "slim_t5", "slim_t5_contextless"})

# The denoiser's config key for the width of T5's rows, by family. Where one config has two such
# keys, T5's comes first: HunyuanImage has `text_embed_dim` for Qwen and `text_embed_2_dim` for T5,
# AudioLDM2 `text_encoder_dim` for CLAP and `text_encoder_1_dim` for T5.
_WIDTH_KEYS = (
    "joint_attention_dim",  # FLUX.1, SD3, Chroma, Bria, AuraFlow
    "caption_channels",  # PixArt, LTX, Allegro, Latte, HiDream (a list: T5's, then Llama's)
    "text_embed_2_dim",  # HunyuanImage, HunyuanVideo-1.5
    "text_embed_dim",  # CogVideoX, CogView3-Plus, Mochi, Cosmos, GLM-Image
    "text_dim",  # Wan, SkyReels, Helios
    "cross_attention_dim_t5",  # HunyuanDiT
    "encoder_hid_dim",  # DeepFloyd IF, Kandinsky 3
    "dit_text_dim",  # LongCat-Audio
    "text_encoder_1_dim",  # AudioLDM2
    "text_encoder_dim",  # StableAudio
)
_WIDTH_OWNERS = ("transformer", "transformer_2", "unet", "projection_model")


@dataclass(frozen=True)
class TextSlot:
    """Where a pipeline keeps its T5: the names of two components, such as `text_encoder_2`."""

    name: str

    @property
    def tokenizer_name(self) -> str:
        """The component that makes the slot's ids: `tokenizer_2` for `text_encoder_2`."""
        return self.name.replace("text_encoder", "tokenizer")


def find_text_slot(pipe: Any) -> TextSlot:
    """Find the T5 slot of a pipeline.

    Args:
        pipe: a `DiffusionPipeline` or a `ModularPipeline`; or a class of the former: then only the
            annotations of its `__init__` are read. T5, mT5, UMT5 and ByT5 encoders count as T5, and
            so does a student.

    Raises:
        NoT5SlotError: no component is a T5 or, where it is None, is declared as one. The message
            says which encoders the pipeline has.
        TypeError: `pipe` isn't a pipeline.
    """
    cls = pipe if isinstance(pipe, type) else type(pipe)
    if pipe is not cls and not (hasattr(pipe, "register_modules") or is_modular(pipe)):
        raise TypeError(f"expected a diffusers pipeline, or a class of them; got {pipe!r}.")
    encoders = {}
    for name, declared in component_types(pipe).items():
        if not _COMPONENT.fullmatch(name):
            continue
        module = None if pipe is cls else getattr(pipe, name, None)
        if _is_t5(module) or (module is None and _T5_CLASS.search(str(declared))):
            return TextSlot(name)
        if module is not None:
            encoders[name] = type(module).__name__
        else:
            encoders[name] = f"none, declared as {getattr(declared, '__name__', declared)}"
    listing = ", ".join(f"{name} ({what})" for name, what in encoders.items())
    raise NoT5SlotError(
        f"{cls.__name__} has no T5 text encoder. Its text encoders: {listing or 'none'}. t5slim "
        "replaces T5 encoders, as in FLUX.1, Stable Diffusion 3, PixArt, Chroma or LTX-Video. SDXL "
        "and FLUX.2, for example, read their prompts with other models."
    )


def component_types(pipe: Any) -> dict[str, Any]:
    """The types that a pipeline, or a class of them, declares its components with, by their names.

    Classes, unions of them, or strings where diffusers wrote a string.
    """
    if isinstance(pipe, type) or not is_modular(pipe):
        cls = pipe if isinstance(pipe, type) else type(pipe)
        return {name: p.annotation for name, p in inspect.signature(cls).parameters.items()}
    return {name: spec.type_hint for name, spec in pipe._component_specs.items()}


def denoiser_text_width(pipe: Any) -> int | None:
    """The width of the text rows that a pipeline's denoiser takes from its T5 slot.

    Read from the denoiser's config (or from the config of the learned projection that stands before
    it); for a denoiser whose config doesn't say, the width of the encoder in the slot.

    Returns:
        The number of channels, 4096 for FLUX.1; None if neither the denoiser nor the slot can tell.

    Raises:
        NoT5SlotError: the pipeline has no T5 slot.
    """
    slot = find_text_slot(pipe)
    for owner in _WIDTH_OWNERS:
        config = getattr(getattr(pipe, owner, None), "config", None)
        width = next((getattr(config, key) for key in _WIDTH_KEYS if hasattr(config, key)), None)
        if width is not None:
            return int(width[0] if isinstance(width, (list, tuple)) else width)
    config = getattr(getattr(pipe, slot.name, None), "config", None)
    return getattr(config, "project_out_dim", getattr(config, "d_model", None))


def fill_slot(pipe: Any, slot: TextSlot, module: nn.Module | None) -> None:
    """Put `module` in the slot, under the same offload as the module that was there.

    The module that leaves has no hooks of accelerate any more. Hooks of group offload stay on it,
    and are there when it comes back.
    """
    host = getattr(pipe, slot.name)
    hooks = _hooks(host, "group_offloading")
    if hooks and module is not None and not _hooks(module, "group_offloading"):
        _apply_group_offload(module, hooks[0].config)
    with offload_paused(pipe):
        if is_modular(pipe):
            if hasattr(pipe, "unload_components"):  # or its components manager would keep the host
                pipe.unload_components(slot.name)
            pipe.update_components(**{slot.name: module})
        else:
            # Not `setattr`: on a slot that was None it leaves [null, null] in model_index.json, and
            # `from_pretrained` would then lose the module that `save_pretrained` wrote.
            pipe.register_modules(**{slot.name: module})
    for stage in stages(pipe):
        if getattr(stage, slot.name, stage) is host:
            stage.register_modules(**{slot.name: module})


def slot_entry(pipe: Any, slot: TextSlot) -> tuple[Any, Any]:
    """What the pipeline's index, and the specs of a modular one, say of the module in the slot."""
    return pipe.config[slot.name], getattr(pipe, "_component_specs", {}).get(slot.name)


def restore_slot(
    pipe: Any, slot: TextSlot, host: nn.Module | None, entry: tuple[Any, Any] | None = None
) -> None:
    """Undo `fill_slot`: `host` returns, and the guest leaves without hooks.

    `entry` is what `slot_entry` said of `host`, which needn't be what it would say now: a module
    that was assigned to an empty slot has none in `model_index.json`.
    """
    guest = getattr(pipe, slot.name)
    fill_slot(pipe, slot, host)
    if entry is not None:
        index, spec = entry
        pipe.register_to_config(**{slot.name: index})
        if spec is not None:
            pipe._component_specs[slot.name] = spec
    for part in guest.modules():
        registry: Any = getattr(part, "_diffusers_hook", None)
        if registry is not None:
            for name in list(registry.hooks):
                if name != "layerwise_casting":  # the guest's own, and diffusers can't take it off
                    registry.remove_hook(name, recurse=False)
            if not registry.hooks:
                del part._diffusers_hook


def free_memory() -> None:
    """Give back the memory of a module that has left a slot, and that nothing refers to any more.

    The hooks of offload make cycles: T5-XXL would stay until some later collection.
    """
    clear_device_cache(garbage_collection=True)


def check_device_map(device_map: Any) -> None:
    """Refuse a pipeline that `device_map` spreads over devices: diffusers can't move its parts.

    Raises:
        PatchError: It is "balanced", or says of more than one component where it is.
    """
    if device_map == "balanced" or (isinstance(device_map, dict) and len(device_map) > 1):
        raise PatchError(
            f"device_map={device_map!r} spreads the pipeline over devices, and its T5 can't be "
            "replaced in that state. Load it without device_map, or call pipe.reset_device_map(); "
            "patch it; then use pipe.to(...) or pipe.enable_model_cpu_offload()."
        )


@contextmanager
def offload_paused(pipe: Any) -> Iterator[None]:
    """Take off the hooks of model or sequential CPU offload, and enable the same offload again.

    Without this, the module that leaves the pipeline lives on in `pipe._all_hooks`, and the one
    that comes has no hook and never reaches the accelerator.
    """
    if getattr(pipe, "_all_hooks", None):
        enable = pipe.enable_model_cpu_offload
    elif hasattr(pipe, "_offload_device") and any(
        hasattr(module, "_hf_hook") for module in pipe.components.values()
    ):
        enable = pipe.enable_sequential_cpu_offload
    else:
        yield
        return
    pipe.remove_all_hooks()
    try:
        yield
    finally:
        enable(device=pipe._offload_device)


def _hooks(module: nn.Module | None, name: str) -> list[Any]:
    """The hooks of diffusers with this name on a module and its parts."""
    parts = [] if module is None else module.modules()
    registries = [getattr(part, "_diffusers_hook", None) for part in parts]
    hooks = [registry.get_hook(name) for registry in registries if registry is not None]
    return [hook for hook in hooks if hook is not None]


def _apply_group_offload(module: nn.Module, config: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        module,
        onload_device=config.onload_device,
        offload_device=config.offload_device,
        offload_type=config.offload_type,
        num_blocks_per_group=config.num_blocks_per_group,
        non_blocking=config.non_blocking,
        use_stream=config.stream is not None,
        record_stream=config.record_stream,
        low_cpu_mem_usage=config.low_cpu_mem_usage,
        # Not to config.offload_to_disk_path: diffusers names files by layer and overwrites none, so
        # a second student would silently run with the weights of the first.
    )


def compute_dtype(module: Any) -> torch.dtype:
    """The dtype that a module computes in: layerwise casting may store its weights in float8."""
    hooks = _hooks(module, "layerwise_casting")
    return hooks[0].compute_dtype if hooks else module.dtype


def is_modular(pipe: Any) -> bool:
    """Whether this is one of diffusers' modular pipelines, or a class of them."""
    return hasattr(pipe, "update_components")


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile(module)` wraps; any other module is returned as it is."""
    return getattr(module, "_orig_mod", module)


def stages(pipe: Any) -> list[Any]:
    """The pipelines that a pipeline is made of, with its own components: VisualCloze has two."""
    return [value for value in vars(pipe).values() if hasattr(value, "register_modules")]


def _is_t5(module: object) -> bool:
    return getattr(getattr(module, "config", None), "model_type", None) in _T5_MODEL_TYPES
