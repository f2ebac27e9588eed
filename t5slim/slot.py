"""The T5 slot of a diffusers pipeline: finding it, and putting another module in it.

It is one of the components `text_encoder`, `text_encoder_2`, `text_encoder_3`: which, is read from
the module that is there or, where T5 was skipped, from what the pipeline declares. So this file
holds no table of pipelines, and doesn't import diffusers.
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .errors import NoT5SlotError, PatchError
from .hub import check_weights

_COMPONENT = re.compile(r"text_encoder(_\d+)?")
_T5_CLASS = re.compile(r"\b((UM|M)?T5EncoderModel|SlimT5Encoder)\b")
_T5_MODEL_TYPES = ("t5", "mt5", "umt5", "slim_t5")

# The denoiser's config key for the width of its T5 embeddings, by family. Of two keys, T5's comes
# first: HunyuanImage's `text_embed_dim` is Qwen's, and AudioLDM2's `text_encoder_dim` is CLAP's.
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


class TextSlot:
    """The component of a pipeline that holds its T5: found once, and carried.

    Args:
        pipe: A `DiffusionPipeline` or a `ModularPipeline`; or a class of the former, of which only
            the names are known. T5, mT5, UMT5 and ByT5 encoders count as T5, and so does what
            replaced one.

    Attributes:
        pipe: The pipeline, or the class.
        cls: The class.
        name: Of the component, such as `text_encoder_2`.
        tokenizer_name: Of the component that makes its ids, such as `tokenizer_2`.
        modular: Whether it is one of diffusers' modular pipelines.
        register: The pipeline's method that takes a new component.

    Raises:
        NoT5SlotError: No component is a T5 or, where it is None, is declared as one.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.cls = pipe if isinstance(pipe, type) else type(pipe)
        self.modular = hasattr(pipe, "update_components")
        self.register = "update_components" if self.modular else "register_modules"
        if not hasattr(pipe, self.register):
            raise NoT5SlotError(f"expected a diffusers pipeline; got {self.cls.__name__}.")
        for name, declared in self.component_types().items():
            if not _COMPONENT.fullmatch(name):
                continue
            module = getattr(pipe, name, None)
            config = getattr(module, "config", None)
            is_t5 = getattr(config, "model_type", None) in _T5_MODEL_TYPES or is_student(module)
            # Where a T5 is declared, any encoder may stand that says how wide its embeddings are.
            if _T5_CLASS.search(str(declared)):
                is_t5 = module is None or embedding_width(config) is not None
            if is_t5:
                self.name = name
                self.tokenizer_name = name.replace("text_encoder", "tokenizer")
                return
        raise NoT5SlotError(f"{self.cls.__name__} has no T5 text encoder, as FLUX.1 and SD3 have.")

    def __str__(self) -> str:
        return f"{self.name} of this {self.cls.__name__}"

    @property
    def encoder(self) -> Any:
        """The module in the slot, or None."""
        if self.pipe is self.cls:
            raise NoT5SlotError(f"expected a pipeline, got the class {self.cls.__name__}.")
        return getattr(self.pipe, self.name, None)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that makes the ids of the module in the slot, or None."""
        tokenizer, name = getattr(self.pipe, self.tokenizer_name, None), self.tokenizer_name
        if tokenizer is None and self.pipe is not self.cls:
            raise PatchError(
                f"{self} lacks its tokenizer. To load it: pipe.{self.register}({name}=transformers."
                f"AutoTokenizer.from_pretrained(<folder or Hub id>, subfolder={name!r}))."
            )
        return tokenizer

    @property
    def width(self) -> int | None:
        """Channels of the embeddings that the denoiser takes from the slot: 4096 for FLUX.1.

        By the config of the denoiser, or else of the encoder in the slot; None if neither says.
        """
        for owner in _WIDTH_OWNERS:
            config = getattr(getattr(self.pipe, owner, None), "config", None)
            for key in _WIDTH_KEYS:
                if (width := getattr(config, key, None)) is not None:
                    return int(width[0] if isinstance(width, (list, tuple)) else width)
        return embedding_width(getattr(getattr(self.pipe, self.name, None), "config", None))

    def component_types(self) -> dict[str, Any]:
        """The types that the pipeline declares its components with: classes, unions, or strings."""
        if hasattr(self.pipe, "_component_specs"):  # of a modular one
            return {name: spec.type_hint for name, spec in self.pipe._component_specs.items()}
        return {name: p.annotation for name, p in inspect.signature(self.cls).parameters.items()}

    def replace(self, module: nn.Module | None) -> nn.Module | None:
        """Put a module, or None, in the slot, under the same offload as the one that was there.

        The module that was there loses the hooks of accelerate; those of group offload stay, for
        its return.

        Args:
            module: The module to put in the slot.

        Returns:
            The module that was there, for `restore`.
        """
        old = self.encoder
        hooks = find_hooks(old, "group_offloading")
        with self.offload_paused(module):
            if hooks and module is not None and not find_hooks(module, "group_offloading"):
                from diffusers.hooks import apply_group_offloading

                # Not `offload_to_disk_path`: a second student would read the files of the first.
                same = ["onload_device", "offload_device", "offload_type", "num_blocks_per_group"]
                same += ["non_blocking", "record_stream", "low_cpu_mem_usage"]
                config = hooks[0].config
                group = {key: getattr(config, key) for key in same}
                apply_group_offloading(module, **group, use_stream=config.stream is not None)
            self._register(module)
        return old

    def _register(self, module: nn.Module | None) -> None:
        pipe, name, old = self.pipe, self.name, self.encoder
        if self.modular:  # a components manager would keep the original
            pipe.unload_components(name)
        # Not `setattr`: if the slot was None, model_index.json would go on to say [null, null].
        getattr(pipe, self.register)(**{name: module})
        for stage in stages(pipe):
            if getattr(stage, name, stage) is old:
                stage.register_modules(**{name: module})

    def restore(self, original: nn.Module | None) -> None:
        """Undo `replace`: `original` returns, and its replacement leaves without hooks."""
        replacement = self.replace(original)
        for registry in [] if replacement is original else hook_registries(replacement):
            for name in list(registry.hooks):
                if name != "layerwise_casting":  # its own, and diffusers can't take it off
                    registry.remove_hook(name, recurse=False)

    @contextmanager
    def offload_paused(self, incoming: nn.Module | None = None) -> Iterator[None]:
        """Take off the hooks of model or sequential CPU offload; enable the same offload again.

        Else the module that leaves lives on in `pipe._all_hooks`, and the one that comes has no
        hook and never reaches the accelerator.

        After an error or an interrupt, the pipeline and `incoming`, the new module, are as before.
        """
        pipe, original = self.pipe, self.encoder
        modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        enable: Any = None
        if getattr(pipe, "_all_hooks", None):
            enable = pipe.enable_model_cpu_offload
        elif hasattr(pipe, "_offload_device") and any(hasattr(m, "_hf_hook") for m in modules):
            enable = pipe.enable_sequential_cpu_offload
        if incoming is not None:
            modules.append(incoming)
            check_weights(incoming)
        # What a pipeline, a module or its hooks are, is in their attributes and in tensors.
        parts = {part for module in modules for part in module.modules()}
        hooks = [registry for module in modules for registry in hook_registries(module)]
        with ExitStack() as undo:  # from the last to the first
            for owner in (pipe, *stages(pipe), *parts, *hooks):
                own = owner.__dict__
                lists = {k: part.copy() for k, part in own.items() if type(part) in (dict, list)}
                undo.callback(own.update, own | lists)
                undo.callback(own.clear)
            for tensor in (tensor for part in parts for tensor in part.parameters(False)):
                undo.callback(setattr, tensor, "data", tensor.data)
            undo.callback(self._register, original)
            if enable:
                pipe.remove_all_hooks()
            yield
            if enable:
                enable(device=pipe._offload_device)
            undo.pop_all()


def is_student(module: object) -> bool:
    """Whether this is a student, or another encoder made for a T5 slot; also a compiled one."""
    config = getattr(uncompiled(module), "config", None)
    return getattr(config, "project_out_dim", None) is not None


def embedding_width(config: Any) -> int | None:
    """Channels of an encoder's output, by its config; None if that doesn't say."""
    return getattr(config, "project_out_dim", getattr(config, "d_model", None))


def check_device_map(device_map: Any) -> None:
    """Raise a PatchError for a pipeline that is spread: diffusers can't move its parts."""
    if device_map == "balanced" or (isinstance(device_map, dict) and len(device_map) > 1):
        raise PatchError(
            f"device_map={device_map!r} spreads the pipeline: load without, or reset_device_map()."
        )


def hook_registries(module: nn.Module | None) -> list[Any]:
    """Diffusers' registries of the hooks on a module and its parts."""
    parts: Any = [] if module is None else module.modules()
    return [part._diffusers_hook for part in parts if hasattr(part, "_diffusers_hook")]


def find_hooks(module: nn.Module | None, name: str) -> list[Any]:
    """The hooks of diffusers with this name on a module and its parts."""
    return [r.hooks[name] for r in hook_registries(module) if name in r.hooks]


def compute_dtype(module: Any) -> torch.dtype:
    """The dtype that a module computes in: layerwise casting may store its weights in float8."""
    hooks = find_hooks(module, "layerwise_casting")
    return hooks[0].compute_dtype if hooks else module.dtype


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile(module)` wraps; any other module is returned as it is."""
    return getattr(module, "_orig_mod", module)


def stages(pipe: Any) -> list[Any]:
    """The pipelines that a pipeline is made of, with its own components: VisualCloze has two."""
    return [value for value in vars(pipe).values() if hasattr(value, "register_modules")]
