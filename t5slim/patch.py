"""Put a student in the place of a pipeline's T5, and take it out again."""

import logging
import os
import sys
import weakref
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]
from torch import nn

from . import hub
from .encoder import SlimT5Config, SlimT5Encoder
from .errors import CheckpointError, IncompatibleStudentError, NoT5SlotError, PatchError
from .slot import TextSlot, check_device_map, compute_dtype, embedding_width, find_hooks, is_student

Student = nn.Module | str | os.PathLike[str]

# By Wang et al.: from T5-base, the default for FLUX.1, and from T5-small; with their parameters.
_PUBLISHED = {"LifuWang/DistillT5": "130 M", "LifuWang/DistillT5-Small": "54 M"}
# Pipelines that take `config.d_model` for the width of T5's output, or add its layers' to that.
_ONE_WIDTH = ("HunyuanImage", "HunyuanVideo15", "LongCatAudio")


class _Students(list[dict[str, str]]):
    def __repr__(self) -> str:
        line: Any = "{:<26}{:<12}{:<13}{:<13}{}".format
        return "\n".join([line(*self[0]), *(line(*student.values()) for student in self)])


def students() -> list[dict[str, str]]:
    """The students that are published on the Hub, the default of `patch_pipeline` first.

    Nothing is downloaded. The list, a dict for each, prints as a table.
    """
    facts = {"pipeline": "FLUX.1-dev", "licence": "none stated", "measured in": "arXiv 2503.19897"}
    return _Students({"student": name, "parameters": n} | facts for name, n in _PUBLISHED.items())


@torch.inference_mode(False)  # no training takes a tensor that was made in it
def patch_pipeline(
    pipe: Any,
    source: Student | None = None,
    *,
    student: Student | None = None,
    keep_teacher: bool = False,
    **kwargs: Any,
) -> Any:
    """Replace the T5 of a diffusers pipeline by a student.

    With a pipeline, the T5 in it is replaced, wherever it is: on a device, or under model,
    sequential or group offload. With a class of pipelines, the pipeline is loaded without its T5,
    which is neither downloaded nor read::

        pipe = t5slim.patch_pipeline(pipe, "my-student", keep_teacher=True)
        pipe = t5slim.patch_pipeline(FluxPipeline, "owner/flux", dtype=torch.bfloat16)

    A process that loads what `pipe.save_pretrained` wrote has to `import t5slim` before
    `DiffusionPipeline.from_pretrained(folder)`. From the Hub, diffusers takes no class of a third
    library: use `t5slim.patch_pipeline(DiffusionPipeline, "owner/name")`.

    Args:
        pipe: A pipeline, also a modular one whose components are loaded (T5 needn't be). Or a
            class, also `DiffusionPipeline` or `AutoPipelineForText2Image`, but no modular one.
        source: With a pipeline, the student. With a class, the folder or Hub id of the pipeline.
        student: A `SlimT5Encoder`, or the folder or Hub id of one; or any encoder that is called as
            a T5 is, and whose config says `vocab_size` and `project_out_dim`. It isn't copied, and
            may be compiled. The default is the student published for FLUX.1; or, with a class and a
            pipeline that was saved patched, its own.
        keep_teacher: Keep the T5 in memory, where it is, for `unpatch_pipeline`. Otherwise it is
            freed, unless something else refers to it, such as another pipeline that shares it.
        **kwargs: With a class, what its `from_pretrained` takes. `cache_dir`, `force_download`,
            `local_files_only` and `token` hold for the student as well.

    Returns:
        The same pipeline, or the one that was loaded. The student is in evaluation mode, and has
        the device and dtype of the T5 that it replaces; with a class, those of the pipeline. After
        an error, the pipeline is as it was.

    Raises:
        NoT5SlotError: The pipeline has no T5, as FLUX.2 and SDXL.
        IncompatibleStudentError: The student has another vocabulary or width than the pipeline, or
            is no such encoder; or none is published for this pipeline.
        PatchError: There is a student in the pipeline; or `device_map` spreads the pipeline.
        ConfigError, CheckpointError, HubAccessError: As in `SlimT5Encoder.from_pretrained`.
    """
    if not isinstance(pipe, type):
        if not kwargs and (source is None or student is None):
            slot = TextSlot(pipe)
            keep = keep_teacher or slot.encoder is None
            return _patch(slot, source if student is None else student, keep)
    elif isinstance(source, (str, os.PathLike)) and not keep_teacher:
        return _load_patched(pipe, hub.local_path(source), student, kwargs)
    raise TypeError("expected patch_pipeline(pipe, student) or (cls, folder_or_hub_id, ...).")


@torch.inference_mode(False)
def unpatch_pipeline(pipe: Any, teacher: nn.Module | None = None) -> Any:
    """Undo `patch_pipeline`: put the T5 back, on the device and in the dtype of the pipeline.

    With the T5 that was in it, its images are bitwise the old ones.

    Args:
        pipe: A patched pipeline, which is returned.
        teacher: The T5 to put back, where it wasn't kept with `keep_teacher=True`.

    Raises:
        PatchError: There is no student in the pipeline, or its T5 wasn't kept; or `teacher` has
            another width or vocabulary.
        NoT5SlotError: The pipeline has no T5 slot.
    """
    slot = TextSlot(pipe)
    student = slot.encoder
    if not is_student(student):
        raise PatchError(f"nothing to undo: {slot} holds {type(student).__name__}, and no student.")
    check_device_map(getattr(pipe, "hf_device_map", None))
    dtype = compute_dtype(student)
    if teacher is None and "_t5slim_original" not in vars(pipe):
        raise PatchError(
            f"the T5 of {slot} wasn't kept. Pass it: transformers.AutoModelForTextEncoding."
            f"from_pretrained(<folder or Hub id>, subfolder={slot.name!r}, dtype={dtype})."
        )
    if teacher is not None:
        config, got = getattr(teacher, "config", None), type(teacher).__name__
        if embedding_width(config) != slot.width:
            raise PatchError(f"{slot} takes a T5 of width {slot.width}; got {got}.")
        if misfit := _wrong_vocabulary(config, slot):
            raise PatchError(f"the {got} {misfit}")
    original = vars(pipe)["_t5slim_original"] if teacher is None else teacher
    with slot.offload_paused(original):
        if original is not None:
            cast = compute_dtype(original) != dtype  # the pipeline was, since
            _move(original, student.device, dtype if cast else None)
        slot.restore(original)
        vars(pipe).pop("_t5slim_original", None)
    return pipe


def student_config(student: Student, **access: Any) -> Any:
    """The config of a student, without its weights; `access` says how to reach the Hub.

    Raises:
        IncompatibleStudentError: It is something else, such as a CLIP or a folder of a plain T5.
    """
    config, got = getattr(student, "config", None), type(student).__name__
    if isinstance(student, (str, os.PathLike)):
        got = f"{os.fspath(student)!r}, whose config.json has no project_out_dim"
        values, _ = hub.find_json(hub.local_path(student), "config.json", access)
        if {"project_in_dim", "project_out_dim", "out_dim"} & values.keys():
            config = SlimT5Config(**values)
    if None in (getattr(config, "vocab_size", None), getattr(config, "project_out_dim", None)):
        raise IncompatibleStudentError(
            "expected a SlimT5Encoder, its folder or Hub id, or an encoder whose config says "
            f"vocab_size and project_out_dim; got {got}. See t5slim.SlimT5Encoder.from_t5."
        )
    return config


def check_fit(config: Any, slot: TextSlot) -> None:
    """Raise an IncompatibleStudentError for a student of another vocabulary or width.

    A component that the pipeline was loaded without isn't compared.
    """
    if misfit := _wrong_vocabulary(config, slot):
        raise IncompatibleStudentError(f"the student {misfit}")
    own = config.project_out_dim
    widths = {"embeddings": (own, slot.width)}
    if any(cls.__name__.startswith(_ONE_WIDTH) for cls in slot.cls.__mro__):
        widths["layers"] = getattr(config, "d_model", own), own
    for part, (width, expected) in widths.items():
        if expected not in (None, width):
            raise IncompatibleStudentError(
                f"the student's {part} have width {width}, and {slot} takes {expected}: see "
                "projection_dim of SlimT5Encoder.from_t5, and d_model of SlimT5Config."
            )


def _wrong_vocabulary(config: Any, slot: TextSlot) -> str:
    """How an encoder's vocabulary differs from the tokenizer's, as text; empty if it doesn't."""
    tokenizer = slot.tokenizer
    # With or without the tokens that a textual inversion added, and rounded up, as T5's embeddings
    # are padded to a multiple of 128: 32,128 for 32,100 tokens.
    sizes = () if tokenizer is None else (len(tokenizer), tokenizer.vocab_size)
    if not sizes or any(-(-size // 128) == -(-config.vocab_size // 128) for size in sizes):
        return ""
    return (
        f"has a vocabulary of {config.vocab_size:,}, and the tokenizer of {slot} one of "
        f"{len(tokenizer):,}. Pass one of its family: T5, mT5, UMT5 or ByT5."
    )


def _load_student(student: Student | None, slot: TextSlot, **access: Any) -> Any:
    """A student that fits a slot, loaded where needed; by default the published one."""
    if student is None:
        if "FluxTransformer2DModel" not in str(slot.component_types().get("transformer")):
            raise IncompatibleStudentError(
                f"no student is published for {slot}: pass your own; or, if its T5 is T5-XXL, try "
                f"one of FLUX.1-dev's: {', '.join(_PUBLISHED)}."
            )
        student = next(iter(_PUBLISHED))
    check_fit(student_config(student, **access), slot)
    if isinstance(student, (str, os.PathLike)):
        return SlimT5Encoder.from_pretrained(student, **access)
    return student


def _patch(slot: TextSlot, student: Any, keep: bool, dtype: torch.dtype | None = None) -> Any:
    """Patch the pipeline of a slot; `keep` says whether the original can be put back.

    Where there is no original to take it from, `dtype` is that of the student, or the pipeline's.
    """
    pipe, original = slot.pipe, slot.encoder
    if is_student(original):
        raise PatchError(
            f"{slot} already holds a student: unpatch it, or pipe.{slot.register}({slot.name}=None)"
        )
    check_device_map(getattr(pipe, "hf_device_map", None))
    student = _load_student(student, slot)
    with slot.offload_paused(student):
        # On the meta device it is under the sequential offload of another pipeline.
        there = original is not None and original.device.type != "meta"
        device = original.device if there else pipe._execution_device
        dtype = compute_dtype(original) if original is not None else dtype or pipe.dtype
        _move(student, device, dtype)
        slot.replace(student.eval())
        vars(pipe).pop("_t5slim_original", None)
        if keep:
            pipe._t5slim_original = original  # for `unpatch_pipeline`
    if not keep:
        alive = weakref.WeakSet(() if original is None else original.modules())
        del original
        # Hooks of offload make cycles; to look for them takes a quarter of a second.
        clear_device_cache(garbage_collection=bool(alive))
    cls, config = slot.cls.__name__, getattr(getattr(pipe, "transformer", None), "config", {})
    # schnell takes no guidance, Fill and Control other latents; Kontext's config is FLUX.1-dev's.
    same = config.get("out_channels") in (None, config.get("in_channels")) and "Kontext" not in cls
    other = not (same and config.get("guidance_embeds"))
    if (name := getattr(student.config, "name_or_path", None)) in _PUBLISHED and config and other:
        note = f"{name} was distilled through FLUX.1-dev: check it in this {cls}."
        logging.getLogger(__name__).warning(note)
    return pipe


def _load_patched(cls: Any, source: str, student: Student | None, kwargs: dict[str, Any]) -> Any:
    """Load a pipeline with None in its T5 slot, after its student, and patch it."""
    import diffusers

    if not hasattr(cls, "from_pipe"):
        raise NoT5SlotError(f"expected a class of diffusers' pipelines; got {cls.__name__}.")
    check_device_map(kwargs.get("device_map"))
    dtypes: dict[str, Any] = {"default": None}
    # Before a download, diffusers takes only the libraries of a private table, where it has one.
    table = getattr(sys.modules[diffusers.DiffusionPipeline.__module__], "LOADABLE_CLASSES", {})
    methods = ["save_pretrained", "from_pretrained"]
    table.setdefault(SlimT5Encoder.__module__, {"PreTrainedModel": methods})
    for key in {"dtype", "torch_dtype"} & kwargs.keys():
        given = kwargs[key] if isinstance(kwargs[key], dict) else {"default": kwargs[key]}
        dtypes = {k: getattr(torch, str(v).removeprefix("torch."), v) for k, v in given.items()}
        if not all(isinstance(dtype, (torch.dtype, type(None))) for dtype in dtypes.values()):
            raise PatchError(f"expected a dtype such as torch.bfloat16; got {key}={kwargs[key]!r}.")
        kwargs[key] = dtypes
    index, access = hub.find_json(source, "model_index.json", kwargs)
    # The class that was saved: `cls` may be DiffusionPipeline, or an AutoPipeline.
    name = index.get("_class_name")
    saved = getattr(diffusers, str(name), cls)
    if saved is diffusers.DiffusionPipeline or not hasattr(saved, "register_modules"):
        raise CheckpointError(f"{source!r} is a {name!r}: no pipeline that this diffusers has.")
    slot = TextSlot(saved)
    its = {key: value for key, value in access.items() if key != "revision"}
    if student is None and index.get(slot.name) == [SlimT5Encoder.__module__, "SlimT5Encoder"]:
        student, its = source, access | {"subfolder": slot.name}
        variant = kwargs.get("variant")
        names = [f"model.{variant}.safetensors", "model.safetensors"]
        if variant and getattr(hub.find_file(source, *names, **its), "name", None) == names[0]:
            its["variant"] = variant
    student = _load_student(student, slot, **its)
    kwargs = {"use_safetensors": True} | kwargs | access | {slot.name: None}
    with hub.hub_errors(source, loading=True):
        pipe = cls.from_pretrained(source, **kwargs)
    dtype = dtypes.get(slot.name, dtypes.get("default", torch.float32))  # as diffusers has it
    return _patch(TextSlot(pipe), student, keep=False, dtype=dtype)


def _move(module: nn.Module, device: Any, dtype: torch.dtype | None) -> None:
    """Move, and cast as `from_pretrained(dtype=dtype)` does: under float16, T5's `wo` in float32.

    T5's activations overflow there, which `.to(torch.float16)` doesn't know.
    """
    # Quantized weights aren't floats, and those under layerwise casting are stored in float8.
    stored = getattr(module, "hf_quantizer", None) or find_hooks(module, "layerwise_casting")
    for name, parameter in module.named_parameters():
        if parameter.is_inference():  # which nothing can change outside of inference mode
            weight = nn.Parameter(parameter.clone(), requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, weight)
        if dtype and parameter.is_floating_point() and (parameter.element_size() > 1 or not stored):
            keep = dtype == torch.float16 and ".wo." in name
            parameter.data = parameter.data.to(torch.float32 if keep else dtype)
    module.to(device)
