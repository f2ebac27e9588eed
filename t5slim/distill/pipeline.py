"""Run the user's own pipeline with something else in place of its T5 and of its denoiser.

Both are overheard by the same means: their `forward` is replaced for the length of one call. So
device, dtype, config and offload hooks stay those of the module that the pipeline knows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, get_args, get_type_hints

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import DistillError
from ..slot import find_text_slot, is_modular, stages, uncompiled
from .calls import by_name, intercept

# What a pipeline may call for a prediction: Wan 2.2 has two experts, Kandinsky 3 a UNet.
DENOISERS = ("transformer", "transformer_2", "unet")
# Set by the library for every walk.
RESERVED_KWARGS = ("prompt", "generator", "latents", "output_type", "return_dict")
_TEXT_ARGUMENT = re.compile(r"(.+_)?prompt(_\d)?")  # negative_prompt_2, prompt_3, content_prompt
_IMAGES_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")

Encode = Callable[[Callable[..., Any], Tensor, Tensor | None], Tensor]
Denoise = Callable[[str, Callable[..., Any], dict[str, Any]], Any]


def tokenize(
    pipe: Any,
    prompts: Sequence[str],
    pipeline_kwargs: Mapping[str, Any],
    encode: Encode,
) -> None:
    """Run `pipe` up to its first denoiser call: `encode` sees the prompts as it tokenizes them.

    The denoiser needn't be loaded (see `_any_denoiser`).
    """

    class Reached(Exception):
        pass

    def stop(*_: Any) -> Any:
        raise Reached

    with suppress(Reached), _any_denoiser(pipe):
        run_pipeline(pipe, prompts, pipeline_kwargs, 0, encode=encode, denoise=stop)
    pipe.maybe_free_model_hooks()  # the end of the pipeline's call, which was not reached


@contextmanager
def _any_denoiser(pipe: Any) -> Iterator[None]:
    """For a pipeline that was loaded without its denoiser, one without weights.

    Pipelines ask it for the size of the latents, which the text doesn't depend on: so it has the
    settings that its class has by default.
    """
    hints = get_type_hints(type(pipe).__init__)
    name = next((name for name in DENOISERS if name in hints), None)
    if name is None or any(getattr(pipe, denoiser, None) is not None for denoiser in DENOISERS):
        yield
        return
    hint = hints[name]
    (cls,) = (c for c in get_args(hint) or (hint,) if c is not type(None))
    try:
        with torch.device("meta"):
            denoiser = cls()
    except Exception as error:
        raise DistillError(
            f"{type(pipe).__name__}.{name} is None, and {cls.__name__} has no settings of its own "
            f"that could stand for it: load the pipeline with its {name}."
        ) from error
    # Not the pipeline's own `__setattr__`, which would note it in model_index.json.
    object.__setattr__(pipe, name, denoiser)
    try:
        yield
    finally:
        object.__setattr__(pipe, name, None)


def run_pipeline(
    pipe: Any,
    prompts: Sequence[str],
    pipeline_kwargs: Mapping[str, Any],
    seed: int | Sequence[int],
    *,
    encode: Encode,
    denoise: Denoise,
    zero_pooled: bool = False,
    grad: bool = False,
    output_type: str = "latent",
) -> Any:
    """Call `pipe` with `encode` in place of its T5 and `denoise` in place of its denoiser.

    Args:
        pipe: this and the following as for `capture`.
        prompts: the batch.
        pipeline_kwargs: how to call it.
        seed: of its generator, or of the generators of its prompts.
        encode: `encode(forward, input_ids, attention_mask)` returns T5's rows, (B, S, D).
        denoise: `denoise(name, forward, kwargs)` returns what the denoiser would.
        zero_pooled: `denoise` sees zeros for `pooled_projections`.
        grad: keep the autograd graph from T5's rows to the denoiser's arguments, for which the
            pipeline's call is taken from under its `torch.no_grad`.
        output_type: "latent" decodes nothing; "pil" does.

    Returns:
        What the pipeline returns.
    """
    encoder = teacher_of(pipe)
    check_pipeline_kwargs(pipe, pipeline_kwargs)
    if not any(isinstance(getattr(pipe, name, None), nn.Module) for name in DENOISERS):
        raise DistillError(
            f"{type(pipe).__name__} has no denoiser ({', '.join(DENOISERS)}) to learn from: distil "
            "with the pipeline that takes its output, and patch both."
        )
    # Some pipelines take a string for the whole batch and some only a list: all take the list. And
    # some (Wan-VACE) take no batch, nor a list of one: all take a string.
    one = len(prompts) == 1
    kwargs: dict[str, Any] = {
        name: [value] * len(prompts)
        if _TEXT_ARGUMENT.fullmatch(name) and isinstance(value, str) and not one
        else value
        for name, value in pipeline_kwargs.items()
    }
    # By name: Kontext and many for video take an image first. VisualCloze's is `task_prompt`.
    names = list(inspect.signature(type(pipe).__call__).parameters)
    kwargs["prompt" if "prompt" in names else names[1]] = prompts[0] if one else list(prompts)

    def encoder_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        arguments = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        if arguments.get("output_hidden_states"):
            raise DistillError(
                f"{type(pipe).__name__} reads T5's hidden states and not only its output: no "
                "student can be distilled for it."
            )
        rows = encode(forward, arguments["input_ids"], arguments.get("attention_mask"))
        return BaseModelOutput(last_hidden_state=rows)

    def denoiser_forward(name: str, module: nn.Module) -> Callable[..., Any]:
        # The class's forward: an instance's may be wrapped, by offload hooks or by us.
        cls: Any = type(uncompiled(module))
        signature = inspect.signature(cls.forward)

        def named_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            arguments = by_name(signature, args, kwargs)
            if zero_pooled and arguments.get("pooled_projections") is not None:
                arguments["pooled_projections"] = torch.zeros_like(arguments["pooled_projections"])
            return denoise(name, forward, arguments)

        return named_forward

    call = partial(undecorated_call(pipe), pipe) if grad else pipe
    with ExitStack() as stack:
        stack.enter_context(_quiet(pipe))
        stack.enter_context(intercept(encoder, encoder_forward))
        for name in DENOISERS:
            module = getattr(pipe, name, None)
            if isinstance(module, nn.Module):
                stack.enter_context(_same_attention(module))
                stack.enter_context(intercept(module, denoiser_forward(name, module)))
        seeds = [seed] if isinstance(seed, int) else seed
        images = range(images_per_prompt(pipeline_kwargs) if seeds is seed else 1)
        generators = [torch.Generator().manual_seed(s + i) for s in seeds for i in images]
        generator = generators[0] if len(generators) == 1 else generators
        # Some draw beside their generator: ControlNets of SD3 and HunyuanDiT encode pictures so.
        device = pipe._execution_device
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(seeds[0])
        return call(generator=generator, output_type=output_type, **kwargs)


def images_of(output: Any) -> tuple[Image.Image, ...]:
    """The pictures in what a pipeline returned; none, of video and sound."""
    return tuple(getattr(output, "images", None) or ())


def teacher_of(pipe: Any) -> nn.Module:
    """The T5 in the pipeline's slot.

    Raises:
        NoT5SlotError: there is no slot.
        DistillError: there is nothing in it, or the pipeline is a modular one.
    """
    if is_modular(pipe):
        raise DistillError(
            f"{type(pipe).__name__} is a modular pipeline, of which any block may be left out or "
            "called alone. Make a whole one of its components, as "
            "FluxPipeline(vae=pipe.vae, transformer=pipe.transformer, ...), and distil from that."
        )
    slot = find_text_slot(pipe)
    encoder = getattr(pipe, slot.name)
    if encoder is None:
        raise DistillError(
            f"{type(pipe).__name__}.{slot.name} is None: there is no teacher to learn from. Load "
            "the pipeline with its T5; or, where its rows were cached, work within "
            "`with t5slim.distill.cached_teacher(pipe, folder):`."
        )
    return encoder


def check_no_cache(pipe: Any) -> None:
    """Refuse a denoiser that carries something over from one of its calls to the next.

    All caches of diffusers are stateful hooks, whichever function put them there.
    """
    for name in DENOISERS:
        denoiser = getattr(pipe, name, None)
        registries = [
            registry
            for part in (denoiser.modules() if isinstance(denoiser, nn.Module) else ())
            if (registry := getattr(part, "_diffusers_hook", None)) is not None
        ]
        stateful = {key for r in registries for key, hook in r.hooks.items() if hook._is_stateful}
        if stateful:
            config = getattr(denoiser, "_cache_config", None)
            what = ", ".join(sorted(stateful)) if config is None else type(config).__name__
            raise DistillError(
                f"The {name} of this {type(pipe).__name__} has a cache ({what}): it repeats "
                "parts of its earlier answers, which would be learned as if they were computed. "
                f"Call pipe.{name}.disable_cache() first, and enable the cache again afterwards."
            )


def check_pipeline_kwargs(pipe: Any, pipeline_kwargs: Mapping[str, Any]) -> None:
    """Refuse names that a pipeline, or class of them, doesn't take, or that the library sets."""
    cls = pipe if isinstance(pipe, type) else type(pipe)
    parameters = inspect.signature(cls.__call__).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in pipeline_kwargs:
        if name in RESERVED_KWARGS or name.endswith("prompt_embeds"):
            raise DistillError(
                f"pipeline_kwargs may not hold {name!r}: distillation passes the prompts and sets "
                f"{', '.join(RESERVED_KWARGS[1:])} itself."
            )
        if name not in parameters and not open_ended:
            raise DistillError(
                f"pipeline_kwargs holds {name!r}, which {cls.__name__} doesn't take. It "
                f"takes {', '.join(p for p in parameters if p != 'self')}."
            )


def images_per_prompt(pipeline_kwargs: Mapping[str, Any]) -> int:
    """How many rows of a batch stand beside each other for one prompt."""
    return max(int(pipeline_kwargs.get(name) or 1) for name in _IMAGES_PER_PROMPT)


def undecorated_call(pipe: Any) -> Callable[..., Any]:
    """The pipeline's `__call__` from under its `torch.no_grad` decorator."""
    call = getattr(type(pipe).__call__, "__wrapped__", None)
    if call is None:
        raise DistillError(
            f"{type(pipe).__name__}.__call__ isn't decorated with torch.no_grad, as the pipelines "
            "of diffusers are: gradients can't be led through it."
        )
    return call


@contextmanager
def _same_attention(denoiser: Any) -> Iterator[None]:
    """Perturbed-attention guidance sets other processors, and leaves them if it is interrupted."""
    before = dict(getattr(denoiser, "attn_processors", {}))
    try:
        yield
    finally:
        if getattr(denoiser, "attn_processors", {}) != before:
            denoiser.set_attn_processor(before)


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """No progress bar of the pipeline's, and no warning of truncated prompts with every batch."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    bars = {part: part.__dict__.get("_progress_bar_config") for part in (pipe, *stages(pipe))}
    logging.set_verbosity_error()
    for part in bars:
        part.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        for part, bar in bars.items():
            if bar is None:
                del part._progress_bar_config
            else:
                part._progress_bar_config = bar
