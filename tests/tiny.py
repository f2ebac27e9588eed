"""Tiny real pipelines: the classes of diffusers and transformers, random weights, no download.

`tiny(cls)` makes any of them, on the CPU in float32 and eval mode, with about a hundred thousand
parameters; `call_kwargs(pipe)` gives what a fast call of it needs. Nothing here imitates a class
that a user would have: only the sizes are small (`sizes.py`).
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from sizes import COMMON, MAX_TOKENS, SIZES, TEXT_WIDTH
from transformers import CLIPTextModel, PreTrainedModel, T5EncoderModel, T5TokenizerFast

PROMPTS = [
    "a red circle",
    "two small blue squares on the left of a star",
    "a sign that says hi",
    "the large green star above a red square",
    "blue",
    "a small circle right of the large sign",
]


def component(cls: type, **changes: Any) -> Any:
    """A component of tiny size, with changes of its sizes.

    For an abstract class, what stands for it: a tokenizer of T5, a DDIM scheduler.
    """
    name = cls.__name__.removesuffix("Pil").removesuffix("Fast").removesuffix("WithProjection")
    if name == "KarrasDiffusionSchedulers":
        return diffusers.DDIMScheduler()
    if "Token" in name and name not in SIZES:
        cls, name = T5TokenizerFast, "T5Tokenizer"
    sizes = SIZES.get(name, {}) | changes
    if issubclass(cls, PreTrainedModel):
        module = cls(cls.config_class(**sizes))
        return _audible(module) if "T5Encoder" in name else module
    if issubclass(cls, ConfigMixin):
        takes = inspect.signature(cls.__init__).parameters
        common = {name: value for name, value in COMMON.items() if name in takes}
        with warnings.catch_warnings():  # autoencoders of sound still use torch's old weight_norm
            warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
            return cls.from_config(common | sizes)
    return cls(**sizes)


def _audible(encoder: torch.nn.Module) -> torch.nn.Module:
    """T5's own initialisation leaves attention and feed-forward almost silent."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "layer_norm" not in name:
                parameter.normal_(0, 1.0 if "shared" in name else 0.3)
    return encoder


def t5_encoder(width: int = TEXT_WIDTH) -> Any:
    return component(T5EncoderModel, d_model=width)


clip_encoder = partial(component, CLIPTextModel)


def tiny(cls: type[DiffusionPipeline], seed: int = 0, **given: Any) -> Any:
    """A pipeline of tiny components, of the classes that its `__init__` is annotated with.

    In eval mode, as from_pretrained leaves it, and without a progress bar in the tests' output.
    For a component, `given` has changes of its sizes, or another class; everything else goes to
    `cls` as it is. An argument that has a default is left out unless it is given, or is about text
    or the denoiser; and so are safety checkers.
    """
    torch.manual_seed(seed)
    given = {"safety_checker": None, "watermarker": None} | given
    _, *parameters = inspect.signature(cls.__init__, eval_str=True).parameters.values()
    arguments = {}
    # The denoiser last, whatever the order: so its class decides over no other weights.
    for parameter in sorted(parameters, key=lambda one: one.name == "transformer"):
        change = given.get(parameter.name, {})
        if isinstance(change, type):
            arguments[parameter.name] = component(change)
        elif not isinstance(change, Mapping):
            arguments[parameter.name] = change
        elif (
            parameter.default is parameter.empty
            or parameter.name in {"transformer", *given}
            or parameter.name.startswith(("text_encoder", "tokenizer"))
        ):
            first, *_ = get_args(parameter.annotation) or [parameter.annotation]
            arguments[parameter.name] = component(first, **change)
    pipe = cls(**arguments)
    # Zero-initialised layers (adaLN gates, output projections) would make a fresh denoiser ignore
    # its text, and a test of anything that reaches it through the text would pass whatever came.
    for name, module in pipe.components.items():
        if isinstance(module, diffusers.ModelMixin) and name != "vae":
            with torch.no_grad():
                for parameter in module.parameters():
                    if not parameter.any():
                        parameter.normal_(0, 0.1)
        if isinstance(module, torch.nn.Module):
            module.eval()
    for part in (pipe, *vars(pipe).values()):  # VisualCloze is made of two pipelines
        if isinstance(part, DiffusionPipeline):
            part.set_progress_bar_config(disable=True)
    return pipe


tiny_flux = partial(tiny, diffusers.FluxPipeline)
tiny_sd3 = partial(tiny, diffusers.StableDiffusion3Pipeline)
tiny_chroma = partial(tiny, diffusers.ChromaPipeline)
tiny_pixart_sigma = partial(tiny, diffusers.PixArtSigmaPipeline)
tiny_ltx = partial(tiny, diffusers.LTXPipeline)

TINY_PIPELINES: dict[str, Callable[..., Any]] = {
    "flux": tiny_flux,
    "sd3": tiny_sd3,  # classifier-free guidance
    "chroma": tiny_chroma,
    "pixart_sigma": tiny_pixart_sigma,
    "ltx": tiny_ltx,
    # Its `projection_model` is a learned layer behind T5: no embedding reaches its denoiser.
    "stable_audio": partial(tiny, diffusers.StableAudioPipeline),
}

_CALL: dict[str, Any] = {
    "height": 16, "width": 16, "num_frames": 5, "max_sequence_length": MAX_TOKENS,
    "guidance_scale": 4.0, "use_resolution_binning": False, "clean_caption": False,
    "num_inference_steps": 3,
}  # fmt: skip
_FAMILIES: dict[str, dict[str, Any]] = {
    "LTX": {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 3.0},
    "StableAudio": {"guidance_scale": 3.0},
}


def call_kwargs(
    pipe: DiffusionPipeline | type[DiffusionPipeline], steps: int = 3
) -> dict[str, Any]:
    """Arguments of a small fast call of `pipe`, beside prompt, generator and output_type."""
    cls = pipe if isinstance(pipe, type) else type(pipe)
    takes = inspect.signature(cls.__call__).parameters
    call = _CALL | {"num_inference_steps": steps}
    for family, changes in _FAMILIES.items():
        if cls.__name__.startswith(family):
            call |= changes
    if "true_cfg_scale" in takes:  # a FLUX: the scale is embedded, at the default of its class
        del call["guidance_scale"]
    return {name: value for name, value in call.items() if name in takes}


def tiny_student(
    pipe: DiffusionPipeline, seed: int = 1, *, d_model: int = 16, num_layers: int = 1, **config: Any
) -> Any:
    """A student (`SlimT5Encoder`) with the vocabulary and output width that `pipe` needs."""
    from t5slim import SlimT5Config, SlimT5Encoder
    from t5slim.slot import TextSlot

    slot = TextSlot(pipe).encoder
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": slot.config.vocab_size, "d_model": d_model, "d_kv": 8, "d_ff": 2 * d_model,
        "num_layers": num_layers, "num_heads": 2, "relative_attention_num_buckets": 8,
        "feed_forward_proj": "gated-gelu", "project_in_dim": d_model,
        "project_out_dim": slot.config.d_model,
    }  # fmt: skip
    return SlimT5Encoder(SlimT5Config(**shape | config)).eval()
