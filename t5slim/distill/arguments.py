"""The parts that the commands share: their YAML files, the pipeline's arguments, their errors."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import diffusers
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, Namespace

from ..errors import ConfigError, T5SlimError
from ..hub import hub_errors, local_path
from ..slot import TextSlot

Dtype = Literal["float32", "bfloat16", "float16"]
Prompts = str | list | dict[str, Any]  # not list[str], which jsonargparse copies for each str


@dataclass(frozen=True)
class PipelineArguments:
    """The teacher's pipeline, and how to load it.

    Attributes:
        name_or_path: Folder or Hub id.
        revision, variant, cache_dir, local_files_only: As for `DiffusionPipeline.from_pretrained`.
        dtype: Of all components, or by their name, with "default" for the rest.
        quantization: Arguments of `diffusers.PipelineQuantizationConfig`.
        device: Such as "cuda:1"; None: that of the process.
        offload: CPU offload of the whole model or of its single layers; None: none.
    """

    name_or_path: str
    revision: str | None = None
    variant: str | None = None
    dtype: Dtype | dict[str, Dtype] = "float32"
    quantization: dict[str, Any] | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    device: str | None = None
    offload: Literal["model", "sequential"] | None = None

    @cached_property
    def cls(self) -> Any:
        """The pipeline's class, which has a T5; no weights are loaded for it."""
        name = self._read(diffusers.DiffusionPipeline.load_config).get("_class_name")
        if not hasattr(diffusers, str(name)):
            raise ConfigError(f"{self.name_or_path!r} is a {name!r}; expected one of diffusers'.")
        return TextSlot(getattr(diffusers, name)).cls

    def load(self, without: Sequence[str] = ()) -> Any:
        """Load the pipeline, to its device or under offload; `without` are left out, as None."""
        dtypes = self.dtype if isinstance(self.dtype, dict) else {"default": self.dtype}
        kwargs: dict[str, Any] = {"use_safetensors": True, **dict.fromkeys(without)}
        kwargs["dtype"] = {name: getattr(torch, dtype) for name, dtype in dtypes.items()}
        kwargs["quantization_config"] = self.quantization_config()
        pipe = self._read(diffusers.DiffusionPipeline.from_pretrained, **kwargs)
        # Not PartialState, which ignores ACCELERATE_USE_CPU.
        device = self.device or Accelerator(mixed_precision="no").device
        if self.offload is None:
            return pipe.to(device)
        getattr(pipe, f"enable_{self.offload}_cpu_offload")(device=device)
        return pipe

    def quantization_config(self) -> diffusers.PipelineQuantizationConfig | None:
        """What diffusers makes of `quantization`, or its error."""
        given = self.quantization
        return None if given is None else diffusers.PipelineQuantizationConfig(**given)

    def _read(self, read: Callable[..., Any], **kwargs: Any) -> Any:
        for name in ("revision", "variant", "cache_dir", "local_files_only"):
            kwargs[name] = getattr(self, name)
        with hub_errors(self.name_or_path):
            return read(local_path(self.name_or_path), **kwargs)


def command_parser(prog: str, **how: bool) -> ArgumentParser:
    """Return the parser of a command, so far for a YAML file and the pipeline, added as `how`."""
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments")
    parser.add_class_arguments(PipelineArguments, "pipeline", **how)
    return parser


def parse_arguments(
    parser: ArgumentParser, arguments: Sequence[str] | None
) -> tuple[Namespace, str]:
    """Parse arguments, None: those of the process; also return all of them as a YAML file.

    A ConfigError names any mistake in them.
    """
    try:
        given = parser.parse_args(arguments)
        del given["config"]
        run, text = parser.instantiate(given), parser.dump(given, skip_unset=False)
        run.pipeline.quantization_config()
        torch.empty(0, device=run.pipeline.device)
    except Exception as error:  # jsonargparse and yaml have no common base of theirs
        raise ConfigError(f"{error}\nAll arguments: {parser.prog} --help") from error
    return run, text


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End a command without a traceback, at an error of t5slim or at Ctrl-C."""
    try:
        yield
    except T5SlimError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"{str(interrupt) or 'Stopped.'}\n")
        sys.exit(130)
