"""Put a student in the place of a pipeline's T5, and take it out again."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

import torch
from transformers import PreTrainedModel

from .compatibility import Student, check_compatible, published_student, student_config
from .encoder import SlimT5Encoder
from .errors import AlreadyPatchedError, PatchError
from .slot import (
    TextSlot,
    denoiser_text_width,
    fill_slot,
    find_text_slot,
    offload_paused,
    restore_slot,
)

# Arguments of `from_pretrained` that hold for the student as well as for the pipeline.
_HUB_ACCESS = ("cache_dir", "force_download", "local_files_only", "token")

PipelineT = TypeVar("PipelineT")


@dataclass(frozen=True)
class _Patch:
    """What `unpatch_pipeline` needs, kept on the pipeline as `_t5slim_patch`.

    Attributes:
        student: what was put in the slot.
        teacher: what was there, if it was kept, or None.
        entry: what `model_index.json` said of the teacher.
        reversible: False if there was a teacher and it wasn't kept.
        reload: an expression that loads the teacher again.
    """

    student: SlimT5Encoder
    teacher: PreTrainedModel | None
    entry: Any
    reversible: bool
    reload: str


@overload
def patch_pipeline(
    pipe: type[PipelineT],
    source: str | os.PathLike[str],
    /,
    *,
    student: Student | None = None,
    **kwargs: Any,
) -> PipelineT: ...
@overload
def patch_pipeline(
    pipe: PipelineT,
    source: Student | None = None,
    /,
    *,
    student: Student | None = None,
    keep_teacher: bool = False,
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

        pipe = t5slim.patch_pipeline(pipe)
        pipe = t5slim.patch_pipeline(pipe, "my-student", keep_teacher=True)
        pipe = t5slim.patch_pipeline(
            FluxPipeline, "black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16
        )

    A patched pipeline can be saved with `pipe.save_pretrained(folder)`. A process that loads it has
    to `import t5slim` before `DiffusionPipeline.from_pretrained(folder)`: diffusers takes a class
    of a third library only if that is imported, and says so. From the Hub it takes none: there, use
    `t5slim.patch_pipeline(DiffusionPipeline, "user/name")`.

    Args:
        pipe: A pipeline; or a class, also `DiffusionPipeline` or `AutoPipelineForText2Image`.
        source: With a pipeline, the same as `student`. With a class, the folder or Hub id of the
            pipeline.
        student: A `SlimT5Encoder`, or the folder or Hub id of one. The default is the student
            published for FLUX.1; or, with a class and a pipeline that was saved patched, its own.
            A `SlimT5Encoder` isn't copied: it takes on the pipeline's device and dtype.
        keep_teacher: Keep the T5 in memory, where it is, for `unpatch_pipeline`. Otherwise it is
            freed, unless something else refers to it, such as another pipeline that shares it.
        **kwargs: With a class, what its `from_pretrained` takes. `cache_dir`, `force_download`,
            `local_files_only` and `token` hold for the student as well.

    Returns:
        The same pipeline, or the one that was loaded. The student is in evaluation mode, and has
        the device and dtype of the T5 that it replaces; with a class, the dtype that was asked for.

    Raises:
        NoT5SlotError: The pipeline has no T5, as FLUX.2 and SDXL.
        IncompatibleStudentError: The student has another vocabulary than the pipeline's tokenizer,
            or rows of another width than the denoiser takes; or it isn't a student; or none is
            published for this pipeline.
        AlreadyPatchedError: There is a student in the pipeline.
        PatchError: `device_map` spreads the pipeline over several devices.
        ConfigError, CheckpointError, HubAccessError: As in `SlimT5Encoder.from_pretrained`.
        After each of them, the pipeline is as it was.
    """
    if not isinstance(pipe, type):
        if kwargs:
            raise TypeError(f"with a pipeline, patch_pipeline doesn't take {', '.join(kwargs)}.")
        if source is not None and student is not None:
            raise TypeError("patch_pipeline got two students: by position, and as `student`.")
        return _patch(pipe, source if student is None else student, keep_teacher=keep_teacher)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"patch_pipeline({pipe.__name__}, ...) loads a pipeline: expected its folder or Hub "
            f"id, got {source!r}."
        )
    if keep_teacher:
        raise TypeError(
            f"keep_teacher=True: patch_pipeline({pipe.__name__}, ...) loads no T5 that could be "
            f"kept. Patch a pipeline, as {pipe.__name__}.from_pretrained returns it."
        )
    return _load_patched(pipe, source, student, kwargs)


def unpatch_pipeline(pipe: PipelineT, teacher: PreTrainedModel | None = None) -> PipelineT:
    """Undo `patch_pipeline`: put the T5 back, on the device and in the dtype of the pipeline.

    Args:
        pipe: A patched pipeline.
        teacher: The T5 to put back, where it wasn't kept with `keep_teacher=True`.

    Returns:
        The same pipeline. With the T5 that was in it, its images are bitwise the old ones.

    Raises:
        PatchError: There is no student in the pipeline, or its T5 wasn't kept: the message shows
            the line that loads it again.
        NoT5SlotError: The pipeline has no T5 slot.
    """
    slot = find_text_slot(pipe)
    student = getattr(pipe, slot.name)
    if not isinstance(student, SlimT5Encoder):
        raise PatchError(
            f"there is nothing to undo: {slot.name} of this {type(pipe).__name__} holds "
            f"{_describe(student)}, and no student."
        )
    _check_device_map(getattr(pipe, "hf_device_map", None))
    patch = getattr(pipe, "_t5slim_patch", None)
    if patch is None or patch.student is not student:  # patched by another process
        patch = _Patch(student, None, None, reversible=False, reload=_reload(pipe, slot, None))
    entry = None
    if teacher is None:
        if not patch.reversible:
            raise PatchError(
                f"the T5 of this {type(pipe).__name__} wasn't kept (patch_pipeline keeps it with "
                "keep_teacher=True). To load it again and put it back:\n"
                f"    t5slim.unpatch_pipeline(pipe, {patch.reload})"
            )
        teacher, entry = patch.teacher, patch.entry
    with offload_paused(pipe):
        if teacher is not None:
            teacher.to(student.device)
            if teacher.dtype != student.dtype:  # the pipeline was cast since
                _cast(teacher, student.dtype)
        restore_slot(pipe, slot, teacher, entry)
    vars(pipe).pop("_t5slim_patch", None)
    return pipe


def _patch(
    pipe: Any,
    student: Student | None,
    *,
    keep_teacher: bool = False,
    dtype: torch.dtype | None = None,
) -> Any:
    slot = find_text_slot(pipe)
    teacher = getattr(pipe, slot.name)
    if isinstance(teacher, SlimT5Encoder):
        raise AlreadyPatchedError(
            f"{slot.name} of this {type(pipe).__name__} already holds a student, "
            f"{_describe(teacher)}. Call t5slim.unpatch_pipeline(pipe) first; or, to put another "
            f"student in its place without its T5, pipe.register_modules({slot.name}=None)."
        )
    _check_device_map(getattr(pipe, "hf_device_map", None))
    if student is None:
        student = published_student(type(pipe), denoiser_text_width(pipe))
    check_compatible(student_config(student), pipe)
    dtype = dtype or (pipe if teacher is None else teacher).dtype
    if not isinstance(student, SlimT5Encoder):
        student = SlimT5Encoder.from_pretrained(student, dtype=dtype)

    patch = _Patch(
        student=student,
        teacher=teacher if keep_teacher else None,
        entry=pipe.config[slot.name],
        reversible=keep_teacher or teacher is None,
        reload=_reload(pipe, slot, teacher),
    )
    with offload_paused(pipe):
        _cast(student, dtype)
        student.to(pipe._execution_device if teacher is None else teacher.device)
        student.eval()
        fill_slot(pipe, slot, student)
    pipe._t5slim_patch = patch
    if not patch.reversible:
        # The hooks of offload make cycles: T5-XXL would stay until some later collection.
        del teacher
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    return pipe


def _load_patched(
    cls: Any, source: str | os.PathLike[str], student: Student | None, kwargs: dict[str, Any]
) -> Any:
    import diffusers

    _let_diffusers_download_students()
    _check_device_map(kwargs.get("device_map"))
    access = {key: kwargs[key] for key in _HUB_ACCESS if key in kwargs}
    revision = kwargs.get("revision")
    index = cls.load_config(source, revision=revision, **access)
    concrete = cls
    if cls is diffusers.DiffusionPipeline or not issubclass(cls, diffusers.DiffusionPipeline):
        concrete = getattr(diffusers, str(index["_class_name"]), cls)  # also of an AutoPipeline
    slot = find_text_slot(concrete)
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype")) or torch.float32
    if isinstance(dtype, dict):
        dtype = dtype.get(slot.name, dtype.get("default", torch.float32))

    if student is None and index.get(slot.name, [None])[0] == SlimT5Encoder.__module__:
        student = source
        access |= {"subfolder": slot.name, "revision": revision}
    elif student is None:
        student = published_student(concrete)
    student_config(student, **access)
    if not isinstance(student, SlimT5Encoder):
        student = SlimT5Encoder.from_pretrained(student, dtype=dtype, **access)
    pipe = _patch(cls.from_pretrained(source, **{slot.name: None}, **kwargs), student, dtype=dtype)
    pipe._t5slim_patch = replace(pipe._t5slim_patch, reversible=False)
    return pipe


def _check_device_map(device_map: Any) -> None:
    if device_map == "balanced" or (isinstance(device_map, dict) and len(device_map) > 1):
        raise PatchError(
            f"device_map={device_map!r} spreads the pipeline over devices, and its T5 can't be "
            "replaced in that state. Load it without device_map, or call pipe.reset_device_map(); "
            "patch it; then use pipe.to(...) or pipe.enable_model_cpu_offload()."
        )


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast as `from_pretrained(dtype=dtype)` does: under float16, T5's `wo` stays in float32.

    T5's activations overflow there, which `.to(torch.float16)` doesn't know.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():  # quantized weights aren't
            keep = dtype == torch.float16 and ".wo." in name
            parameter.data = parameter.data.to(torch.float32 if keep else dtype)


def _reload(pipe: Any, slot: TextSlot, teacher: PreTrainedModel | None) -> str:
    name = getattr(teacher, "name_or_path", None)
    where = repr(name)
    if not name or os.path.basename(name) == slot.name:  # it came with the pipeline
        where = f"{str(pipe.name_or_path or '<folder or Hub id>')!r}, subfolder={slot.name!r}"
    dtype = "" if teacher is None else f", dtype={teacher.dtype}"
    return f"transformers.AutoModelForTextEncoding.from_pretrained({where}{dtype})"


def _describe(module: Any) -> str:
    name = getattr(module, "name_or_path", None)
    kind = "None" if module is None else type(module).__name__
    return f"{kind} ({name})" if name else kind


def _let_diffusers_download_students() -> None:
    """Make diffusers accept our module name in the model_index.json of a Hub repository.

    Its check before a download knows only the libraries of this private table. Where the table is
    gone, that check probably is, too; if not, it names the component that it refuses.
    """
    try:
        from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
    except ImportError:
        return
    LOADABLE_CLASSES.setdefault(
        SlimT5Encoder.__module__, {"PreTrainedModel": ["save_pretrained", "from_pretrained"]}
    )
