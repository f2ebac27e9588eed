"""Load a pipeline without its T5, and the student that comes in its place."""

from __future__ import annotations

import os
from typing import Any

import torch

from .compatibility import Guest, Student, published_student, student_config
from .encoder import SlimT5Encoder
from .slot import check_device_map, find_text_slot, is_modular

# Arguments of a pipeline's `from_pretrained` that hold for the student as well.
_HUB_ACCESS = ("cache_dir", "force_download", "local_files_only", "token")


def load_without_t5(
    cls: Any, source: str | os.PathLike[str], student: Student | None, kwargs: dict[str, Any]
) -> tuple[Any, Guest, torch.dtype]:
    """Load a student, then a pipeline with None in its T5 slot: T5 is neither downloaded nor read.

    Args:
        cls: A class of pipelines, also `DiffusionPipeline` or `AutoPipelineForText2Image`.
        source: The folder or Hub id of a pipeline.
        student: See `patch_pipeline`.
        kwargs: What `cls.from_pretrained` takes.

    Returns:
        The pipeline, the student, and the dtype that the pipeline's T5 would have got.
    """
    import diffusers

    if is_modular(cls):
        raise TypeError(
            f"{cls.__name__} is a class of modular pipelines. Make one, load its components but T5 "
            "with pipe.load_components(names=[...]), and call t5slim.patch_pipeline(pipe)."
        )
    check_device_map(kwargs.get("device_map"))
    _let_diffusers_download_students()
    access = {key: kwargs[key] for key in _HUB_ACCESS if key in kwargs}
    revision = kwargs.get("revision")
    index = cls.load_config(source, revision=revision, **access)
    concrete = cls
    if cls is diffusers.DiffusionPipeline or not issubclass(cls, diffusers.DiffusionPipeline):
        concrete = getattr(diffusers, str(index["_class_name"]), cls)  # also of an AutoPipeline
    slot = find_text_slot(concrete)
    dtype: Any = kwargs.get("dtype", kwargs.get("torch_dtype")) or torch.float32
    if isinstance(dtype, dict):  # as diffusers reads it
        dtype = dtype.get(slot.name, dtype.get("default", torch.float32))

    if student is None and index.get(slot.name, [None])[0] == SlimT5Encoder.__module__:
        student = source
        access |= {"subfolder": slot.name, "revision": revision}
    elif student is None:
        student = published_student(concrete)
    student_config(student, **access)
    if isinstance(student, (str, os.PathLike)):
        student = SlimT5Encoder.from_pretrained(student, dtype=dtype, **access)
    kwargs = kwargs | {slot.name: None}
    if "dtype" in kwargs and tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 40):
        kwargs["torch_dtype"] = kwargs.pop("dtype")  # it would ignore the new name
    return cls.from_pretrained(source, **kwargs), student, dtype


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
