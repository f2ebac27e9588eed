"""The student: a small T5 encoder and a projection to the width that the denoiser expects.

Tensor names and config keys are those of the students that Wang et al. published (CVPR 2025,
arXiv 2503.19897). diffusers records a component by its module and class: `t5slim.encoder` and
`SlimT5Encoder` are themselves a part of the on-disk format of patched pipelines.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import RemoteEntryNotFoundError, StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, T5Config, UMT5EncoderModel
from transformers import PreTrainedModel as PreTrainedModel  # diffusers looks for it in this module
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5EncoderModel, T5PreTrainedModel
from transformers.utils.generic import can_return_tuple

from . import hub
from .errors import ConfigError

# The shapes of Flan-T5, from which the paper starts.
_PRESETS: dict[str, Any] = {
    "small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
}
_ENCODERS: dict[str, Any] = {"t5": T5EncoderModel, "umt5": UMT5EncoderModel}
_SIZES = ["vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "project_out_dim"]
# What a config's attributes have to be; its sizes, or a kilobyte of JSON could fill the memory.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_SIZES, ("a positive integer", lambda size: type(size) is int and size > 0)),
    "num_layers": ("from 1 to 1,000", lambda layers: 0 < layers <= 1000),
    "parameters": ("at most 6 billion (T5-XXL's encoder has 4.8)", lambda n: n <= 6 * 10**9),
    "relative_attention_num_buckets": ("from 4 to 128", lambda buckets: 4 <= buckets <= 128),
    "relative_attention_max_distance": ("from 33 to 1,000,000", lambda n: 33 <= n <= 10**6),
    "dropout_rate": ("a number from 0, below 1", lambda rate: 0 <= rate < 1),
    "layer_norm_epsilon": ("a finite number from 0, below 1", lambda epsilon: 0 <= epsilon < 1),
    "initializer_factor": ("a number from 0 to 1,000", lambda factor: 0 <= factor <= 1000),
    "encoder_type": ("'t5' or 'umt5'", lambda name: name in list(_ENCODERS)),
    "dense_act_fn": ("'relu' or another `feed_forward_proj`", lambda name: name in ACT2FN),
    "dtype": ("16 bits or more, dtype=torch.bfloat16", lambda d: not d or torch.finfo(d).bits > 8),
    "base_model": ("a string", lambda name: name is None or isinstance(name, str)),
}
_KEYS = {*_RULES, *T5Config.attribute_map, "feed_forward_proj", "base_model_revision"}
_KEYS -= {"parameters", "dense_act_fn", "dtype"}
_LOADING = {"dtype", "torch_dtype", "quantization_config", "attn_implementation"}


class SlimT5Config(T5Config):
    """Configuration of a `SlimT5Encoder`: a T5Config and the two widths of its projection.

    Args:
        project_in_dim: Input width of the projection: `d_model`, the student's own width.
        project_out_dim: Output width D of the projection: T5-XXL's 4096 for FLUX.1 and SD3.
        out_dim: Another name of `project_out_dim`, which older readers of the layout know.
        encoder_type: "t5", or "umt5" for a UMT5 encoder, whose every layer has position biases of
            its own: for Wan, AuraFlow and others that have a UMT5.
        **kwargs: Any key of a T5Config; and `base_model` and `base_model_revision`, the Hub id and
            commit of the T5 that the student was made from. Others are dropped.

    Raises:
        ConfigError: A value is out of range.
    """

    # Not "t5", as the published files say: AutoModel would read a T5Model, without its projection.
    model_type = "slim_t5"
    project_out_dim = 4096  # T5Config's __init__ calls `to_dict`
    encoder_type = "t5"

    def __init__(
        self,
        *,
        project_in_dim: int | None = None,
        project_out_dim: int | None = None,
        out_dim: int = 4096,
        encoder_type: str = "t5",
        **kwargs: Any,
    ) -> None:
        # Others mean nothing to an encoder; of `num_labels=10**9` transformers would make as many.
        kwargs = {key: kwargs[key] for key in kwargs.keys() & (_KEYS | _LOADING)}
        try:
            super().__init__(**kwargs | {"tie_word_embeddings": False})
            self.project_out_dim = out_dim if project_out_dim is None else project_out_dim
            self.project_in_dim = self.d_model if project_in_dim is None else project_in_dim
            if encoder_type != "t5":  # for which the published files have no key
                self.encoder_type = encoder_type
            width = (f"d_model = {self.d_model}", lambda value: value == self.d_model)
            for key, (expected, holds) in {**_RULES, "project_in_dim": width}.items():
                if not holds(value := getattr(self, key, None)):
                    raise ValueError(f"{key}: expected {expected}, got {value!r}.")
        except (StrictDataclassError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"invalid config of a student: {error}") from error

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "SlimT5Config":
        """The shape of a Flan-T5 encoder, with a projection to T5-XXL's width.

        Args:
            name: "small", "base", "large" or "xl": with projection, 54 M, 130 M, 362 M or 1,249 M
                parameters.
            **overrides: Keys to set differently, such as `encoder_type="umt5", vocab_size=256384`
                for Wan.

        Raises:
            ConfigError: An unknown name or key, or a value that is out of range.
        """
        if name not in _PRESETS:
            raise ConfigError(f"expected a preset of {', '.join(_PRESETS)}, got {name!r}.")
        if unknown := overrides.keys() - _KEYS - _LOADING:
            raise ConfigError(f"a student's config has no {', '.join(sorted(unknown))}.")
        return cls(**{"d_kv": 64, "feed_forward_proj": "gated-gelu", **_PRESETS[name], **overrides})

    @property
    def parameters(self) -> int:
        """The number of parameters of a student, to a few per cent."""
        # num_heads * d_kv need not be d_model: Flan-T5 small has 6 heads of 64 for a width of 512.
        layer = self.d_model * (4 * self.num_heads * self.d_kv + 3 * self.d_ff)
        biases = self.relative_attention_num_buckets * self.num_heads
        projection = (self.d_model + self.project_out_dim) * self.project_out_dim
        return self.vocab_size * self.d_model + self.num_layers * (layer + biases) + projection

    def to_dict(self) -> dict[str, Any]:
        """The config as it is written to disk, with the keys of the published files."""
        # transformers 5 replaces `tie_word_embeddings` by True in memory, and would write that.
        return super().to_dict() | {"tie_word_embeddings": False, "out_dim": self.project_out_dim}


class ProjectionAdapter(nn.Sequential):
    """The MLP after the student's encoder: Linear, ReLU, Dropout, Linear, without biases.

    Maps (B, T, in_dim) to (B, T, out_dim), in the dtype of its weights. A Sequential, because the
    published files name them `final_projection.0.weight` and `final_projection.3.weight`.
    """

    def __init__(self, in_dim: int, out_dim: int, dropout_rate: float = 0.1) -> None:
        super().__init__(
            nn.Linear(in_dim, out_dim, bias=False),
            nn.ReLU(),
            nn.Dropout(dropout_rate),
            nn.Linear(out_dim, out_dim, bias=False),
        )
        # Keeps the root mean square, so that training starts at the scale of a T5's output: ReLU
        # halves the mean square, which 2/d makes up for (He et al. 2015). PyTorch's quarter it.
        nn.init.normal_(self.get_parameter("0.weight"), std=(2 / in_dim) ** 0.5)
        nn.init.normal_(self.get_parameter("3.weight"), std=out_dim**-0.5)

    def __getitem__(self, index: int | slice) -> Any:
        """A layer. A slice, as diffusers' group offload takes, is a plain Sequential."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else list(self)[index]


def _faster(encoder: nn.Module) -> nn.Module:
    """Make a T5 compute the same, up to rounding, and up to a fifth faster on a CPU."""
    for module in [*encoder.modules()]:
        if bias := getattr(module, "relative_attention_bias", None):
            bias.register_forward_hook(_heads_first)
        if isinstance(getattr(module, "act", None), NewGELUActivation):  # seven kernels for one
            module.act = nn.GELU(approximate="tanh")
    return encoder


def _heads_first(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Lay position biases (T, T, heads) out as attention reads them, or each layer copies them."""
    return output.movedim(-1, 0).contiguous().movedim(0, -1)


class SlimT5Encoder(T5PreTrainedModel):
    """A T5 or UMT5 encoder with a projection: what stands in for T5-XXL in a diffusers pipeline.

    An ordinary model of transformers: gradient checkpointing, SDPA and `device_map` work as in
    T5EncoderModel. Loaded in float16, the `wo` layers stay in float32, since T5's activations
    behind them exceed float16's range. `.to(torch.float16)` casts them as well, and the embeddings
    are then wrong: pass `dtype=torch.float16` to `from_pretrained`, or use bfloat16.
    """

    config_class = SlimT5Config
    config: SlimT5Config
    base_model_prefix = "encoder"  # which has the token embedding

    def __init__(self, config: SlimT5Config) -> None:
        super().__init__(config)
        self.encoder: Any = _faster(_ENCODERS[config.encoder_type](config))
        widths = config.d_model, config.project_out_dim
        self.final_projection = ProjectionAdapter(*widths, config.dropout_rate)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: encoder and adapter draw theirs as they are made; T5's rule has std 1."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encode prompts.

        Args:
            input_ids: (B, T) int64 token ids.
            attention_mask: (B, T), 0 for padding. FLUX.1 and SD3 pass none, and attend to it.
            inputs_embeds: (B, T, d_model), instead of ids.
            output_hidden_states: Also return the encoder's states, each (B, T, d_model).
            **kwargs: What else T5EncoderModel takes; `use_cache` means nothing to an encoder.

        Returns:
            A BaseModelOutput or, with `return_dict=False`, a tuple of its parts; the first,
            `last_hidden_state`, is (B, T, project_out_dim) in `self.dtype`.
        """
        output = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            **kwargs | {"return_dict": True, "use_cache": False},
        )
        output.last_hidden_state = self.final_projection(output.last_hidden_state)
        return output

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: SlimT5Config | None = None,
        **kwargs: Any,
    ) -> "SlimT5Encoder":
        """Load a student, in evaluation mode: a saved one, or one such as `LifuWang/DistillT5`.

        Args:
            pretrained_model_name_or_path: A folder or a Hub id.
            config: Use this configuration and not the checkpoint's.
            **kwargs: As of transformers: `subfolder`, `revision`, `token`, `local_files_only`,
                `variant`, `dtype` (by default that of the file), `quantization_config`...

        Raises:
            ConfigError: A value of the config is out of range.
            CheckpointError: Tensors are missing, unexpected, of another shape or not finite; the
                file is truncated, or there are only pickled weights.
            HubAccessError: The repository doesn't exist, is gated or can't be reached.
        """
        name = hub.local_path(pretrained_model_name_or_path)
        values, access = hub.find_json(name, "config.json", kwargs)
        if config is None:  # `kwargs` may change its values, as in transformers
            values |= {key: kwargs.pop(key) for key in _KEYS & kwargs.keys()}
            config, kwargs = SlimT5Config.from_dict(values, return_unused_kwargs=True, **kwargs)
        info = kwargs.pop("output_loading_info", False)
        loaded = hub.load_strictly(super().from_pretrained, name, access, config=config, **kwargs)
        return loaded if info else loaded[0]  # type: ignore[return-value]

    @classmethod
    def from_t5(
        cls, name_or_path: str | os.PathLike[str], projection_dim: int = 4096, **kwargs: Any
    ) -> "SlimT5Encoder":
        """Make a student to be trained: a pretrained T5's encoder and a fresh projection.

        The projection's last layer is zero, from which training takes fewer updates than from
        random weights. Of a whole T5, only the encoder's tensors are read into memory.

        Args:
            name_or_path: Folder or Hub id of a T5, Flan-T5, mT5 or UMT5 with the vocabulary of the
                T5 to replace: `google/flan-t5-base`; for Wan and AuraFlow, `google/umt5-base`.
            projection_dim: Width D that the denoiser expects.
            **kwargs: As in `from_pretrained`, as are returns and errors.
        """
        name = hub.local_path(name_or_path)
        values, access = hub.find_json(name, "config.json", kwargs)
        model_type = values.pop("model_type", None)
        if model_type not in ("t5", "mt5", "umt5"):
            raise ConfigError(f"expected a T5, mT5 or UMT5, got model_type {model_type!r}: {name}")
        values |= {key: kwargs.pop(key) for key in _KEYS & kwargs.keys()}
        origin = None if os.path.isdir(name) else name
        values |= {"base_model": origin, "base_model_revision": origin and access["revision"]}
        values |= {"project_out_dim": projection_dim, "encoder_type": model_type.removeprefix("m")}
        # mT5 has other defaults than T5.
        config = SlimT5Config(**AutoConfig.for_model(model_type).to_dict() | values)
        load, unused = _ENCODERS[config.encoder_type].from_pretrained, ("decoder.", "lm_head.")
        encoder, _ = hub.load_strictly(load, name, access, unused, config=config, **kwargs)
        with torch.device("meta"):
            model = cls(encoder.config)  # a copy of `config`, shared by both
        model.encoder = _faster(encoder)
        adapter = ProjectionAdapter(config.d_model, config.project_out_dim, config.dropout_rate)
        nn.init.zeros_(adapter.get_parameter("3.weight"))
        model.final_projection = adapter.to(encoder.device, encoder.dtype)
        return model.eval()

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], variant: str | None = None, **kwargs: Any
    ) -> None:
        """Write `config.json` and one `model.safetensors`, in the published layout.

        A full disk or a crash leaves an earlier save whole; other files stay as they are.

        Args:
            save_directory: The folder, made where needed.
            variant: Written into the names of the files, as `model.fp16.safetensors`.
            **kwargs: As of transformers. `push_to_hub=True` uploads the student without a variant.

        Raises:
            CheckpointError: There is a LoRA in the student, or it has no weights.
        """
        hub.check_no_lora(self)
        push, path = kwargs.pop("push_to_hub", False), Path(save_directory).expanduser().resolve()
        names = ("repo_id", "token", "private", "commit_message", "create_pr", "revision")
        pushed: Any = {"repo_id": path.name} | {k: kwargs.pop(k) for k in names if k in kwargs}
        with hub.atomic_save(save_directory) as folder:
            super().save_pretrained(folder, variant=variant, **kwargs | {"max_shard_size": "1TB"})
        if push:
            self.push_to_hub(**pushed)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        notes: str = "",
        metadata: Mapping[str, Any] | None = None,
        files: Sequence[str | os.PathLike[str]] = (),
        **kwargs: Any,
    ) -> str:
        """Upload the student with a model card; returns the address of the commit.

        A card that is already in the repository stays as it is, with its facts: after another
        training, edit it or delete it first.

        Args:
            repo_id: `owner/name`; made where needed.
            notes: Further facts for the card, in Markdown, such as how the student was trained.
            metadata: Of the card, such as `{"license": "apache-2.0"}`; as of `ModelCardData`.
            files: Further files to upload, such as images that `notes` shows.
            **kwargs: `token`; `private`, of a new repository; and what else
                `HfApi.upload_folder` takes, such as `revision`.

        Raises:
            CheckpointError, HubAccessError: As in `save_pretrained`; the Hub refuses.
        """
        api, private = HfApi(token=kwargs.pop("token", None)), kwargs.pop("private", None)
        with hub.hub_errors(repo_id), tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            for file in files:
                shutil.copy(file, folder)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            url = hf_hub_url(repo_id, "README.md", revision=kwargs.get("revision"))
            try:
                api.get_hf_file_metadata(url=url)
            except RemoteEntryNotFoundError:  # `file_exists` would take a 401 for it as well
                hub.model_card(self, repo_id, notes, metadata).save(Path(folder, "README.md"))
            kwargs = {"commit_message": "Upload a t5slim student"} | kwargs
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)


# What makes `import t5slim` enough for from_pretrained of these to give a student.
AutoConfig.register(SlimT5Config.model_type, SlimT5Config)
AutoModel.register(SlimT5Config, SlimT5Encoder)
AutoModelForTextEncoding.register(SlimT5Config, SlimT5Encoder)
