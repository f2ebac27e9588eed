"""Put a student in the place of a pipeline's T5, and take it out again."""

from __future__ import annotations

import inspect
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
from torch import nn

from . import hub
from .encoder import SlimT5Config, SlimT5Encoder
from .errors import IncompatibleStudentError, PatchError
from .slot import (
    Original,
    TextSlot,
    check_device_map,
    compute_dtype,
    embedding_width,
    free_memory,
    is_modular,
    is_student,
    uncompiled,
)

Student = nn.Module | str | os.PathLike[str]
PipelineT = TypeVar("PipelineT")

# Published for FLUX.1-dev by Wang et al.: T5-base, the default, and T5-small. The authors state
# no licence, and FLUX.1-dev is non-commercial.
PUBLISHED_STUDENTS = ("LifuWang/DistillT5", "LifuWang/DistillT5-Small")
_FLUX_WIDTH = 4096


@dataclass(frozen=True)
class _Patch:
    """The state that `unpatch_pipeline` needs, kept on the pipeline as `_t5slim_patch`."""

    student: nn.Module
    original: Original | None  # None: there was a T5, and it wasn't kept


@overload
def patch_pipeline(
    pipe: type[PipelineT], source: str | os.PathLike[str], /, **kwargs: Any
) -> PipelineT: ...
@overload
def patch_pipeline(
    pipe: PipelineT, source: Student | None = None, /, **kwargs: Any
) -> PipelineT: ...
def patch_pipeline(
    pipe: Any,
    source: Student | None = None,
    /,
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
            class, also `DiffusionPipeline` or `AutoPipelineForText2Image`.
        source: With a pipeline, the student. With a class, the folder or Hub id of the pipeline.
        student: A `SlimT5Encoder`, or the folder or Hub id of one; or any encoder that is called as
            a T5 is, and whose config says `vocab_size` and `project_out_dim` or `d_model`. It isn't
            copied, and may be compiled. The default is the student published for FLUX.1; or, with a
            class and a pipeline that was saved patched, its own.
        keep_teacher: Keep the T5 in memory, where it is, for `unpatch_pipeline`. Otherwise it is
            freed, unless something else refers to it, such as another pipeline that shares it.
        **kwargs: With a class, what its `from_pretrained` takes. `cache_dir`, `force_download`,
            `local_files_only` and `token` hold for the student as well.

    Returns:
        The same pipeline, or the one that was loaded. The student is in evaluation mode, and has
        the device and dtype of the T5 that it replaces; with a class, the requested dtype.

    Raises:
        NoT5SlotError: The pipeline has no T5, as FLUX.2 and SDXL.
        IncompatibleStudentError: The student has another vocabulary or width than the pipeline, or
            is no such encoder; or none is published for this pipeline.
        PatchError: There is a student in the pipeline; or `device_map` spreads the pipeline.
        ConfigError, CheckpointError, HubAccessError: As in `SlimT5Encoder.from_pretrained`.
        After each of them, the pipeline is as it was.
    """
    if not isinstance(pipe, type):
        if not kwargs and (source is None or student is None):
            return _patch(pipe, source if student is None else student, keep_teacher)
    elif isinstance(source, (str, os.PathLike)) and not keep_teacher:
        return _patch(*_load_without_t5(pipe, os.fspath(source), student, kwargs))
    raise TypeError(
        "expected patch_pipeline(pipe, student, keep_teacher=...); or, to load a pipeline without "
        "its T5, patch_pipeline(cls, folder_or_hub_id, student=..., **kwargs); got "
        f"{type(source).__name__}, {type(student).__name__}, {keep_teacher=}, {[*kwargs]}."
    )


def unpatch_pipeline(pipe: PipelineT, teacher: nn.Module | None = None) -> PipelineT:
    """Undo `patch_pipeline`: put the T5 back, on the device and in the dtype of the pipeline.

    With the T5 that was in it, its images are bitwise the old ones.

    Args:
        pipe: A patched pipeline, which is returned.
        teacher: The T5 to put back, where it wasn't kept with `keep_teacher=True`.

    Raises:
        PatchError: There is no student in the pipeline, or its T5 wasn't kept: the message shows
            the line that loads it again.
        NoT5SlotError: The pipeline has no T5 slot.
    """
    slot = TextSlot(pipe)
    student, patch = slot.encoder, _patch_of(slot)
    if patch is None:
        raise PatchError(
            f"there is nothing to undo: {slot.name} of this {type(pipe).__name__} holds "
            f"{_describe(student)}, and no student."
        )
    check_device_map(getattr(pipe, "hf_device_map", None))
    original = patch.original if teacher is None else Original(teacher)
    if original is None:
        home = os.fspath(getattr(pipe, "name_or_path", None) or "")
        if not home or f"{getattr(student.config, 'name_or_path', '')}/".startswith(f"{home}/"):
            home = "<folder or Hub id>"  # it brought its own student, and no T5
        raise PatchError(
            f"the T5 of this {type(pipe).__name__} wasn't kept (patch_pipeline keeps it with "
            "keep_teacher=True). To load it again and put it back:\n    t5slim.unpatch_pipeline("
            f"pipe, transformers.AutoModelForTextEncoding.from_pretrained({home!r}, "
            f"subfolder={slot.name!r}, dtype={compute_dtype(student)}))"
        )
    with slot.offload_paused():
        if (teacher := original.module) is not None:
            teacher.to(student.device)
            if compute_dtype(teacher) != compute_dtype(student):  # the pipeline was cast since
                _cast(teacher, compute_dtype(student))
        slot.restore(original)
    vars(pipe).pop("_t5slim_patch", None)
    return pipe


def student_config(student: Student, **access: Any) -> Any:
    """The config of a student, without its weights; `access` says how to reach the Hub.

    Raises:
        IncompatibleStudentError: It is something else, such as a CLIP or a folder of a plain T5.
    """
    config, got = getattr(student, "config", None), type(student).__name__
    if isinstance(student, (str, os.PathLike)):
        values, _ = hub.find_json(os.fspath(student), "config.json", access)
        if {"project_in_dim", "project_out_dim", "out_dim"} & values.keys():
            config = SlimT5Config.from_dict(values)
        got = f"{os.fspath(student)!r}, whose config.json has no project_out_dim"
    if getattr(config, "vocab_size", None) is None or embedding_width(config) is None:
        raise IncompatibleStudentError(
            "a student is a SlimT5Encoder, or the folder or Hub id of one, or an encoder whose "
            f"config says vocab_size and project_out_dim (or d_model); got {got}. To make one of a "
            "T5, see t5slim.SlimT5Encoder.from_t5 and t5slim.distill.train."
        )
    return config


def check_fit(config: Any, slot: TextSlot) -> None:
    """Raise an IncompatibleStudentError for another vocabulary or width than the pipeline's.

    A component that the pipeline was loaded without isn't compared.
    """
    cls, tokenizer = type(slot.pipe), slot.tokenizer
    # T5's embeddings are padded to a multiple of 128: 32,128 for 32,100 tokens, and 256,384 for
    # UMT5's 256,300. So a vocabulary is recognised by its size, rounded up, with or without the
    # tokens that a textual inversion added.
    sizes = () if tokenizer is None else (len(tokenizer), tokenizer.vocab_size)
    if sizes and all(-(-size // 128) != -(-config.vocab_size // 128) for size in sizes):
        raise IncompatibleStudentError(
            f"the student has a vocabulary of {config.vocab_size:,}, and {slot.tokenizer_name} of "
            f"this {cls.__name__} ({type(tokenizer).__name__}) one of {len(tokenizer):,}: the "
            "student would read other words than the prompt's. Pass a student of the family of the "
            "pipeline's own encoder: T5 and Flan-T5, mT5, UMT5 or ByT5."
        )
    own, width = embedding_width(config), slot.width
    if width is not None and own != width:
        raise IncompatibleStudentError(
            f"the student's embeddings have width {own}, and the denoiser of this {cls.__name__} "
            f"takes {width}. Pass a student that was made for it: "
            f"t5slim.SlimT5Encoder.from_t5(..., projection_dim={width}), then t5slim.distill.train."
        )
    if getattr(config, "d_model", own) != own and _reads_d_model(cls):
        raise IncompatibleStudentError(
            f"{cls.__name__} takes config.d_model for the width of its T5's embeddings; of this "
            f"student it is {config.d_model}, and they have {own}. Pass one with fewer layers that "
            f"is as wide as its embeddings: SlimT5Config(d_model={own}, project_out_dim={own}, "
            f"num_layers=4, vocab_size={config.vocab_size})."
        )


def _reads_d_model(cls: type) -> bool:
    """Whether a pipeline's own code says `d_model`, as HunyuanImage's and HunyuanVideo-1.5's do."""
    members = (member for base in cls.__mro__ for member in vars(base).values())
    functions = (inspect.unwrap(getattr(member, "__func__", member)) for member in members)
    return any("d_model" in f.__code__.co_names for f in functions if inspect.isfunction(f))


def _published_student(slot: TextSlot) -> str:
    """The Hub id of the student that is published for the denoiser of a pipeline, or of a class."""
    cls = slot.pipe if isinstance(slot.pipe, type) else type(slot.pipe)
    width = None if slot.pipe is cls else slot.width
    denoiser = str(slot.component_types().get("transformer"))
    if re.search(r"\bFluxTransformer2DModel\b", denoiser) and width in (None, _FLUX_WIDTH):
        return PUBLISHED_STUDENTS[0]
    takes = "" if width is None else f", whose denoiser takes embeddings of width {width}"
    raise IncompatibleStudentError(
        f"no student is published for {cls.__name__}{takes}. Pass one as `student`: a "
        "SlimT5Encoder, or the folder or Hub id of one. t5slim.distill.train makes it."
    )


def _patch(pipe: Any, student: Any, keep_teacher: bool, left_out: torch.dtype | None = None) -> Any:
    """Patch a pipeline; `left_out` is the dtype of a T5 that it was loaded without."""
    slot = TextSlot(pipe)
    teacher = slot.encoder
    if _patch_of(slot) is not None:
        register = "update_components" if is_modular(pipe) else "register_modules"
        raise PatchError(
            f"{slot.name} of this {type(pipe).__name__} already holds a student, "
            f"{_describe(teacher)}. Call t5slim.unpatch_pipeline(pipe) first; or, to put another "
            f"student in its place without its T5, pipe.{register}({slot.name}=None)."
        )
    if student is not None and student is teacher:
        raise IncompatibleStudentError(f"the student is the {_describe(teacher)} in {slot.name}.")
    check_device_map(getattr(pipe, "hf_device_map", None))
    if student is None:
        student = _published_student(slot)
    check_fit(student_config(student), slot)
    dtype = left_out or (pipe.dtype if teacher is None else compute_dtype(teacher))
    if isinstance(student, (str, os.PathLike)):
        student = SlimT5Encoder.from_pretrained(student, dtype=dtype)
        check_fit(student.config, slot)  # the branch may have moved since
    with slot.offload_paused():
        _cast(student, dtype)
        student.to(pipe._execution_device if teacher is None else teacher.device)
        original: Original | None = slot.replace(student.eval())
    if not keep_teacher and (teacher is not None or left_out):
        del teacher
        original = None
        free_memory()
    pipe._t5slim_patch = _Patch(student, original)
    return pipe


def _patch_of(slot: TextSlot) -> _Patch | None:
    """The patch of a pipeline; also if another process made it, or another pipeline shares it."""
    encoder = slot.encoder
    patch: _Patch | None = getattr(slot.pipe, "_t5slim_patch", None)
    if patch is not None and uncompiled(patch.student) is uncompiled(encoder):
        return patch
    return _Patch(encoder, None) if is_student(encoder) else None


def _load_without_t5(
    cls: Any, source: str, student: Student | None, kwargs: dict[str, Any]
) -> tuple[Any, nn.Module, bool, torch.dtype]:
    """The arguments of `_patch` for a pipeline that is loaded with None in its T5 slot."""
    import diffusers

    if is_modular(cls):
        raise TypeError(
            f"{cls.__name__} is a class of modular pipelines. Make one, load its components but T5 "
            "with pipe.load_components(names=[...]), and patch that."
        )
    check_device_map(kwargs.get("device_map"))
    # Before a download, diffusers takes only the libraries of a private table. Where that is gone,
    # the check probably is, too; if not, it names the component that it refuses.
    with suppress(ImportError):
        from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

        methods = ["save_pretrained", "from_pretrained"]
        LOADABLE_CLASSES.setdefault(SlimT5Encoder.__module__, {"PreTrainedModel": methods})
    index, access = hub.find_json(source, "model_index.json", kwargs)
    concrete = cls
    if cls is diffusers.DiffusionPipeline or not issubclass(cls, diffusers.DiffusionPipeline):
        concrete = getattr(diffusers, str(index["_class_name"]), cls)  # also of an AutoPipeline
    slot = TextSlot(concrete)
    dtype: Any = kwargs.get("dtype", kwargs.get("torch_dtype")) or torch.float32
    if isinstance(dtype, dict):  # as diffusers reads it
        dtype = dtype.get(slot.name, dtype.get("default", torch.float32))

    its = {key: value for key, value in access.items() if key != "revision"}
    if student is None and index.get(slot.name, [None])[0] == SlimT5Encoder.__module__:
        student, its = source, access | {"subfolder": slot.name}
    elif student is None:
        student = _published_student(slot)
    student_config(student, **its)
    if isinstance(student, (str, os.PathLike)):
        student = SlimT5Encoder.from_pretrained(student, dtype=dtype, **its)
    kwargs = kwargs | access | {slot.name: None}
    if "dtype" in kwargs and tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 40):
        kwargs["torch_dtype"] = kwargs.pop("dtype")  # it would ignore the new name
    with hub.hub_errors(source):
        return cls.from_pretrained(source, **kwargs), student, False, dtype


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast as `from_pretrained(dtype=dtype)` does: under float16, T5's `wo` stays in float32.

    T5's activations overflow there, which `.to(torch.float16)` doesn't know.
    """
    for name, parameter in model.named_parameters():
        # Quantized weights aren't floats, and those under layerwise casting are stored in float8.
        if parameter.is_floating_point() and parameter.element_size() > 1:
            keep = dtype == torch.float16 and ".wo." in name
            parameter.data = parameter.data.to(torch.float32 if keep else dtype)


def _describe(module: Any) -> str:
    name = "" if module is None else getattr(module.config, "name_or_path", "")
    return type(module).__name__ + (f" ({name})" if name else "")
