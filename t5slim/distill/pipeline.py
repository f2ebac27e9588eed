"""The user's own pipeline, called with its T5 and its denoiser intercepted.

Of both, `forward` is replaced for the duration of one call, so that device, dtype, config and
offload hooks stay those of the modules that the pipeline knows.
"""

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ..errors import ConfigError, DistillError, T5SlimError
from ..slot import TextSlot, compute_dtype, hook_registries, stages, uncompiled

# What a pipeline may call for a prediction: Wan 2.2 has two experts, Kandinsky 3 a UNet.
DENOISERS = ("transformer", "transformer_2", "unet")
# Set by the library in every call. For several images of a prompt, repeat it with other seeds.
_RESERVED = "prompt|generator|latents|output_type|return_dict|.*prompt_embeds|.*_per_prompt"
_TEXT_ARGUMENT = re.compile(r"(.+_)?prompt(_\d)?")  # negative_prompt_2, prompt_3, content_prompt
_PASSING = (T5SlimError, torch.OutOfMemoryError, MemoryError)  # as they are, through a call
_WITHOUT_GRAD = torch.no_grad()(lambda: None).__code__  # every function that it decorates has it

Path = tuple[Any, ...]  # keys and indices that lead to a tensor, such as ("added_cond_kwargs", "x")
Encode = Callable[[Callable[..., Any], Tensor, Tensor | None], Tensor]
Denoise = Callable[[str, Callable[..., Any], dict[str, Any]], Any]


def denoisers(pipe: Any) -> dict[str, Any]:
    """The denoisers of a pipeline, by the name of their component."""
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def teacher_of(pipe: Any) -> Any:
    """The T5 in the pipeline's text slot; a DistillError without one, or if it is modular."""
    slot = TextSlot(pipe)
    if slot.modular:
        raise DistillError(
            f"{slot.cls.__name__} is a modular pipeline: build a FluxPipeline(vae=pipe.vae, ...)."
        )
    if slot.encoder is None:
        raise DistillError(f"{slot} is None: load it, or see t5slim.distill.cached_teacher.")
    return slot.encoder


def encoded_by(student: Callable[..., Any], pipe: Any) -> Encode:
    """`encode` for `run_pipeline`: the student in the place of the pipeline's teacher."""
    dtype = compute_dtype(teacher_of(pipe))
    return lambda _, ids, mask: call_encoder(student, ids, mask).to(dtype)


def run_pipeline(
    pipe: Any,
    prompts: Sequence[str],
    pipeline_kwargs: Mapping[str, Any],
    seed: int | Sequence[int],
    *,
    encode: Encode,
    denoise: Denoise = lambda _, forward, kwargs: forward(**kwargs),
    zero_pooled: bool = False,
    grad: bool = False,
    decode: bool = False,
) -> tuple[Image.Image, ...]:
    """Call `pipe` with `encode` in place of its T5 and `denoise` in place of its denoiser.

    Args:
        pipe: A pipeline with a T5 in its text slot.
        prompts: The batch, B prompts.
        pipeline_kwargs: Other arguments of its call.
        seed: Of all noise: one for the batch, or one for each prompt.
        encode: Called as `encode(forward, input_ids, attention_mask)`, with T5's own `forward`, ids
            (B, S) and mask (B, S) or None; returns the embeddings, (B, S, D).
        denoise: Called as `denoise(name, forward, kwargs)`, with the name of the component and all
            arguments by name; returns what `forward(**kwargs)` would.
        zero_pooled: Call the denoiser with zeros for CLIP's `pooled_projections`.
        grad: Keep the autograd graph.
        decode: Decode the images.

    Returns:
        The images, if decoded; none of video and sound. The pipeline is as it was, also after an
        error.
    """
    encoder = teacher_of(pipe)
    kwargs = check_pipeline_kwargs(pipe, pipeline_kwargs)
    if not denoisers(pipe):
        raise DistillError(
            f"{type(pipe).__name__} has no denoiser ({', '.join(DENOISERS)}) to learn from: distil "
            "with the pipeline that reads its output, and patch both."
        )
    # One prompt is a string, as Wan-VACE takes no list, but for VisualCloze (`task_prompt`), which
    # would take its list of grids for one grid. By name: some pipelines take an image first.
    names = list(inspect.signature(type(pipe).__call__).parameters)
    one = len(prompts) == 1 and "task_prompt" not in names
    for name, value in pipeline_kwargs.items():
        if _TEXT_ARGUMENT.fullmatch(name) and isinstance(value, str) and not one:
            kwargs[name] = [value] * len(prompts)
    kwargs["prompt" if "prompt" in names else names[1]] = prompts[0] if one else list(prompts)

    def encoder_forward(
        forward: Any, input_ids: Tensor, attention_mask: Any = None, **others: Any
    ) -> BaseModelOutput:
        if others.get("output_hidden_states"):
            raise DistillError(
                f"{type(pipe).__name__} reads T5's hidden states and not only its output: no "
                "student can be distilled for it."
            )
        return BaseModelOutput(last_hidden_state=encode(forward, input_ids, attention_mask))

    def denoiser_forward(name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        # The class's forward: an instance's may be wrapped, by offload hooks or by us.
        cls = type(uncompiled(getattr(pipe, name)))
        _, *names = inspect.signature(cls.forward).parameters
        kwargs |= zip(names, args, strict=False)
        if zero_pooled and kwargs.get("pooled_projections") is not None:
            kwargs["pooled_projections"] = torch.zeros_like(kwargs["pooled_projections"])
        return denoise(name, forward, kwargs)

    # From under its `torch.no_grad` decorator.
    call = partial(inspect.unwrap(type(pipe).__call__), pipe) if grad else pipe
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # whose tensors have no `_version`
        stack.enter_context(torch.set_grad_enabled(grad))
        if grad and hasattr(pipe, "encode_prompt") and "encode_prompt" not in vars(pipe):
            # DeepFloyd IF and Kandinsky 3 decorate this, too.
            vars(pipe)["encode_prompt"] = partial(inspect.unwrap(type(pipe).encode_prompt), pipe)
            stack.callback(vars(pipe).pop, "encode_prompt")
        # No progress bar, nor the warning of truncated prompts in every batch.
        stack.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity_error()
        for part in (pipe, *stages(pipe)):
            before = getattr(part, "_progress_bar_config", {})
            stack.callback(part.set_progress_bar_config, **before)
            part.set_progress_bar_config(disable=True)
        stack.enter_context(intercept(encoder, encoder_forward))
        for name, module in denoisers(pipe).items():
            if attention := getattr(module, "attn_processors", None):
                # Perturbed-attention guidance sets others, and leaves them if it is interrupted.
                stack.callback(module.set_attn_processor, dict(attention))
            stack.enter_context(intercept(module, partial(denoiser_forward, name)))
        # Some draw beside their generator: ControlNets of SD3 and HunyuanDiT encode images so.
        device = pipe._execution_device
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        try:
            seeds = [seed] if isinstance(seed, int) else seed
            generators = [torch.Generator().manual_seed(s) for s in seeds]
            generator = generators[0] if len(generators) == 1 else generators
            torch.manual_seed(seeds[0])
            output = call(generator=generator, output_type="pil" if decode else "latent", **kwargs)
            return tuple(getattr(output, "images", None) or ()) if decode else ()
        except BaseException as error:
            pipe.maybe_free_model_hooks()  # as the end of the call, which wasn't reached, does
            if not isinstance(error, Exception) or isinstance(error, _PASSING):
                raise
            raise DistillError(
                f"{type(pipe).__name__} failed on a batch of {len(prompts)}, with pipeline_kwargs "
                f"{[*pipeline_kwargs]}: {type(error).__name__}: {error}\nIf images are among "
                "them: pass one for each prompt, as a list, and their number as batch_size."
            ) from error


def tokenize(
    pipe: Any, prompts: Sequence[str], pipeline_kwargs: Mapping[str, Any]
) -> list[tuple[Tensor, Tensor | None]]:
    """Tokenize prompts by the pipeline's own call, which is left at its first denoiser call.

    Returns:
        Ids (B, S) int64 and mask (B, S), or None, of each call of T5 until then: of the prompts,
        then of the negative prompts. Some pipelines encode each prompt alone, with B = 1.
    """

    class Reached(BaseException):  # no failure of the pipeline
        pass

    calls: list[tuple[Tensor, Tensor | None]] = []
    dtype, width = teacher_of(pipe).dtype, TextSlot(pipe).width
    assert width is not None  # the encoder's own, if the denoiser doesn't say

    def encode(_: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        calls.append((input_ids, attention_mask))
        return torch.zeros(*input_ids.shape, width, dtype=dtype, device=input_ids.device)

    def denoise(*_: Any) -> Any:
        raise Reached

    with suppress(Reached), ExitStack() as stack:
        types = {} if denoisers(pipe) else type(pipe)._get_signature_types()
        if names := [name for name in DENOISERS if name in types]:
            # Pipelines ask it for the size of the latents, on which the text doesn't depend.
            cls, *_ = types[names[0]]
            stack.callback(vars(pipe).update, {names[0]: None})
            # Not the pipeline's own `__setattr__`, which would note it in model_index.json.
            with torch.device("meta"):
                vars(pipe)[names[0]] = cls()
        run_pipeline(pipe, prompts, pipeline_kwargs, 0, encode=encode, denoise=denoise)
    return calls


def check_pipeline_kwargs(pipe: Any, pipeline_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Refuse names that a pipeline, or class of them, doesn't take, or that the library sets."""
    cls = pipe if isinstance(pipe, type) else type(pipe)
    if not isinstance(pipeline_kwargs, Mapping | None):
        raise DistillError(f"pipeline_kwargs is {pipeline_kwargs!r:.80}; expected a mapping.")
    _, *parameters = inspect.signature(cls.__call__).parameters.values()
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    free = [p.name for p in parameters if not re.fullmatch(_RESERVED, p.name)]
    kwargs = dict(pipeline_kwargs or {})
    for name in kwargs:
        if re.fullmatch(_RESERVED, str(name)) or not (name in free or open_ended):
            raise DistillError(
                f"pipeline_kwargs may not hold {name!r}; expected, of {cls.__name__}: "
                f"{', '.join(free)}. Prompts, noise and output are set by distillation itself: "
                "for several images of a prompt, take more seeds."
            )
    return kwargs


def batches_of(prompts: Sequence[str], batch_size: int) -> list[list[str]]:
    """Cut prompts into batches, of which the last may be smaller."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; expected a positive integer.")
    return [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]


def check_no_cache(pipe: Any) -> None:
    """Refuse a denoiser that carries something over from one of its calls to the next."""
    # All caches of diffusers are stateful hooks, whichever function put them there.
    for name, denoiser in denoisers(pipe).items():
        hooks = {k: hook for r in hook_registries(denoiser) for k, hook in r.hooks.items()}
        if stateful := sorted(key for key, hook in hooks.items() if hook._is_stateful):
            raise DistillError(
                f"The {name} of this {type(pipe).__name__} has a cache ({', '.join(stateful)}): it "
                f"repeats parts of earlier predictions. Call pipe.{name}.disable_cache() first."
            )


@contextmanager
def intercept(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let `function(forward, *args, **kwargs)` stand for the module's `forward`.

    On the instance, where accelerate's offload hooks put theirs too: `forward` is the hooked one.
    """
    # After `module.compile()`, torch.compile would look into `function`, and compile that.
    name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
    before = module.__dict__.get(name)
    setattr(module, name, partial(function, getattr(module, name)))
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)


@contextmanager
def autocast_denoisers(pipe: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """Run the denoisers, and nothing else, under autocast to `dtype`, if that isn't None.

    Their output is cast back to their own dtype, or schedulers would pass it on to x_t.
    """

    def forward(denoiser: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(denoiser.device.type, dtype):
            output = original(*args, **kwargs)
        return with_first_tensor(output, first_tensor(output).to(denoiser.dtype))

    with ExitStack() as stack:
        for denoiser in denoisers(pipe).values() if dtype is not None else ():
            stack.enter_context(intercept(denoiser, partial(forward, denoiser)))
        yield


@contextmanager
def frozen(pipe: Any, gradient_checkpointing: bool) -> Iterator[None]:
    """Disable gradients and dropout of all components; afterwards they are as before."""
    with ExitStack() as stack:
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                stack.enter_context(evaluating(module))
                for parameter in module.parameters():
                    stack.callback(parameter.requires_grad_, parameter.requires_grad)
                    parameter.requires_grad_(False)
        for denoiser in denoisers(pipe).values():
            for part in denoiser.modules():
                # In eval mode, HiDream's experts predict under `torch.no_grad`, without gradients.
                methods = vars(type(part)).values()
                part.training = any(getattr(m, "__code__", None) is _WITHOUT_GRAD for m in methods)
            if gradient_checkpointing and not denoiser.is_gradient_checkpointing:
                denoiser.enable_gradient_checkpointing()
                stack.callback(denoiser.disable_gradient_checkpointing)
        yield


@contextmanager
def evaluating(student: nn.Module) -> Iterator[None]:
    """The student in eval mode; afterwards in the mode that it was in."""
    modes = [(part, part.training) for part in student.modules()]
    student.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def call_encoder(forward: Callable[..., Any], ids: Tensor, mask: Tensor | None) -> Tensor:
    """The last hidden state of T5 or a student, (B, S, D)."""
    return forward(ids)[0] if mask is None else forward(ids, attention_mask=mask)[0]


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a denoiser returned: a tensor, a tuple, or diffusers' output class."""
    return output if isinstance(output, Tensor) else output[0]


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """`output` with another prediction in it."""
    if isinstance(output, Tensor):
        return tensor
    return (tensor, *output[1:]) if isinstance(output, tuple) else type(output)(tensor)


def map_tensors(tree: Any, function: Callable[[Path, Tensor], Any], path: Path = ()) -> Any:
    """Copy nested dicts, lists and tuples, each tensor in them as `function(path, tensor)`."""
    if isinstance(tree, Tensor):
        return function(path, tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function, (*path, key)) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map_tensors(value, function, (*path, i)) for i, value in enumerate(tree))
    return tree


def tensors_in(tree: Any) -> dict[Path, Tensor]:
    """Every tensor in nested dicts, lists and tuples, by its path."""
    found: dict[Path, Tensor] = {}
    map_tensors(tree, found.__setitem__)
    return found


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's content, in hex."""
    content = tensor.detach().cpu().resolve_conj().resolve_neg().flatten().contiguous()
    return hashlib.sha256(content.view(torch.uint8).numpy().tobytes()).hexdigest()
