"""The teacher's embeddings on disk, for work without T5 in memory.

    cache_teacher(pipe, prompts, "embeddings", pipeline_kwargs=kwargs)
    TextSlot(pipe).replace(None)  # or load the pipeline without its T5: text_encoder_2=None
    with cached_teacher(pipe, "embeddings"):
        train(pipe, student, prompts, pipeline_kwargs=kwargs)

A prompt takes S x D numbers of the teacher's dtype: 0.63 MB for 77 tokens of 4096 channels in
bfloat16, 4.2 MB for 512. Padding is kept as well: FLUX.1 and SD3 read its embeddings, too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, T5Config
from transformers.modeling_outputs import BaseModelOutput

from ..errors import DistillError
from ..hub import read_json, write_atomic
from ..slot import TextSlot, check_device_map
from .calls import tensor_sha256
from .pipeline import check_pipeline_kwargs, frozen, teacher_of, tokenize
from .prompts import Prompts, load_prompts
from .teacher import TeacherEmbeddings, encode_in_batches, prompt_keys, tokenize_empty

logger = logging.getLogger(__name__)

_TEACHER_FILE = "teacher.json"
# What decides on the embeddings: the same weights may lie under another name on another machine.
_DECISIVE = ("weights", "dtype", "width", "tokenizer")
# Of each tensor of the teacher, evenly spread: enough to know it from one that was trained further.
_FINGERPRINT_ELEMENTS = 1024


class TeacherCache:
    """The embeddings of one teacher, in a folder that several processes may read and fill.

    `teacher.json` says whose they are. The embeddings (S, D) of a prompt are a safetensors file
    named by its key. With `teacher` (`describe_teacher`), the folder may be new or empty.
    """

    def __init__(
        self, folder: str | os.PathLike[str], teacher: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = Path(folder)
        file = self.folder / _TEACHER_FILE
        if not file.is_file():
            if not (teacher and teacher.get("weights")):
                raise DistillError(
                    f"{str(self.folder)!r} holds no cached embeddings: it has no {_TEACHER_FILE}. "
                    "t5slim.distill.cache_teacher makes one, from a pipeline with its T5."
                )
            if any(self.folder.glob("[!.]*")):
                raise DistillError(
                    f"{str(self.folder)!r} holds other files. Pass a new or empty folder."
                )
            self._write(file, (json.dumps(dict(teacher), indent=2) + "\n").encode())
        self.teacher = read_json(file)
        self.check(teacher or {})

    def check(self, teacher: Mapping[str, Any]) -> None:
        """Raise a DistillError for another teacher; what isn't known of it isn't compared."""
        differences = [
            f"{name}: {self.teacher.get(name)} in the cache, {teacher[name]} in the pipeline"
            for name in _DECISIVE
            if teacher.get(name) not in (None, self.teacher.get(name))
        ]
        if differences:
            raise DistillError(
                f"{str(self.folder)!r} holds the embeddings of another teacher than this "
                f"pipeline's. {'; '.join(differences)}. Pass another folder, or load that teacher."
            )

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob("??/*.safetensors"))

    def __contains__(self, key: str) -> bool:
        return self._file(key).is_file()

    def get(self, key: str) -> Tensor | None:
        """The embeddings of a prompt, (S, D) on the CPU, or None. A damaged file is removed."""
        file = self._file(key)
        try:
            with safe_open(file, "pt") as content:
                embeddings = content.get_tensor("embeddings")
                if (content.metadata() or {}).get("sha256") == tensor_sha256(embeddings):
                    return embeddings
            raise SafetensorError("its embeddings have another SHA-256 than was written")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            logger.warning("%s is damaged (%s): its prompt has to be encoded again.", file, error)
        with suppress(OSError):  # a folder that is only read; or another process was faster
            file.unlink()
        return None

    def add(self, key: str, embeddings: Tensor) -> None:
        """Write the embeddings (S, D) of a prompt; a DistillError if the disk is full."""
        content = {"embeddings": embeddings.detach().cpu().contiguous()}
        self._write(self._file(key), save(content, {"sha256": tensor_sha256(embeddings)}))

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _write(self, file: Path, content: bytes) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, content)
        except OSError as error:
            raise DistillError(
                f"Can't write to {str(self.folder)!r}: {error}. Make room; the same call goes on."
            ) from error


class CachedTeacher(PreTrainedModel):
    """A stand-in for the T5 in a pipeline's text slot that returns its cached embeddings."""

    config_class = T5Config

    def __init__(self, cache: TeacherCache, tokenizer: Any) -> None:
        config = T5Config(d_model=cache.teacher["width"])
        config.name_or_path = cache.teacher["name_or_path"]
        super().__init__(config)
        self._cache = cache
        self._tokenizer = tokenizer
        # Where pipelines find the dtype and the device. A layer, as offload hooks go on layers.
        zero = torch.zeros(1, 1, dtype=getattr(torch, cache.teacher["dtype"]))
        self.marker = nn.Embedding.from_pretrained(zero)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        """The embeddings of cached prompts, (B, S, D); a DistillError names one that isn't."""
        found = []
        for ids, key in zip(input_ids, prompt_keys(input_ids, attention_mask), strict=True):
            if (embeddings := self._cache.get(key)) is None:
                raise _not_cached(self._cache, self._tokenizer, ids)
            found.append(embeddings)
        return BaseModelOutput(last_hidden_state=torch.stack(found).to(input_ids.device))


@contextmanager
def cached_teacher(
    pipe: Any, cache: TeacherCache | str | os.PathLike[str]
) -> Iterator[TeacherCache]:
    """For a while, put a stand-in that reads cached embeddings into a pipeline's text slot.

    Whatever works with a pipeline and its T5 works here without: `capture`, `VelocityGap`, `train`,
    and the pipeline itself. Afterwards what was in the slot, a T5 or nothing, is there again.

    Args:
        pipe: A pipeline, with or without its T5, which stays in memory.
        cache: What `cache_teacher` returned, or its folder.

    Yields:
        The cache.

    Raises:
        NoT5SlotError: The pipeline has no text slot.
        DistillError: The folder holds no cache, or that of another teacher; or, within, a prompt is
            used that isn't cached.
        PatchError: `device_map` spreads the pipeline over several devices.
    """
    if not isinstance(cache, TeacherCache):
        cache = TeacherCache(cache)
    cache.check(describe_teacher(pipe))
    check_device_map(getattr(pipe, "hf_device_map", None))
    slot = TextSlot(pipe)
    stand_in = CachedTeacher(cache, slot.tokenizer)
    with slot.offload_paused():
        stand_in.to(pipe._execution_device if slot.encoder is None else slot.encoder.device)
        original = slot.replace(stand_in)
    try:
        yield cache
    finally:
        slot.restore(original)


def cache_teacher(
    pipe: Any,
    prompts: Prompts,
    folder: str | os.PathLike[str],
    *,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 64,
) -> TeacherCache:
    """Encode prompts by the teacher, and keep its embeddings in a folder.

    The prompts are tokenized by the pipeline's own call, and with them its negative prompt (as
    `pipeline_kwargs` has it) and the empty prompt. What the folder holds already isn't encoded
    again, so that a call that was killed goes on where it stopped; several processes can fill one
    folder, each best with its own part of the prompts.

    The pipeline needs only what its class asks for to encode a prompt: FLUX.1, SD3, PixArt, Chroma,
    LTX, Wan, CogVideoX, AuraFlow and Mochi can be loaded with `transformer=None, vae=None` (the
    first two with their CLIP). Without its T5, too, this is a check that every prompt is cached.

    Args:
        pipe: A pipeline with the teacher in its text slot, in the dtype in which it will run:
            embeddings are cached in T5's.
        prompts: A list or a file, as for `train`; those to be evaluated, too.
        folder: A new one, or one that holds embeddings of the same teacher.
        pipeline_kwargs: How the pipeline will be called, as for `capture`.
        batch_size: Prompts that are tokenized together.

    Returns:
        The cache, with all of the prompts.

    Raises:
        NoT5SlotError: The pipeline has no T5.
        DistillError: No prompts; `pipeline_kwargs` that the pipeline doesn't take; the folder of
            another teacher; a full disk; or no T5, and prompts that aren't cached.
    """
    kwargs = dict(pipeline_kwargs or {})
    texts = [*dict.fromkeys([*load_prompts(prompts), ""])]
    check_pipeline_kwargs(pipe, kwargs)
    description = describe_teacher(pipe)
    cache = TeacherCache(folder, description)
    has_teacher = "weights" in description
    teacher = TeacherEmbeddings()
    with nullcontext() if has_teacher else cached_teacher(pipe, cache):
        for start in tqdm(range(0, len(texts), batch_size), desc="tokenize", unit="batch"):
            for ids, mask in tokenize(pipe, texts[start : start + batch_size], kwargs):
                teacher.add(ids, mask)
                # As `VelocityGap` pads it; nearly always also the pipeline's own empty prompt.
                teacher.add(*tokenize_empty(pipe, ids, mask))
                device = ids.device  # not the encoder's, if that is offloaded
    missing = {key: index for key, index in teacher.indices.items() if key not in cache}
    if missing and not has_teacher:
        (ids,) = teacher.tokens([*missing.values()][:1], device)[0]
        raise _not_cached(cache, TextSlot(pipe).tokenizer, ids, len(missing))
    with frozen(pipe, gradient_checkpointing=False):
        for start in tqdm(range(0, len(missing), batch_size), "encode by the teacher"):
            together = [*missing][start : start + batch_size]
            tokens = teacher.tokens([missing[key] for key in together], device)
            encoded = encode_in_batches(teacher_of(pipe), *tokens)
            for key, embeddings in zip(together, encoded, strict=True):
                cache.add(key, embeddings)
    pipe.maybe_free_model_hooks()
    return cache


def describe_teacher(pipe: Any) -> dict[str, Any]:
    """Facts of the T5 that belongs to a pipeline, for `TeacherCache`; as far as they are known."""
    slot = TextSlot(pipe)
    vocabulary = sorted(slot.tokenizer.get_vocab().items())
    facts = {
        "width": slot.width,
        "tokenizer": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest(),
    }
    encoder = slot.encoder
    if encoder is None or isinstance(encoder, CachedTeacher):
        return facts
    with slot.offload_paused():  # under sequential offload, weights are on the meta device
        weights = fingerprint(encoder)
    return facts | {
        "name_or_path": encoder.config.name_or_path,
        "revision": getattr(encoder.config, "_commit_hash", None),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "weights": weights,
    }


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a sample of the weights, whatever their names and devices, in hex."""
    digests = set()  # offload can make two of tensors that were tied
    for tensor in (*module.parameters(), *module.buffers()):
        sample = tensor.flatten()[:: max(1, tensor.numel() // _FINGERPRINT_ELEMENTS)]
        digests.add(f"{tuple(tensor.shape)} {tensor_sha256(sample)}")
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def _not_cached(cache: TeacherCache, tokenizer: Any, ids: Tensor, count: int = 1) -> DistillError:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    others = f" and {count - 1:,} more" if count > 1 else ""
    return DistillError(
        f"The embeddings of the prompt {text!r}, padded to {len(ids)} tokens,{others} aren't in "
        f"{str(cache.folder)!r}. Call t5slim.distill.cache_teacher on a pipeline with its T5, with "
        "all prompts (evaluated ones, too) and the same pipeline_kwargs: max_sequence_length, "
        "negative_prompt and guidance decide what T5 is called with."
    )
