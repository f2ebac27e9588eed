"""Does a student fit a pipeline? Asked before its weights are read and before anything changes."""

from __future__ import annotations

import inspect
import os
import re
from typing import Any, TypeGuard

from .checkpoint import Source
from .config import SlimT5Config
from .contextless import ContextlessConfig, ContextlessEncoder
from .encoder import SlimT5Encoder
from .errors import IncompatibleStudentError
from .published import students
from .slot import component_types, denoiser_text_width, find_text_slot, uncompiled

Guest = SlimT5Encoder | ContextlessEncoder
Student = Guest | str | os.PathLike[str]

_PUBLISHED_FLUX_WIDTH = 4096


def is_student(module: object) -> TypeGuard[Guest]:
    """Whether this is a student or a `ContextlessEncoder`, or one that `torch.compile` wrapped."""
    return isinstance(uncompiled(module), (SlimT5Encoder, ContextlessEncoder))


def student_config(student: Student, **access: Any) -> SlimT5Config | ContextlessConfig:
    """The config of a student, without its weights.

    Args:
        student: A student, or the folder or Hub id of one.
        **access: How to reach the Hub: `cache_dir`, `local_files_only`, `token`, ...

    Raises:
        IncompatibleStudentError: Something else, such as a T5EncoderModel.
        ConfigError, CheckpointError, HubAccessError: As in `SlimT5Encoder.from_pretrained`.
    """
    if is_student(student):
        return student.config
    how = "To make one of a T5, see t5slim.SlimT5Encoder.from_t5 and t5slim.distill.train."
    if not isinstance(student, (str, os.PathLike)):
        raise IncompatibleStudentError(
            "a student is a SlimT5Encoder, or the folder or Hub id of one; got "
            f"{type(student).__name__}. {how}"
        )
    source = Source(os.fspath(student), **access)
    values = source.read_config()[1]
    if not {"project_in_dim", "project_out_dim", "out_dim"} & values.keys():
        raise IncompatibleStudentError(
            f"{source} isn't a student: its config.json has no project_out_dim. {how}"
        )
    return SlimT5Config.from_dict(values)


def published_student(pipe: Any, width: int | None = None) -> str:
    """The Hub id of the student that is published for a pipeline's denoiser.

    Args:
        pipe: A pipeline, or a class of them.
        width: The width of the rows that the denoiser takes, where it is known.

    Raises:
        IncompatibleStudentError: There is one for FLUX.1 only.
    """
    cls = pipe if isinstance(pipe, type) else type(pipe)
    transformer = component_types(pipe).get("transformer")
    is_flux = re.search(r"\bFluxTransformer2DModel\b", str(transformer)) is not None
    if is_flux and width in (None, _PUBLISHED_FLUX_WIDTH):
        return students()[0].repo_id
    reads = "" if width is None else f", whose denoiser takes rows of width {width}"
    raise IncompatibleStudentError(
        f"no student is published for {cls.__name__}{reads}. Pass one as `student`: a "
        "SlimT5Encoder, or the folder or Hub id of one. t5slim.distill.train makes it."
    )


def check_compatible(config: SlimT5Config | ContextlessConfig, pipe: Any) -> None:
    """Compare a student's vocabulary with a pipeline's tokenizer, and its width with the denoiser.

    Args:
        config: The student's.
        pipe: A `DiffusionPipeline`. A component that it was loaded without isn't asked.

    Raises:
        IncompatibleStudentError: They differ; or the pipeline takes `config.d_model` for the width
            of the rows, and it isn't.
        NoT5SlotError: The pipeline has no T5.
    """
    cls = type(pipe).__name__
    tokenizer_name = find_text_slot(pipe).tokenizer_name
    tokenizer: Any = getattr(pipe, tokenizer_name, None)
    # T5's embeddings are padded to a multiple of 128: 32,128 rows for 32,100 tokens, and 256,384
    # for UMT5's 256,300. So a vocabulary is recognised by its size, rounded up, with or without the
    # tokens that a textual inversion added.
    sizes = () if tokenizer is None else (len(tokenizer), tokenizer.vocab_size)
    if sizes and all(-(-size // 128) != -(-config.vocab_size // 128) for size in sizes):
        raise IncompatibleStudentError(
            f"the student has a vocabulary of {config.vocab_size:,}, and {tokenizer_name} of this "
            f"{cls} ({type(tokenizer).__name__}) one of {len(tokenizer):,}: the student would read "
            "other words than the prompt's. Pass a student of the family of the pipeline's own "
            "encoder: T5 and Flan-T5, mT5, UMT5 or ByT5."
        )
    width = denoiser_text_width(pipe)
    if width is not None and config.project_out_dim != width:
        raise IncompatibleStudentError(
            f"the student's rows have width {config.project_out_dim} (config.project_out_dim), and "
            f"the denoiser of this {cls} takes {width}. Pass a student that was made for it: "
            f"t5slim.SlimT5Encoder.from_t5(..., projection_dim={width}), then t5slim.distill.train."
        )
    if config.d_model != config.project_out_dim and _reads_d_model(type(pipe)):
        width = config.project_out_dim
        raise IncompatibleStudentError(
            f"{cls} takes config.d_model for the width of its T5's rows, and fills zeros of that "
            f"width in. Of this student it is {config.d_model}, and its rows have {width}. Pass a "
            f"student with fewer layers and as wide as its rows: SlimT5Config(d_model={width}, "
            f"project_out_dim={width}, num_layers=4, vocab_size={config.vocab_size})."
        )


def _reads_d_model(cls: type) -> bool:
    """Whether a pipeline's own code says `d_model`, as HunyuanImage's and HunyuanVideo-1.5's do."""
    members = (member for base in cls.__mro__ for member in vars(base).values())
    functions = (inspect.unwrap(getattr(member, "__func__", member)) for member in members)
    return any("d_model" in f.__code__.co_names for f in functions if inspect.isfunction(f))
