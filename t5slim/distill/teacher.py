"""The teacher's embeddings: each prompt encoded once, in memory or on disk.

On disk, they serve work without T5 in memory (see docs/distill.md). A prompt takes S x D numbers of
the teacher's dtype: 0.63 MB for 77 tokens of 4096 channels in bfloat16, 4.2 MB for 512. Padding is
kept as well: FLUX.1 and SD3 read its embeddings, too.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, T5Config
from transformers.modeling_outputs import BaseModelOutput

from ..errors import ConfigError, DistillError
from ..hub import check_weights, local_path, make_folder, read_json, write_atomic
from ..slot import TextSlot, check_device_map
from . import pipeline
from .prompts import Prompts, PromptSource

logger = logging.getLogger(__name__)

_MAX_BYTES = 8 << 30  # of the teacher's embeddings in host memory
_BATCH = 8
_TEACHER_FILE = "teacher.json"
# What decides on the embeddings: the same weights may lie under another name on another machine.
_DECISIVE = ("width", "dtype", "tokenizer", "weights")
# Of each tensor of the teacher, evenly spread: enough to know it from one that was trained further.
_FINGERPRINT_ELEMENTS = 1024


class TeacherEmbeddings:
    """The prompts that pass through the text slot, each encoded by the teacher only once.

    A prompt is what the encoder sees of it, ids and mask: the empty prompt of classifier-free
    guidance is one entry. Up to 8 GiB of embeddings are kept; the oldest are dropped first.

    The embeddings of a prompt depend on nothing but the prompt, bit for bit: neither on its batch
    nor on what was encoded before. So a run that was resumed sees those of one that wasn't.

    Attributes:
        indices: Of all prompts so far, by their `prompt_keys`.
    """

    def __init__(self) -> None:
        self.indices: dict[str, int] = {}
        self._prompts: list[tuple[Tensor, Tensor | None]] = []  # ids and mask, (S,)
        self._embeddings: dict[int, Tensor] = {}
        self._bytes = 0

    def add(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
        """The index of each prompt of a batch, ids and mask (B, S); a new one gets the next."""
        keys = prompt_keys(input_ids, attention_mask)
        for i, key in enumerate(keys):
            if key not in self.indices:
                self.indices[key] = len(self._prompts)
                mask = None if attention_mask is None else attention_mask[i].to("cpu", copy=True)
                self._prompts.append((input_ids[i].to("cpu", torch.int32, copy=True), mask))
        return [self.indices[key] for key in keys]

    def add_empty(self, tokenizer: Any, prompts: Sequence[int]) -> int:
        """The index of the empty prompt, padded as those are that are passed by index."""
        lengths = {len(self._prompts[i][0]) for i in prompts}
        # If they differ, the pipeline doesn't pad, and its empty prompt is the end alone.
        length = lengths.pop() if len(lengths) == 1 else 1
        tokens = tokenizer([""], padding="max_length", max_length=length, return_tensors="pt")
        _, like = self._prompts[prompts[0]]
        mask = None if like is None else tokens.attention_mask.to(like)
        return self.add(tokens.input_ids, mask)[0]

    def tokens(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Ids (B, S) int64, and mask (B, S) or None, of prompts by index.

        Bria encodes each prompt alone, without padding: those are padded here, with a mask.
        """
        ids = [self._prompts[i][0] for i in indices]
        masks = [mask for i in indices if (mask := self._prompts[i][1]) is not None]
        if not masks and len(set(map(len, ids))) > 1:
            masks = [torch.ones_like(i) for i in ids]
        padded = pad_sequence(ids, batch_first=True).to(device, torch.int64)
        return padded, pad_sequence(masks, batch_first=True).to(device) if masks else None

    def encode(
        self, forward: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """The teacher's embeddings of a batch, (B, S, D): `encode` for `run_pipeline`."""
        return self.get(forward, self.add(input_ids, attention_mask), input_ids.device)

    def get(
        self, forward: Callable[..., Any], indices: Sequence[int], device: torch.device
    ) -> Tensor:
        """The teacher's embeddings of prompts by index, (B, S, D); the shorter end with zeros."""
        missing = [i for i in dict.fromkeys(indices) if i not in self._embeddings]
        for i, embeddings in self.encode_each(forward, missing, device):
            self._embeddings[i] = embeddings.to("cpu", copy=True)
            self._bytes += embeddings.nbytes
        result = pad_sequence([self._embeddings[i] for i in indices], batch_first=True).to(device)
        while self._bytes > _MAX_BYTES:
            self._bytes -= self._embeddings.pop(next(iter(self._embeddings))).nbytes
        return result

    def encode_each(
        self, forward: Callable[..., Any], indices: Sequence[int], device: torch.device
    ) -> Iterator[tuple[int, Tensor]]:
        """Encode different prompts, by index and not from memory: each index with its (S, D)."""
        for length in sorted({len(self._prompts[i][0]) for i in indices}):
            together = [i for i in indices if len(self._prompts[i][0]) == length]
            for start in range(0, len(together), _BATCH):
                batch = together[start : start + _BATCH]
                # Matrix products round by the size of their batch: all have one, so this is filled.
                filled = batch + batch[-1:] * (_BATCH - len(batch))
                with torch.no_grad():
                    found = pipeline.call_encoder(forward, *self.tokens(filled, device))
                yield from zip(batch, found, strict=False)


def prompt_keys(input_ids: Tensor, attention_mask: Tensor | None) -> list[str]:
    """The SHA-256 of each prompt's ids and mask (B, S), in hex: its name on every machine."""
    contents = input_ids.to("cpu", torch.int32)
    if attention_mask is not None:  # below 0, as no id is; a mask of ones isn't no mask
        mask = attention_mask.to("cpu", torch.bool)
        contents = torch.cat([contents, -1 - mask.int()], 1)
    return [hashlib.sha256(content.tobytes()).hexdigest() for content in contents.numpy()]


class TeacherCache:
    """The embeddings of one teacher, in a folder that several processes may read and fill.

    `teacher.json` says whose they are (`teacher`, see `describe_teacher`). The embeddings (S, D) of
    a prompt are a safetensors file named by its key.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(local_path(folder))
        try:
            self.teacher = read_json(self.folder / _TEACHER_FILE)
            width, dtype = self.teacher["width"], getattr(torch, self.teacher["dtype"])
            self.like = torch.empty(0, width, dtype=dtype)  # embeddings of no token
            os.fspath(self.teacher["name_or_path"])
        except (AttributeError, ConfigError, KeyError, RuntimeError, TypeError) as error:
            raise DistillError(
                f"{str(self.folder)!r} holds no cached embeddings ({error!r}): see cache_teacher."
            ) from error

    def check(self, teacher: Mapping[str, Any]) -> None:
        """Raise a DistillError for another teacher; what isn't known of it isn't compared."""
        for name in _DECISIVE:
            if teacher.get(name) not in (None, cached := self.teacher.get(name)):
                raise DistillError(
                    f"{str(self.folder)!r} holds the embeddings of another teacher: its {name} is "
                    f"{cached}, this pipeline's {teacher[name]}. Pass another folder, or load that."
                )

    def get(self, key: str) -> Tensor | None:
        """The embeddings of a prompt, (S, D) on the CPU, or None. A damaged file is removed."""
        file = self.file(key)
        try:
            with safe_open(file, "pt") as content:
                embeddings = content.get_tensor("embeddings")
                if content.metadata() == _metadata(key, embeddings):
                    kind = (*embeddings.shape[1:], embeddings.dtype)
                    if kind != (*self.like.shape[1:], self.like.dtype):
                        raise DistillError(f"{file} has {kind}, unlike its {_TEACHER_FILE}.")
                    return embeddings
        except (SafetensorError, OSError):
            if not os.path.exists(file):
                return None
        logger.warning("%s is damaged: its prompt has to be encoded again.", file)
        with suppress(OSError):  # in a folder that is read only
            file.unlink(missing_ok=True)
        return None

    def add(self, key: str, embeddings: Tensor) -> None:
        """Write the embeddings (S, D) of a prompt, in whole or not at all."""
        content = {"embeddings": embeddings.detach().cpu().contiguous()}
        write_atomic(self.file(key), save(content, _metadata(key, embeddings)))

    def file(self, key: str) -> Path:
        """The file of a prompt's embeddings, which needn't be there."""
        return self.folder / key[:2] / f"{key}.safetensors"


def _metadata(key: str, embeddings: Tensor) -> dict[str, str]:
    """By which a file of embeddings is known to be whole, and that of its prompt."""
    content = f"{key} {pipeline.tensor_sha256(embeddings)}"
    return {"sha256": hashlib.sha256(content.encode()).hexdigest()}


class CachedTeacher(PreTrainedModel):
    """A stand-in for the T5 in a pipeline's text slot that returns its cached embeddings."""

    config_class = T5Config

    def __init__(self, cache: TeacherCache, tokenizer: Any) -> None:
        config = T5Config(d_model=cache.like.shape[1])
        config.name_or_path = cache.teacher["name_or_path"]
        super().__init__(config)
        self._cache, self._tokenizer = cache, tokenizer
        # Where pipelines find the dtype and the device. A layer, as offload hooks go on layers.
        self.marker = nn.Embedding.from_pretrained(cache.like.new_zeros(1, 1))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        """The embeddings of cached prompts, (B, S, D); a DistillError names one that isn't."""
        found, folder = [], self._cache.folder
        for ids, key in zip(input_ids, prompt_keys(input_ids, attention_mask), strict=True):
            if (embeddings := self._cache.get(key)) is None:
                text = self._tokenizer.decode(ids, skip_special_tokens=True)
                raise DistillError(
                    f"The prompt {text!r}, padded to {len(ids)} tokens, isn't in {str(folder)!r}: "
                    "call t5slim.distill.cache_teacher with all prompts and these pipeline_kwargs."
                )
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
    cache = cache if isinstance(cache, TeacherCache) else TeacherCache(cache)
    cache.check(describe_teacher(pipe))
    check_device_map(getattr(pipe, "hf_device_map", None))
    slot = TextSlot(pipe)
    original, stand_in = slot.encoder, CachedTeacher(cache, slot.tokenizer)
    try:
        with slot.offload_paused():
            stand_in.to(pipe._execution_device if original is None else original.device)
            slot.replace(stand_in)
        yield cache
    finally:
        if slot.encoder is not original:
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
            another teacher; or no T5, and prompts that aren't cached.
    """
    description, teacher = describe_teacher(pipe), TeacherEmbeddings()
    kwargs = pipeline.check_pipeline_kwargs(pipe, pipeline_kwargs)
    texts = [*dict.fromkeys([*PromptSource(prompts).all(), ""])]
    batches = pipeline.batches_of(texts, batch_size)
    has_teacher = "weights" in description
    if has_teacher and not (file := make_folder(folder) / _TEACHER_FILE).exists():
        write_atomic(file, (json.dumps(description, indent=2) + "\n").encode())
    cache = TeacherCache(folder)
    cache.check(description)
    stand_in: Any = nullcontext() if has_teacher else cached_teacher(pipe, cache)
    with stand_in, pipeline.evaluating(pipeline.teacher_of(pipe)):
        for batch in tqdm(batches, desc="tokenize", unit="batch"):
            for ids, mask in pipeline.tokenize(pipe, batch, kwargs):
                # As `VelocityGap` pads it; nearly always also the pipeline's own empty prompt.
                teacher.add_empty(TextSlot(pipe).tokenizer, teacher.add(ids, mask))
                device = ids.device  # not the encoder's, if that is offloaded
        keys = {i: key for key, i in teacher.indices.items() if not cache.file(key).is_file()}
        encoded = teacher.encode_each(pipeline.teacher_of(pipe), [*keys], device)
        for i, embeddings in tqdm(encoded, "encode by the teacher", total=len(keys)):
            cache.add(keys[i], embeddings)
    pipe.maybe_free_model_hooks()
    return cache


def describe_teacher(pipe: Any) -> dict[str, Any]:
    """Facts of the T5 that belongs to a pipeline, for `TeacherCache`; as far as they are known."""
    slot = TextSlot(pipe)
    encoder = slot.encoder
    vocabulary = sorted(slot.tokenizer.get_vocab().items())
    tokenizer = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
    facts = {"width": slot.width, "tokenizer": tokenizer}
    if encoder is not None and not isinstance(pipeline.teacher_of(pipe), CachedTeacher):
        facts["name_or_path"] = encoder.config.name_or_path
        facts["dtype"] = str(encoder.dtype).removeprefix("torch.")
        with slot.offload_paused():  # under sequential offload, weights are on the meta device
            check_weights(encoder)
            # A sample of them, whatever their names; offload can make two of what was tied.
            digests = set()
            for tensor in (*encoder.parameters(), *encoder.buffers()):
                sample = tensor.flatten()[:: max(1, tensor.numel() // _FINGERPRINT_ELEMENTS)]
                digests.add(f"{tuple(tensor.shape)} {pipeline.tensor_sha256(sample)}")
        facts["weights"] = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
    return facts
