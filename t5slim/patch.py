"""Put a student in the place of a pipeline's T5, and take it out again."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

import torch
from transformers import PreTrainedModel

from .compatibility import (
    Guest,
    Student,
    check_compatible,
    is_student,
    published_student,
    student_config,
)
from .encoder import SlimT5Encoder
from .errors import AlreadyPatchedError, PatchError
from .loading import load_without_t5
from .slot import (
    TextSlot,
    check_device_map,
    compute_dtype,
    denoiser_text_width,
    fill_slot,
    find_text_slot,
    free_memory,
    is_modular,
    offload_paused,
    restore_slot,
    slot_entry,
    uncompiled,
)

PipelineT = TypeVar("PipelineT")


@dataclass(frozen=True)
class _Patch:
    """What `unpatch_pipeline` needs, kept on the pipeline as `_t5slim_patch`.

    Attributes:
        student: what was put in the slot.
        teacher: what was there, if it was kept, or None.
        entry: what `slot_entry` said of the teacher.
        reversible: False if there was a teacher and it wasn't kept.
        reload: an expression that loads the teacher again.
    """

    student: Guest
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
        pipe: A pipeline, also a modular one whose components are loaded (T5 needn't be). Or a
            class, also `DiffusionPipeline` or `AutoPipelineForText2Image`.
        source: With a pipeline, the same as `student`. With a class, the folder or Hub id of the
            pipeline.
        student: A `SlimT5Encoder`, or the folder or Hub id of one; or a `ContextlessEncoder`. It
            isn't copied, and takes on the pipeline's device and dtype; it may be compiled. The
            default is the student published for FLUX.1; or, with a class and a pipeline that was
            saved patched, its own.
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
    loaded, student, dtype = load_without_t5(pipe, source, student, kwargs)
    _patch(loaded, student, dtype=dtype)
    loaded._t5slim_patch = replace(loaded._t5slim_patch, reversible=False)
    return loaded


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
    if not is_student(student):
        raise PatchError(
            f"there is nothing to undo: {slot.name} of this {type(pipe).__name__} holds "
            f"{_describe(student)}, and no student."
        )
    check_device_map(getattr(pipe, "hf_device_map", None))
    patch = getattr(pipe, "_t5slim_patch", None)
    if patch is None or uncompiled(patch.student) is not uncompiled(student):
        # Patched by another process.
        patch = _Patch(student, None, None, reversible=False, reload=_reload(slot, None, None))
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
            teacher.to(student.device)  # type: ignore[arg-type] # transformers' wrapper of `to`
            dtype = compute_dtype(student)
            if compute_dtype(teacher) != dtype:  # the pipeline was cast since
                _cast(teacher, dtype)
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
    if is_student(teacher):
        register = "update_components" if is_modular(pipe) else "register_modules"
        raise AlreadyPatchedError(
            f"{slot.name} of this {type(pipe).__name__} already holds a student, "
            f"{_describe(teacher)}. Call t5slim.unpatch_pipeline(pipe) first; or, to put another "
            f"student in its place without its T5, pipe.{register}({slot.name}=None)."
        )
    check_device_map(getattr(pipe, "hf_device_map", None))
    if student is None:
        student = published_student(pipe, denoiser_text_width(pipe))
    check_compatible(student_config(student), pipe)
    dtype = dtype or (pipe.dtype if teacher is None else compute_dtype(teacher))
    if isinstance(student, (str, os.PathLike)):
        student = SlimT5Encoder.from_pretrained(student, dtype=dtype)

    home = os.fspath(getattr(pipe, "name_or_path", None) or "")
    patch = _Patch(
        student=student,
        teacher=teacher if keep_teacher else None,
        entry=slot_entry(pipe, slot),
        reversible=keep_teacher or teacher is None,
        # A pipeline that brought its own student has no T5 to load again.
        reload=_reload(slot, teacher, None if student.config.name_or_path == home else home),
    )
    with offload_paused(pipe):
        _cast(student, dtype)
        student.to(pipe._execution_device if teacher is None else teacher.device)
        student.eval()
        fill_slot(pipe, slot, student)
    pipe._t5slim_patch = patch
    if not patch.reversible:
        del teacher
        free_memory()
    return pipe


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast as `from_pretrained(dtype=dtype)` does: under float16, T5's `wo` stays in float32.

    T5's activations overflow there, which `.to(torch.float16)` doesn't know.
    """
    for name, parameter in model.named_parameters():
        # Quantized weights aren't floats, and those under layerwise casting are stored in float8.
        if parameter.is_floating_point() and parameter.element_size() > 1:
            keep = dtype == torch.float16 and ".wo." in name
            parameter.data = parameter.data.to(torch.float32 if keep else dtype)


def _reload(slot: TextSlot, teacher: PreTrainedModel | None, home: str | None) -> str:
    """An expression that loads the T5 of the pipeline from `home`."""
    name = "" if teacher is None else teacher.config.name_or_path
    where = repr(name)
    if not name or os.path.basename(name) == slot.name:  # it came with the pipeline
        where = f"{home or '<folder or Hub id>'!r}, subfolder={slot.name!r}"
    dtype = "" if teacher is None else f", dtype={compute_dtype(teacher)}"
    return f"transformers.AutoModelForTextEncoding.from_pretrained({where}{dtype})"


def _describe(module: Any) -> str:
    if module is None:
        return "None"
    name = module.config.name_or_path
    return type(module).__name__ + (f" ({name})" if name else "")
