"""The configuration of a student: a T5 config.json with the two widths of its projection."""

from __future__ import annotations

import difflib
import functools
import os
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, T5Config
from transformers.activations import ACT2FN

from .errors import ConfigError

# The shapes of Flan-T5, from which the paper starts.
_PRESETS = {
    "small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
}
ENCODER_TYPES = ("t5", "umt5")
# T5-XXL's encoder has 4.8 billion parameters; what asks for more than this is a mistake.
_MAX_PARAMETERS = 20 * 10**9
_SIZES = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "project_in_dim",
    "project_out_dim",
)
# What config.json files of T5 hold beside the attributes of today's T5Config: written by older
# versions of transformers, or about the decoder.
_LEGACY_KEYS = (
    "add_cross_attention",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "finetuning_task",
    "n_positions",
    "name_or_path",
    "num_labels",
    "output_past",
    "prefix",
    "pruned_heads",
    "quantization_config",
    "sep_token_id",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "use_bfloat16",
)


class SlimT5Config(T5Config):
    """Configuration of a `SlimT5Encoder`: a T5Config and the two widths of its projection.

    `d_model` is the student's own width, as in the published files; `project_out_dim` is the width
    that the denoiser sees.

    Args:
        project_in_dim: Input width of the projection. It can only be `d_model`, its default; the
            published files spell it out.
        project_out_dim: Output width D of the projection: T5-XXL's 4096 for FLUX.1 and SD3.
        out_dim: Another name of `project_out_dim` in some published files.
        encoder_type: "t5", or "umt5" for a UMT5 encoder, whose every layer has position biases of
            its own: for Wan, AuraFlow and others that have a UMT5. Only the latter is written to
            config.json; the published files don't know the key.
        base_model: Hub id of the T5 that the student was made from, for its model card.
        base_model_revision: The commit of it.
        **kwargs: Any key of a T5 config.json.

    Raises:
        ConfigError: An unknown key, or a value that is out of range.
    """

    # Not "t5", which the published files call themselves: AutoModel would then read a student as a
    # T5Model and leave its projection out. T5Config and classes that use it still read "slim_t5".
    model_type = "slim_t5"
    encoder_type = "t5"

    def __init__(
        self,
        *,
        project_in_dim: int | None = None,
        project_out_dim: int | None = None,
        out_dim: int | None = None,
        encoder_type: Literal["t5", "umt5"] = "t5",
        base_model: str | None = None,
        base_model_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        model_type = kwargs.pop("model_type", self.model_type)
        if model_type not in ("t5", self.model_type):
            raise ConfigError(
                f"expected a student's config (model_type 't5' or {self.model_type!r}), got "
                f"model_type {model_type!r}."
            )
        for key in kwargs:
            if not key.startswith("_") and key not in _t5_config_keys():
                near = difflib.get_close_matches(key, [*_t5_config_keys(), *_SIZES], n=1)
                hint = f"Did you mean {near[0]!r}?" if near else "Remove it, if nothing needs it."
                raise ConfigError(f"unknown key {key!r} in a student's config. {hint}")
        kwargs["tie_word_embeddings"] = False
        try:
            super().__init__(**kwargs)
        except (StrictDataclassError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"invalid config of a student: {error}") from error
        self.project_in_dim = self.d_model if project_in_dim is None else project_in_dim
        self.project_out_dim = project_out_dim or out_dim or 4096
        if out_dim is not None:
            self.out_dim = out_dim
        if encoder_type != "t5":
            self.encoder_type = encoder_type
        if base_model is not None:
            self.base_model = base_model
        if base_model_revision is not None:
            self.base_model_revision = base_model_revision
        self._check_values()

    @classmethod
    def preset(
        cls, name: Literal["small", "base", "large", "xl"], **overrides: Any
    ) -> SlimT5Config:
        """The shape of a Flan-T5 encoder: 54 M, 130 M, 362 M or 1,249 M parameters with projection.

        Args:
            name: The size.
            **overrides: Keys to set differently, such as `project_out_dim` for a denoiser that
                doesn't expect 4096; `encoder_type="umt5", vocab_size=256384` for Wan.
        """
        if name not in _PRESETS:
            raise ConfigError(f"expected a preset of {', '.join(_PRESETS)}, got {name!r}.")
        shape: dict[str, Any] = {"d_kv": 64, "feed_forward_proj": "gated-gelu", **_PRESETS[name]}
        return cls(**(shape | overrides))

    def _check_values(self) -> None:
        for key in _SIZES:
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{key}: expected a whole number above 0, got {value!r}.")
        if self.project_in_dim != self.d_model:
            raise ConfigError(
                f"project_in_dim is {self.project_in_dim}, but the projection reads the encoder's "
                f"output of width d_model = {self.d_model}: set both to the same."
            )
        if self.encoder_type not in ENCODER_TYPES:
            raise ConfigError(
                f"encoder_type: expected {' or '.join(map(repr, ENCODER_TYPES))}, got "
                f"{self.encoder_type!r}."
            )
        if not 0 <= self.dropout_rate < 1:
            raise ConfigError(f"dropout_rate: expected 0 <= rate < 1, got {self.dropout_rate}.")
        if self.dense_act_fn not in ACT2FN:
            raise ConfigError(
                f"feed_forward_proj: expected 'relu', 'gated-gelu' or another activation of "
                f"transformers, got {self.feed_forward_proj!r}."
            )
        # num_heads * d_kv need not be d_model: Flan-T5 small has 6 heads of 64 for a width of 512.
        attention = 4 * self.d_model * self.num_heads * self.d_kv
        feed_forward = (3 if self.is_gated_act else 2) * self.d_model * self.d_ff
        parameters = (
            self.vocab_size * self.d_model
            + self.num_layers * (attention + feed_forward)
            + (self.d_model + self.project_out_dim) * self.project_out_dim
        )
        if parameters > _MAX_PARAMETERS:
            sizes = ", ".join(f"{key}={getattr(self, key)}" for key in _SIZES)
            raise ConfigError(
                f"a student of {parameters / 1e9:,.0f} billion parameters ({sizes}): expected at "
                f"most {_MAX_PARAMETERS / 1e9:.0f} billion; T5-XXL's encoder has 4.8."
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json; see transformers.

        The published files say "t5", about which transformers would warn.
        """
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") == "t5":
            config["model_type"] = cls.model_type
        return config, kwargs

    def to_dict(self) -> dict[str, Any]:
        """The config as it is written to disk, with `tie_word_embeddings` as published.

        transformers 5 replaces the value by True in memory, and would then write that.
        """
        return super().to_dict() | {"tie_word_embeddings": False}


@functools.cache
def _t5_config_keys() -> frozenset[str]:
    # Before version 5, transformers wrote defaults of generation into each config.json as well.
    generation = GenerationConfig().to_dict()
    return frozenset([*T5Config().to_dict(), *T5Config.attribute_map, *generation, *_LEGACY_KEYS])
