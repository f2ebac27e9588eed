"""The student: a small T5 encoder and a projection to the width that the denoiser expects.

The tensor names and config keys are those of the students that Wang et al. published (CVPR 2025,
arXiv 2503.19897). diffusers records a component's class by module and name, so that
`t5slim.encoder.SlimT5Encoder` is itself a part of the on-disk format of patched pipelines.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    T5Config,
    T5EncoderModel,
    T5PreTrainedModel,
    UMT5EncoderModel,
)
from transformers import PreTrainedModel as PreTrainedModel  # diffusers looks for it in this module
from transformers.modeling_outputs import BaseModelOutput

from . import checkpoint, model_card
from .adapter import ProjectionAdapter
from .config import ENCODER_TYPES, SlimT5Config
from .errors import ConfigError

_ENCODERS: dict[str, type[PreTrainedModel]] = dict(
    zip(ENCODER_TYPES, (T5EncoderModel, UMT5EncoderModel), strict=True)
)


class SlimT5Encoder(T5PreTrainedModel):
    """A T5 encoder with a projection: what stands in for T5-XXL in a diffusers pipeline.

    Or a UMT5 encoder (`config.encoder_type`), for the pipelines that have a UMT5, as Wan does.

    `output.last_hidden_state`, also `output[0]`, is (B, T, project_out_dim). The student is an
    ordinary model of transformers: gradient checkpointing, SDPA and `device_map` work as in
    T5EncoderModel.

    Loaded in float16, the `wo` layers stay in float32, since T5's activations behind them exceed
    float16's range; `dtype` and the output are float16. `.to(torch.float16)` after loading casts
    `wo` as well, as in transformers' T5, where what exceeds the range is then cut off and the rows
    are wrong: pass `dtype=torch.float16` to `from_pretrained` instead, or use bfloat16.

    Source: Wang et al., "Scaling Down Text Encoders of Text-to-Image Diffusion Models", section 3.
    """

    config_class = SlimT5Config
    config: SlimT5Config

    def __init__(self, config: SlimT5Config) -> None:
        super().__init__(config)
        self.encoder: Any = _ENCODERS[config.encoder_type](config)
        self.final_projection = ProjectionAdapter(
            config.d_model, config.project_out_dim, config.dropout_rate
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the encoder and the adapter draw their weights as they are made.

        T5's own rule would give the adapter weights of standard deviation 1.
        """

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, (vocab_size, d_model)."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Encode prompts.

        Args:
            input_ids: (B, T) int64 token ids.
            attention_mask: (B, T), 1 for tokens to attend to and 0 for padding. FLUX.1 and SD3 pass
                none: there, padding is attended to like text.
            inputs_embeds: (B, T, d_model), instead of ids.
            output_hidden_states: Also return the encoder's states, each (B, T, d_model).
            output_attentions: Also return the encoder's attentions, each (B, heads, T, T). Needs
                `attn_implementation="eager"`.
            return_dict: False for a tuple.

        Returns:
            A BaseModelOutput, or a tuple of its parts; the first is (B, T, project_out_dim) in
            `self.dtype`.
        """
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True: {self.config._attn_implementation!r} attention doesn't "
                "return its weights. Call `set_attn_implementation('eager')` first."
            )
        encoded = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        output = BaseModelOutput(
            last_hidden_state=self.final_projection(encoded.last_hidden_state),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: SlimT5Config | None = None,
        revision: str | None = None,
        subfolder: str = "",
        variant: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> SlimT5Encoder:
        """Load a student: one that t5slim saved, or a published one such as `LifuWang/DistillT5`.

        Args:
            pretrained_model_name_or_path: A folder or a Hub id.
            config: Use this configuration and not the checkpoint's.
            revision: Branch, tag or commit.
            subfolder: Where the files are in the folder or repository.
            variant: Read `model.<variant>.safetensors`.
            token: For private and gated repositories; by default the one of `hf auth login`.
            cache_dir: Where downloads are kept.
            force_download: Download again what is in the cache.
            local_files_only: Never ask the network.
            **kwargs: Anything else that transformers' `from_pretrained` takes: `dtype` (or
                `torch_dtype`; by default the one of the file), `device_map`,
                `attn_implementation`, `quantization_config`...

        Returns:
            The student, in evaluation mode.

        Raises:
            ConfigError: The config has an unknown key or impossible values.
            CheckpointError: Tensors are missing, unexpected, of another shape or not finite; the
                file is truncated, or there are only pickled weights.
            HubAccessError: The repository doesn't exist, is gated or can't be reached.
        """
        source = checkpoint.Source(
            os.fspath(pretrained_model_name_or_path),
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        config_file, values = source.read_config()
        expected = checkpoint.expected_tensors(cls, config or SlimT5Config.from_dict(values))
        checkpoint.check_tensors(
            source.pinned_by(config_file).find_weights(variant),
            expected,
            hint="For a plain T5 without projection, use SlimT5Encoder.from_t5.",
        )
        kwargs["use_safetensors"] = True
        with checkpoint.no_progress_bars():
            # From here on everything is local: nothing is asked of the network twice.
            model: SlimT5Encoder = super().from_pretrained(
                config_file.parent, config=config, variant=variant, **kwargs
            )
        checkpoint.check_finite(model, source)
        model.config.name_or_path = source.name
        return model

    @classmethod
    def from_t5(
        cls,
        name_or_path: str | os.PathLike[str],
        projection_dim: int = 4096,
        *,
        revision: str | None = None,
        subfolder: str = "",
        variant: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> SlimT5Encoder:
        """Make a student to be trained: a pretrained T5's encoder and a fresh projection.

        Of a whole T5, only the encoder's tensors are read into memory.

        Args:
            name_or_path: Folder or Hub id of a T5, Flan-T5, mT5 or UMT5, such as
                `google/flan-t5-base`. Its vocabulary must be that of the T5 which it is going to
                replace: for Wan and AuraFlow, `google/umt5-base` has the right one.
            projection_dim: Width D that the denoiser expects.
            revision: This and the following as in `from_pretrained`.
            subfolder: Where the files are, such as `text_encoder_2` of a pipeline.
            variant: Read `model.<variant>.safetensors`.
            token: For private and gated repositories.
            cache_dir: Where downloads are kept.
            force_download: Download again what is in the cache.
            local_files_only: Never ask the network.
            **kwargs: Anything else that transformers' `from_pretrained` takes, such as `dtype`.

        Returns:
            The student, in evaluation mode.

        Raises:
            ConfigError, CheckpointError, HubAccessError: As in `from_pretrained`.
        """
        source = checkpoint.Source(
            os.fspath(name_or_path),
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        config_file, values = source.read_config()
        model_type = values.pop("model_type", None)
        if model_type not in ("t5", "mt5", "umt5"):
            raise ConfigError(
                f"{source}: expected a T5, mT5 or UMT5, got model_type {model_type!r}."
            )
        # Through the T5's own class, since mT5 has other defaults. What it says about tasks and
        # decoding is dropped.
        values = AutoConfig.for_model(model_type, **values).to_dict()
        keys = values.keys() & T5Config().to_dict().keys()
        keys -= {"_name_or_path", "architectures", "model_type", "transformers_version"}
        pinned = source.pinned_by(config_file)
        config = SlimT5Config(
            **{key: values[key] for key in keys},
            project_out_dim=projection_dim,
            encoder_type="umt5" if model_type == "umt5" else "t5",
            base_model=None if source.is_local else source.name,
            base_model_revision=None if source.is_local else pinned.revision,
        )
        encoder_class: Any = _ENCODERS[config.encoder_type]
        checkpoint.check_tensors(
            pinned.find_weights(variant),
            checkpoint.expected_tensors(encoder_class, config),
            ignore=("decoder.", "lm_head."),
        )
        kwargs["use_safetensors"] = True
        with checkpoint.no_progress_bars():
            encoder = encoder_class.from_pretrained(
                config_file.parent, config=config, variant=variant, **kwargs
            )
        checkpoint.check_finite(encoder, source)
        with torch.device("meta"):
            model = cls(cast(SlimT5Config, encoder.config))  # a copy of `config`, shared by both
        model.encoder = encoder
        last = encoder.encoder.final_layer_norm.weight
        adapter = ProjectionAdapter(config.d_model, config.project_out_dim, config.dropout_rate)
        model.final_projection = adapter.to(last.device, encoder.dtype)
        return model.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        variant: str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `config.json` and `model.safetensors` in the published layout.

        Each file is written under another name and then renamed, so that a full disk or a crash
        leaves an earlier save whole.

        Args:
            save_directory: A folder, made where needed. Other files in it stay as they are.
            variant: Write `model.<variant>.safetensors`.
            push_to_hub: Also call `push_to_hub`.
            repo_id: Where to; by default the folder's name in your namespace.
            **kwargs: Anything else that transformers' `save_pretrained` takes.

        Raises:
            CheckpointError: There is a LoRA in the student that peft put there.
        """
        checkpoint.check_no_lora(self)
        with checkpoint.written_into(save_directory, variant) as temporary:
            super().save_pretrained(temporary, variant=variant, **kwargs)
        if push_to_hub:
            repo_id = repo_id or Path(save_directory).resolve().name
            self.push_to_hub(repo_id, token=kwargs.get("token"))

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a t5slim student",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] = (),
        notes: str = "",
        files: Sequence[str | os.PathLike[str]] = (),
        **kwargs: Any,
    ) -> str:
        """Upload the student with a model card.

        A card that is already in the repository keeps its text. It only gains metadata, and its
        facts, if they are still between the marks that t5slim put around them, are replaced.

        Args:
            repo_id: `owner/name`; made where needed.
            commit_message: Title of the commit.
            commit_description: Its body.
            private: Whether a new repository is private.
            token: By default the one of `hf auth login`.
            revision: Branch, made where needed.
            create_pr: Open a pull request instead of a commit.
            tags: Further tags for the card.
            notes: Further facts for the card, in Markdown, such as how the student was trained.
            files: Further files to upload, such as pictures that `notes` shows.
            **kwargs: Passed to `save_pretrained`.

        Returns:
            The address of the commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            for file in files:
                shutil.copy(file, folder)
            card = model_card.from_repository(repo_id, token)
            card = model_card.write_facts(card, self, repo_id, notes, tags)
            card.save(Path(folder, "README.md"))
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


# What makes `import t5slim` enough for AutoModel.from_pretrained to give a student.
AutoConfig.register(SlimT5Config.model_type, SlimT5Config)
AutoModel.register(SlimT5Config, SlimT5Encoder)
