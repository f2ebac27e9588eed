"""The pipeline and the students of a run, named so that a file can say which."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import Source
from ..config import SlimT5Config
from ..encoder import SlimT5Encoder
from ..errors import ConfigError, HubAccessError
from .sharding import shard_denoiser
from .yaml_file import check_keys

_OFFLOADS = ("model", "sequential")


@dataclass(frozen=True)
class PipelineSource:
    """A pipeline with a T5, and how it is loaded.

    Attributes:
        name_or_path: a folder or a Hub id.
        class_name: a pipeline class of diffusers; by default what `model_index.json` says.
        revision: a branch, tag or commit. A commit is the same teacher next year.
        variant: of the files, such as "fp16".
        dtype: such as "bfloat16"; or a mapping of components to such names, with "default".
        quantization: what `diffusers.PipelineQuantizationConfig` takes: `quant_backend`,
            `quant_kwargs`, `components_to_quantize`. A denoiser that is quantized is the teacher as
            it is then.
        cache_dir: where downloads are kept.
        local_files_only: never ask the network.
        device: such as "cuda:1"; by default that of the process.
        offload: "model" or "sequential" CPU offload.
        shard_denoiser: spread the denoiser's weights over the processes (FSDP), which gather them
            block by block as it is called.

    Raises:
        ConfigError: a value that none of these can have.
    """

    name_or_path: str
    class_name: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: str | Mapping[str, str] = "float32"
    quantization: Mapping[str, Any] | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    device: str | None = None
    offload: str | None = None
    shard_denoiser: bool = False

    def __post_init__(self) -> None:
        for name in ("name_or_path", "class_name", "revision", "variant", "cache_dir", "device"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "name_or_path"):
                raise ConfigError(f"{name} is {value!r}; expected text.")
        for name in ("local_files_only", "shard_denoiser"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected true or false.")
        for dtype in self.dtype.values() if isinstance(self.dtype, Mapping) else (self.dtype,):
            _dtype(dtype)
        if self.quantization is not None:
            known = ("quant_backend", "quant_kwargs", "components_to_quantize", "quant_mapping")
            check_keys(self.quantization, known, "quantization")
        if self.offload not in (None, *_OFFLOADS):
            raise ConfigError(f"offload is {self.offload!r}; expected {' or '.join(_OFFLOADS)}.")
        if self.shard_denoiser and (self.offload or self.quantization):
            raise ConfigError("shard_denoiser goes with neither offload nor quantization.")

    def pipeline_class(self) -> Any:
        """The pipeline's class, for which no weights are loaded.

        Raises:
            ConfigError: diffusers has no such class; or there is no pipeline there.
            HubAccessError: the repository can't be reached.
        """
        import diffusers

        name = self.class_name
        if name is None:
            source = Source(
                self.name_or_path, revision=self.revision, cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
            )  # fmt: skip
            if source.find("model_index.json") is None:
                raise ConfigError(f"pipeline: {source} holds no model_index.json: no pipeline.")
            name = diffusers.DiffusionPipeline.load_config(self.name_or_path, **self._access())[
                "_class_name"
            ]
        cls = getattr(diffusers, str(name), None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
            raise ConfigError(f"pipeline: diffusers has no pipeline class {name!r}.")
        return cls

    def load(self, cls: Any, device: torch.device, without: Collection[str] = ()) -> Any:
        """Load the pipeline, and put it where it is to work.

        Args:
            cls: from `pipeline_class`.
            device: where to, if `device` doesn't say.
            without: components that are neither downloaded nor read.

        Raises:
            HubAccessError: it can't be read.
        """
        kwargs: dict[str, Any] = dict.fromkeys(without) | self._access()
        if isinstance(self.dtype, str):
            kwargs["dtype"] = _dtype(self.dtype)
        else:
            kwargs["dtype"] = {name: _dtype(dtype) for name, dtype in self.dtype.items()}
        if self.quantization is not None:
            from diffusers import PipelineQuantizationConfig

            kwargs["quantization_config"] = PipelineQuantizationConfig(**self.quantization)
        try:
            pipe = cls.from_pretrained(
                self.name_or_path, variant=self.variant, use_safetensors=True, **kwargs
            )
        except OSError as error:
            raise HubAccessError(f"The pipeline {self.name_or_path!r}: {error}") from error
        where = torch.device(self.device) if self.device else device
        if self.shard_denoiser:
            shard_denoiser(pipe, where)
        if self.offload == "model":
            pipe.enable_model_cpu_offload(device=where)
        elif self.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=where)
        else:
            pipe.to(where)
        return pipe

    def _access(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
        }


# Of a student that is loaded; beside a preset, any key of a student's config.
_ACCESS = ("revision", "subfolder", "variant", "cache_dir", "local_files_only", "dtype")
_STUDENTS = {"from_pretrained": _ACCESS, "from_t5": (*_ACCESS, "projection_dim"), "preset": None}


def check_student_source(source: Any) -> None:
    """Refuse what `load_student` couldn't read; no weights are loaded for that.

    Raises:
        ConfigError: which key, and what may have been meant.
    """
    kinds = [kind for kind in _STUDENTS if isinstance(source, Mapping) and kind in source]
    if len(kinds) != 1:
        raise ConfigError(f"student: {source!r}; expected one of the keys {', '.join(_STUDENTS)}.")
    (kind,) = kinds
    options = _STUDENTS[kind]
    if options is None:
        student_config(source)
        return
    check_keys(source, (kind, *options), "student")
    if not isinstance(source[kind], str):
        raise ConfigError(f"student: {kind} is {source[kind]!r}; expected a folder or a Hub id.")
    if "dtype" in source:
        _dtype(source["dtype"])


def load_student(source: Mapping[str, Any], seed: int) -> SlimT5Encoder:
    """The student that a mapping names.

    Args:
        source: `{from_pretrained: name}`, a student; `{from_t5: name, projection_dim: 4096}`, a
            T5's encoder with a fresh projection; or `{preset: base, project_out_dim: 4096}`, all
            fresh, with any key of a student's config.
        seed: of what is fresh.

    Raises:
        ConfigError, CheckpointError, HubAccessError: as in `SlimT5Encoder.from_pretrained`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if "preset" in source:
            return SlimT5Encoder(student_config(source))
        kind = "from_t5" if "from_t5" in source else "from_pretrained"
        options = {key: value for key, value in source.items() if key != kind}
        if "dtype" in options:
            options["dtype"] = _dtype(options["dtype"])
        student: SlimT5Encoder = getattr(SlimT5Encoder, kind)(source[kind], **options)
        return student


def student_config(source: Mapping[str, Any]) -> SlimT5Config:
    """The config of `{preset: ..., ...}`."""
    keys = dict(source)
    return SlimT5Config.preset(keys.pop("preset"), **keys)


def _dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype is {name!r}; expected bfloat16, float16 or float32.")
    return dtype
